"""A site tells how many samples of what, and the server can do with that what it does with the samples."""

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
from fedekd.flower.description import SPLITS, SiteData, describe, recipe, require_agreement
from fedekd.flower.messages import HELLO

from .conftest import NODES, SITES, Hospitals, built

pytestmark = pytest.mark.flower


def told_by_all(options: list[str]) -> list[dict[str, Any]]:
    """What the sites tell, after a journey through JSON."""
    method, data, spec = built(options)
    told = [describe(method, spec, data.images, splits) for splits in data.clients]
    return list(json.loads(json.dumps(told)))


def leaves(value: Any) -> Iterator[Any]:
    """Lists as they are, and all else down to its values."""
    if isinstance(value, dict):
        for item in value.values():
            yield from leaves(item)
    else:
        yield value


def test_a_site_tells_numbers_and_neither_pixels_nor_indices(hospitals: Hospitals) -> None:
    description = hospitals.grid.nodes[NODES[1]].answer(hospitals_hello(hospitals))
    assert not description.array_records
    assert not description.metric_records
    [note] = description.config_records.values()
    told = json.loads(str(note["json"]))
    assert set(told) == {"number", "recipe", "sizes", "class_counts", "digest"}
    assert set(told["sizes"]) == set(SPLITS)
    assert re.fullmatch("[0-9a-f]{64}", told["digest"])
    method, _, spec = built(hospitals.options)
    assert told.pop("recipe") == json.loads(json.dumps(recipe(method, spec)))  # which the server has of itself
    assert [leaf for leaf in leaves(told) if isinstance(leaf, list)] == [told["class_counts"]]
    assert len(told["class_counts"]) == 3
    assert sum(told["class_counts"]) == told["sizes"]["train"] + told["sizes"]["validation"] + told["sizes"]["test"]
    longest = max(len(leaf) for leaf in leaves(told) if isinstance(leaf, str))
    assert longest == 64  # nothing is hidden in a text: the digest is the longest


def hospitals_hello(hospitals: Hospitals) -> Any:
    """The message with which a server asks who is there."""
    hospitals.server()
    return next(message for message in hospitals.grid.sent if message.metadata.message_type == HELLO)


def test_other_pixels_change_the_digest_and_nothing_else(options: list[str]) -> None:
    method, data, spec = built(options)
    splits = data.clients[0]
    before = describe(method, spec, data.images, splits)
    data.images.pixels[splits.test[0], 0, 0, 0] += 1
    after = describe(method, spec, data.images, splits)
    assert before.pop("digest") != after.pop("digest")
    assert before == after


@pytest.mark.parametrize("task", ["classification", "regression"])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_server_knows_what_the_data_would_have_told(
    task: str, channels: int, options: list[str], write_blobs: Callable[..., Path], tmp_path: Path
) -> None:
    path = write_blobs(tmp_path / "images.npz", 90, channels=channels, num_classes=4, seed=3)
    chosen = [*options, f"--data.dataset={path}", f"--task={task}"]
    _, data, _ = built(chosen)
    known = SiteData("images", data.alpha, told_by_all(chosen), data.batch_size, data.eval_batch_size)
    known.prepare_data()
    known.setup()
    assert known.task == data.task == task
    for name in ("num_classes", "in_channels", "image_size", "num_outputs", "task"):
        assert getattr(known.images, name) == getattr(data.images, name), name
    assert known.images.targets.dtype == data.images.targets.dtype
    assert len(known.images) == 0
    assert (known.num_clients, known.alpha) == (SITES, 1.0)
    assert known.num_classes == 4
    np.testing.assert_array_equal(known.class_counts(), data.class_counts())
    assert known.class_counts().dtype == data.class_counts().dtype
    for site, client in zip(known.clients, data.clients, strict=True):
        assert site.client == client.client
        assert len(site) == len(client)
        assert site.digest(known.images) == client.digest(data.images)
        assert {s: len(getattr(site, s)) for s in SPLITS} == {s: len(getattr(client, s)) for s in SPLITS}
        assert not any(getattr(site, split).any() for split in SPLITS)


def test_a_class_that_a_site_has_not_counts_too(options: list[str]) -> None:
    method, data, spec = built([*options, "--data.num_classes=7"])
    assert describe(method, spec, data.images, data.clients[0])["class_counts"][3:] == [0, 0, 0, 0]


DIFFERENT = {
    "classes": (["--data.num_classes=7"], r"site 1 has classes 7, and the federation 3"),
    "proxy": (
        ["--client.proxy_model=fedekd.models.PrivateCNN"],
        r"site 1 has proxy\.convolutions\.0\.bias \(64,\) torch\.float32, and the federation \(32,\) torch\.float32",
    ),
    "proxy's precision": (
        ["--trainer.precision=64-true"],
        r"site 1 has proxy\.convolutions\.0\.bias \(32,\) torch\.float64, and the federation \(32,\) torch\.float32",
    ),
    "argument": (["--method.beta=0.25"], r"site 1 has method\.FedeKD\.beta 0\.25, and the federation 1\.0"),
    "nested argument": (
        ["--method.aggregator=fedekd.functional.TrimmedMean"],
        r"site 1 has method\.FedeKD\.merge\.class TrimmedMean, and the federation Mean",
    ),
    "method": (["--method=FML"], r"site 1 has method\.FML "),
    "seed": (["--seed=1"], r"site 1 has seed 1, and the federation 0"),
    "rounds": (["--rounds=3"], r"site 1 has rounds 3, and the federation 2"),
    "epochs": (["--client.local_epochs=2"], r"site 1 has local_epochs 2, and the federation 1"),
    "task": (["--task=regression"], r"site 1 has classes 1, and the federation 3"),
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_what_differs_is_named_with_its_site(what: str, options: list[str]) -> None:
    other, words = DIFFERENT[what]
    method, _, spec = built(options)
    with pytest.raises(UserError, match=words) as caught:
        require_agreement(told_by_all([*options, *other])[1], recipe(method, spec))
    assert "\n" not in str(caught.value)
    assert "install" not in str(caught.value)


def test_another_version_says_what_to_do(options: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    method, _, spec = built(options)
    ours = recipe(method, spec)
    monkeypatch.setattr(fedekd, "__version__", "0.0.7")
    with pytest.raises(UserError, match=r"site 2 has fedekd 0\.0\.7, and the federation .*; install the same version"):
        require_agreement(told_by_all(options)[2], ours)


def test_images_of_another_size_are_named(options: list[str], write_blobs: Callable[..., Path], tmp_path: Path) -> None:
    method, _, spec = built(options)
    path = write_blobs(tmp_path / "colour.npz", channels=3)
    with pytest.raises(UserError, match="site 0 has channels 3, and the federation 1"):
        require_agreement(told_by_all([*options, f"--data.dataset={path}"])[0], recipe(method, spec))


@pytest.mark.parametrize(
    "own",
    [
        ["--client.private_model=torchvision.models.resnet18"],
        ["--client.private_models=[PrivateCNN, ProxyCNN]"],
        ["--client.exits=2"],
        ["--trainer.threads=2"],
        ["--data.root=elsewhere"],
    ],
)
def test_private_models_and_machines_may_differ(own: list[str], options: list[str]) -> None:
    method, _, spec = built(options)
    require_agreement(told_by_all([*options, *own])[0], recipe(method, spec))


@pytest.mark.parametrize(
    "name", ["FedeKD", "FML", "FedKD", "FedType", "FedAvg", "FedProx", "FedPer", "FedRep", "Ditto", "FedDyn", "Local"]
)
def test_every_method_agrees_with_itself(name: str, options: list[str]) -> None:
    method, _, spec = built([*options, f"--method={name}"])
    ours = recipe(method, spec)
    for description in told_by_all([*options, f"--method={name}"]):
        require_agreement(description, ours)


@pytest.mark.parametrize("what", DIFFERENT)
def test_a_server_refuses_a_site_before_the_first_round(what: str, hospitals: Hospitals) -> None:
    other, words = DIFFERENT[what]
    hospitals.open(1, options=other)
    with pytest.raises(UserError, match=words):
        serve(hospitals.grid, Settings(tuple(hospitals.options), SITES, wait=0.0))
    assert {message.metadata.message_type for message in hospitals.grid.sent} == {HELLO}
    assert not any(hospitals.versions(number) for number in range(SITES))
