"""Descriptions of the sites: no samples, and enough for the server to do without them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("flwr")

import fedekd
from fedekd.errors import UserError
from fedekd.flower.apps import Settings, serve
from fedekd.flower.description import (
    SPLITS,
    SiteData,
    describe,
    require_agreement,
    require_consistent_sites,
    require_description,
    shared_config,
)
from fedekd.flower.messages import DESCRIBE, values_of

from .conftest import NUM_SITES, Sites, build

pytestmark = pytest.mark.flower


def all_descriptions(options: list[str]) -> list[dict[str, Any]]:
    """The descriptions of all sites, as they arrive from JSON."""
    method, data, spec = build(options)
    return list(json.loads(json.dumps([describe(method, spec, data.samples, splits) for splits in data.clients])))


def leaves(value: Any) -> Iterator[Any]:
    """The values of nested dicts; lists are values."""
    if isinstance(value, dict):
        for item in value.values():
            yield from leaves(item)
    else:
        yield value


def test_description_reply_contains_counts_but_no_pixels_or_indices(sites: Sites) -> None:
    sites.server()
    [reply] = (reply for reply in sites.grid.replies if values_of(reply)["site"] == 1)
    assert not reply.content.array_records
    assert not reply.content.metric_records
    assert len(reply.content.config_records) == 1
    description = values_of(reply)
    assert set(description) == {"site", "config", "sizes", "class_counts", "digest", "name", "class_names", "columns"}
    assert {description[name] for name in ("name", "class_names", "columns")} == {None}  # a part of numbered classes
    assert set(description["sizes"]) == set(SPLITS)
    assert re.fullmatch("[0-9a-f]{64}", description["digest"])
    method, _, spec = build(sites.options)
    assert description.pop("config") == json.loads(json.dumps(shared_config(method, spec)))  # the server has it already
    assert [leaf for leaf in leaves(description) if isinstance(leaf, list)] == [description["class_counts"]]
    assert len(description["class_counts"]) == 3
    assert sum(description["class_counts"]) == sum(description["sizes"][s] for s in ("train", "validation", "test"))
    assert max(len(leaf) for leaf in leaves(description) if isinstance(leaf, str)) == 64  # no text but the digest


def test_description_changed_pixel_changes_only_digest(options: list[str]) -> None:
    method, data, spec = build(options)
    splits = data.clients[0]
    before = describe(method, spec, data.samples, splits)
    data.samples.inputs[splits.test[0], 0, 0, 0] += 1
    after = describe(method, spec, data.samples, splits)
    assert before.pop("digest") != after.pop("digest")
    assert before == after


@pytest.mark.parametrize("task", ["classification", "regression"])
@pytest.mark.parametrize("channels", [1, 3])
def test_site_data_from_descriptions_matches_data_module(
    task: str, channels: int, options: list[str], write_blobs: Callable[..., Path], tmp_path: Path
) -> None:
    path = write_blobs(tmp_path / "images.npz", 90, channels=channels, num_classes=4, seed=3)
    all_options = [*options, f"--data.dataset={path}", f"--task={task}"]
    _, data, _ = build(all_options)
    site_data = SiteData("images", data.alpha, all_descriptions(all_options), data.batch_size, data.eval_batch_size)
    site_data.prepare_data()
    site_data.setup()
    assert site_data.task == data.task == task
    for name in ("num_classes", "input_shape", "num_outputs", "task"):
        assert getattr(site_data.samples, name) == getattr(data.samples, name), name
    assert site_data.samples.targets.dtype == data.samples.targets.dtype
    assert len(site_data.samples) == 0
    assert (site_data.num_clients, site_data.alpha, site_data.num_classes) == (NUM_SITES, 1.0, 4)
    np.testing.assert_array_equal(site_data.class_counts(), data.class_counts())
    assert site_data.class_counts().dtype == data.class_counts().dtype
    for site, client in zip(site_data.clients, data.clients, strict=True):
        assert (site.client, len(site)) == (client.client, len(client))
        assert site.digest(site_data.samples) == client.digest(data.samples)
        assert {s: len(getattr(site, s)) for s in SPLITS} == {s: len(getattr(client, s)) for s in SPLITS}
        assert not any(getattr(site, split).any() for split in SPLITS)


def test_class_counts_absent_class_is_zero(options: list[str]) -> None:
    assert all_descriptions([*options, "--data.num_classes=7"])[0]["class_counts"][3:] == [0, 0, 0, 0]


@pytest.mark.parametrize(
    "change",
    [
        {"sizes": {"train": 2**50}},
        {"sizes": {"train": 10**9 + 1}},
        {"sizes": {"train": 0}},
        {"sizes": {"tuning": 1000}},
        {"sizes": {"test": 1000}},
        {"class_counts": []},
        {"class_counts": [1] * (10**5 + 1)},
        {"class_counts": [2**50]},
        {"digest": "x"},
        {"digest": "0" * 10**6},
    ],
    ids=lambda change: str(change)[:40],
)
def test_require_description_implausible_numbers_raise(change: dict[str, Any], options: list[str]) -> None:
    description = all_descriptions(options)[0]
    require_description(description)
    changed = {**description, **change}
    if isinstance(change.get("sizes"), dict):
        changed["sizes"] = {**description["sizes"], **change["sizes"]}
    with pytest.raises(UserError, match=r"^(sizes|class_counts|digest): expected .*, got .*at the site") as caught:
        require_description(changed)
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("task", "x"),
        ("input_shape", [2**40]),
        ("input_shape", ["1", 8, 8]),
        ("input_shape", [1, 8]),
        ("input_shape", [1, 8, 2**50]),
    ],
)
def test_require_consistent_sites_implausible_images_raise(name: str, value: Any, options: list[str]) -> None:
    descriptions = all_descriptions(options)
    for description in descriptions:
        description["config"][name] = value
    with pytest.raises(UserError, match=f"site 0: {name}: expected .*, got "):
        require_consistent_sites(descriptions)


def test_site_data_does_not_allocate_claimed_sizes(options: list[str]) -> None:
    descriptions = all_descriptions(options)
    descriptions[0]["sizes"]["train"] = 10**9
    [splits, *_] = SiteData("images", 1.0, descriptions, 8, 8).clients
    assert len(splits.train) == 10**9
    assert splits.train.untyped_storage().nbytes() == 8


DIFFERENT = {
    "classes": (["--data.num_classes=7"], r"site 1: classes: expected 3, got 7\."),
    "proxy": (
        ["--client.proxy_model=fedekd.models.PrivateCNN"],
        r"site 1: proxy\.convolutions\.0\.bias: expected \(32,\) torch\.float32, got \(64,\) torch\.float32\.",
    ),
    "proxy precision": (
        ["--trainer.precision=64-true"],
        r"site 1: proxy\.convolutions\.0\.bias: expected \(32,\) torch\.float32, got \(32,\) torch\.float64\.",
    ),
    "argument": (["--method.beta=0.25"], r"site 1: method\.FedeKD\.beta: expected 1\.0, got 0\.25\."),
    "nested argument": (
        ["--method.aggregator=fedekd.functional.TrimmedMean"],
        r"site 1: method\.FedeKD\.\w+\.class: expected Mean, got TrimmedMean\.",
    ),
    "method": (["--method=FML"], r"site 1: method\.FML"),
    "seed": (["--seed=1"], r"site 1: seed: expected 0, got 1\."),
    "rounds": (["--rounds=3"], r"site 1: rounds: expected 2, got 3\."),
    "epochs": (["--client.local_epochs=2"], r"site 1: local_epochs: expected 1, got 2\."),
    "scheduler": (
        ["--client.scheduler=StepLR", "--client.scheduler.step_size=1"],
        r"site 1: scheduler: expected None, got .*StepLR.*",
    ),
    "clipping": (["--trainer.gradient_clip_val=1"], r"site 1: gradient_clip_val: expected None, got 1\.0\."),
    "round": (["--select_round=best"], r"site 1: select_round: expected None, got best\."),
    "task": (["--task=regression"], r"site 1: classes: expected 3, got 1\."),
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_serve_site_with_other_config_is_rejected_before_training(what: str, sites: Sites) -> None:
    other, message = DIFFERENT[what]
    sites.start(1, options=other)
    with pytest.raises(UserError, match=f"{message}.* Use the same options") as caught:
        serve(sites.grid, Settings(tuple(sites.options), NUM_SITES, wait=0.0))
    assert "\n" not in str(caught.value)
    assert {request.metadata.message_type for request in sites.grid.requests} == {DESCRIBE}
    assert not any(sites.versions(number) for number in range(NUM_SITES))


def test_require_agreement_other_version_names_fix(options: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    method, _, spec = build(options)
    expected = shared_config(method, spec)
    monkeypatch.setattr(fedekd, "__version__", "0.0.7")
    message = r"site 2: fedekd: expected .*, got 0\.0\.7\. Install the same version of fedekd"
    with pytest.raises(UserError, match=message):
        require_agreement(all_descriptions(options)[2], expected)


def test_require_agreement_other_channels_raises(
    options: list[str], write_blobs: Callable[..., Path], tmp_path: Path
) -> None:
    method, _, spec = build(options)
    path = write_blobs(tmp_path / "colour.npz", channels=3)
    with pytest.raises(UserError, match=r"site 0: input_shape.0: expected 1, got 3"):
        require_agreement(all_descriptions([*options, f"--data.dataset={path}"])[0], shared_config(method, spec))


def test_require_consistent_sites_other_number_of_classes_raises(options: list[str]) -> None:
    descriptions = all_descriptions([*options, "--task=regression"])  # one output, whatever the number of classes
    require_consistent_sites(descriptions)
    descriptions[2]["class_counts"].append(0)
    with pytest.raises(UserError, match=r"site 2: expected 3 classes, as at site 0, got 4\. Set --data\.num_classes"):
        require_consistent_sites(descriptions)


@pytest.mark.parametrize(
    "site_options",
    [
        ["--client.private_model=torchvision.models.resnet18"],
        ["--client.private_models=[PrivateCNN, ProxyCNN]"],
        ["--client.exits=2"],
        ["--trainer.threads=2"],
        ["--data.root=elsewhere"],
    ],
)
def test_require_agreement_other_private_model_or_machine_passes(site_options: list[str], options: list[str]) -> None:
    method, _, spec = build(options)
    require_agreement(all_descriptions([*options, *site_options])[0], shared_config(method, spec))


@pytest.mark.parametrize(
    "name",
    [
        "FedeKD",
        "FML",
        "FedKD",
        "FedType",
        "ProxyEnsemble",
        "FedAvg",
        "FedProx",
        "FedPer",
        "FedRep",
        "Ditto",
        "FedDyn",
        "Local",
    ],
)
def test_require_agreement_same_options_pass_for_each_method(name: str, options: list[str]) -> None:
    method, _, spec = build([*options, f"--method={name}"])
    for description in all_descriptions([*options, f"--method={name}"]):
        require_agreement(description, shared_config(method, spec))
