from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import ConcatDataset, Subset

from fedekd.data import FederatedDataModule, Samples, StoredInputs, load_samples
from fedekd.errors import UserError
from tests.data.user_data import Blobs, Labelled, Module

PACKAGE = "tests.data.user_data"


def site(name: str, **arguments: Any) -> dict[str, Any]:
    return {"class_path": f"{PACKAGE}.{name}", "init_args": arguments}


def load(**sites: Any) -> Samples:
    return load_samples(sites=sites)


def test_sites_of_datasets_are_joined_without_reading_them() -> None:
    one, two = Labelled(), Labelled(40, seed=1)
    samples = load(north=one, south=two)
    assert isinstance(samples.inputs, StoredInputs)
    assert samples.inputs.shape == (100, 1, 8, 8)
    assert samples.targets.tolist() == one.targets + two.targets
    assert samples.site_names == ("north", "south")
    assert samples.class_names == ("low", "mid", "high")
    assert samples.group is not None
    assert len(samples.group.unique()) == 30 + 20  # groups of two sites differ
    assert {*one.reads} == {*two.reads} == {0}


def test_site_by_class_path_has_labels_of_one_pass() -> None:
    samples = load(a=site("Blobs", length=30, seed=2))
    assert samples.targets.tolist() == [(index + 2) % 3 for index in range(30)]
    assert torch.equal(samples.inputs[torch.tensor([7])][0], Blobs(30, 2)[7][0])


def test_site_of_parts_has_labels_and_groups_of_the_whole() -> None:
    whole = Labelled()
    samples = load(a=ConcatDataset([Subset(whole, [5, 0]), Subset(whole, range(10, 20))]))
    assert samples.targets.tolist() == [whole.targets[index] for index in [5, 0, *range(10, 20)]]
    assert samples.class_names == ("low", "mid", "high")
    assert len(torch.unique(samples.group)) == 2 + 5


def test_data_module_has_given_splits() -> None:
    sites = {"a": site("Module", seed=0), "b": site("Module", seed=1)}
    data = FederatedDataModule(sites=sites, splits="given")
    assert [len(part) for part in (data.clients[1].train, data.clients[1].validation, data.clients[1].test)] == [
        *(30, 12, 9)
    ]
    assert data.samples.targets[data.clients[1].test].tolist() == [(index + 3) % 3 for index in range(9)]


def test_data_module_with_groups_in_one_split_keeps_them() -> None:
    module = Module()
    module.setup = lambda stage=None: module.parts.update(train=Labelled(30), val=Blobs(12, 1), test=Blobs(9, 2))
    samples = load(a=module)
    assert len(samples.group.unique()) == 15 + 12 + 9


class Renamed(Labelled):
    def __getitem__(self, index: int) -> tuple[Any, int]:
        x, y = super().__getitem__(index)
        return x, 2 - y


class OneHot(Blobs):
    def __getitem__(self, index: int) -> tuple[Any, Any]:
        x, y = super().__getitem__(index)
        return x, torch.eye(3)[y]


class FewLabels(Labelled):
    def __init__(self) -> None:
        super().__init__()
        self.targets = self.targets[:-1]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (site("Stream"), "site 'a': expected a data set with __len__ and __getitem__, got the IterableDataset Stream"),
        (site("Module", stream=True), "site 'a': expected .* got the IterableDataset Stream"),
        (site("Triples"), r"site 'a': expected items \(input, label\), got a tuple as sample 0"),
        (site("Missing"), r"data.sites: 'a': expected a class of tests.data.user_data, got 'Missing'"),
        ({"class_path": "no_such_module.X"}, "data.sites: 'a': expected a class that can be imported, got 'no_such"),
        ({"class_path": "X", "arguments": 3}, "data.sites: 'a': expected class_path and optionally init_args, got"),
        (site("Blobs", colour="red"), "data.sites: 'a': expected arguments of .*Blobs, got .* TypeError"),
        (site("Blobs", wrong=41), "site 'a': expected to read sample 41. It failed: OSError: file 41 is truncated"),
        (site("Halve"), "site 'a': expected a data set with __len__, got a Halve"),
        (site("Blobs", length=0), "site 'a': expected at least one sample, got none"),
        (Renamed(), "site 'a': expected the labels of the items in the attribute targets, got 2 in sample 0 and 0"),
        (OneHot(), "site 'a': expected one number or name as label, got tensor"),
        (FewLabels(), r"site 'a': expected 60 values in the attribute targets, one per sample, got shape \(59,\)"),
    ],
)
def test_site_invalid_dataset_raises_one_line(source: Any, message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}") as caught:
        load(a=source)
    assert "\n" not in str(caught.value)


def test_sites_of_two_shapes_are_refused() -> None:
    with pytest.raises(UserError, match=r"^site 'b': expected inputs \(1, 8, 8\), .* of site 'a', got \(3, 8, 8\)"):
        load(a=site("Blobs"), b=site("Pictures"))


def test_group_column_names_an_attribute() -> None:
    with pytest.raises(
        UserError, match=r"^data.group_column: site 'a': expected an attribute of the data set, got 'x'"
    ):
        load_samples(sites={"a": Labelled()}, group_column="x")
