from __future__ import annotations

import os
import pickle
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule
from PIL import Image

from fedekd.data import (
    FederatedDataModule,
    StoredInputs,
    StoredPart,
    TensorBatches,
    build_transform,
    load_samples,
    split_inputs,
)
from fedekd.errors import UserError
from tests.data.user_data import Blobs, Labelled, Marked, Mixed, Module, Noisy, Pictures, Triples

PIXELS = torch.stack([Blobs()[index][0] for index in range(60)])
FLIP = {"class_path": "RandomHorizontalFlip"}


def stored(items: Any = None, workers: int = 0) -> StoredInputs:
    return StoredInputs([StoredPart(Blobs() if items is None else items, "site 'a'", is_pair=True)], workers)


@pytest.fixture
def inputs(request: pytest.FixtureRequest) -> Iterator[StoredInputs]:
    made = stored(workers=getattr(request, "param", 0))
    yield made
    made.close()


def batches(inputs: Any, transform: Any = None, epochs: int = 2, **options: Any) -> list[torch.Tensor]:
    """Inputs and targets of all batches of some epochs."""
    made = TensorBatches(
        inputs,
        torch.arange(60),
        torch.arange(0, 60, 2),
        8,
        generator=lambda epoch: torch.Generator().manual_seed(epoch),
        transform=None if transform is None else build_transform(transform),
        **options,
    )
    return [item for _ in range(epochs) for batch in made for item in batch]


def equal(one: list[torch.Tensor], two: list[torch.Tensor]) -> bool:
    return len(one) == len(two) > 0 and all(map(torch.equal, one, two))


def test_stored_inputs_have_the_properties_of_a_tensor(inputs: StoredInputs) -> None:
    assert inputs.shape == PIXELS.shape
    assert (inputs.dtype, inputs.device, len(inputs)) == (PIXELS.dtype, PIXELS.device, 60)
    index = torch.tensor([59, 0, 7])
    assert torch.equal(inputs[index], PIXELS[index])
    assert torch.equal(inputs.take(np.arange(60) > 55)[torch.tensor([1])], PIXELS[[57]])
    assert torch.equal(torch.cat(list(split_inputs(inputs.take(index), 2))), PIXELS[index])
    assert inputs[torch.empty(0, dtype=torch.int64)].shape == (0, 1, 8, 8)


@pytest.mark.parametrize("transform", [None, FLIP, {"class_path": "tests.data.user_data.Halve"}])
@pytest.mark.parametrize("inputs", [0, 1, 3], indirect=True)
def test_batches_stored_equal_resident(inputs: StoredInputs, transform: Any) -> None:
    assert equal(batches(inputs, transform), batches(PIXELS, transform))


@pytest.mark.parametrize("inputs", [0, 2], indirect=True)
def test_batches_stored_leave_global_generators(inputs: StoredInputs) -> None:
    torch.manual_seed(1)
    np.random.seed(1)
    expected = torch.rand(1), np.random.rand()
    torch.manual_seed(1)
    np.random.seed(1)
    batches(inputs, FLIP)
    assert (torch.rand(1), np.random.rand()) == expected


def test_batches_random_items_do_not_depend_on_workers() -> None:
    made = [stored(Noisy(), workers) for workers in (0, 2)]
    try:
        one, two = (batches(inputs) for inputs in made)
    finally:
        made[1].close()
    assert equal(one, two)


@pytest.mark.parametrize("inputs", [2], indirect=True)
def test_workers_persist_over_epochs_and_end_with_close(inputs: StoredInputs) -> None:
    batches(inputs)
    processes = inputs._workers[0].loader._iterator._workers  # type: ignore[union-attr]
    batches(inputs.to(torch.device("cpu")))
    assert [process.pid for process in processes] == [
        process.pid
        for process in inputs._workers[0].loader._iterator._workers  # type: ignore[union-attr]
    ]
    inputs.close()
    assert not any(process.is_alive() for process in processes)
    assert equal(batches(inputs), batches(PIXELS))  # they start again


@pytest.mark.parametrize("inputs", [2], indirect=True)
def test_pass_that_stops_early_leaves_no_batch_for_the_next(inputs: StoredInputs) -> None:
    next(inputs.batches(torch.arange(60).split(4)))  # type: ignore[no-untyped-call]
    assert equal(batches(inputs), batches(PIXELS))
    outer = inputs.batches(torch.arange(60).split(20))  # type: ignore[no-untyped-call]
    assert torch.equal(next(outer), PIXELS[:20])
    assert equal(batches(inputs), batches(PIXELS))  # within another pass
    assert torch.equal(torch.cat(list(outer)), PIXELS[20:])


@pytest.mark.parametrize("transform", [None, FLIP])
@pytest.mark.parametrize("inputs", [0, 2], indirect=True)
def test_batches_empty_index_has_no_sample(inputs: StoredInputs, transform: Any) -> None:
    built = None if transform is None else build_transform(transform)
    parts = [torch.empty(0, dtype=torch.int64), torch.tensor([3])]
    read = [tuple(batch.shape) for batch in inputs.batches(parts, [0, 0], built)]
    assert read == [(0, 1, 8, 8), (1, 1, 8, 8)]
    assert inputs.digest(parts[0]) == inputs.digest(parts[0]) != inputs.digest(parts[1])


class Untested(Module):
    """Has no validation loader."""

    val_dataloader = LightningDataModule.val_dataloader


@pytest.mark.parametrize(
    ("site", "options"),
    [
        (Blobs(), {"fractions": (0.8, 0.0, 0.2)}),
        (Untested(), {"splits": "given"}),
        (Labelled(), {"group_column": "halves"}),
    ],
)
def test_stored_site_without_validation_has_loaders_and_a_digest(site: Any, options: dict[str, Any]) -> None:
    site.halves = [index // 30 for index in range(60)]  # two groups, of which one is training and one test
    data = FederatedDataModule(sites={"a": site}, num_workers=0, **options)
    [splits] = data.clients
    assert len(splits.validation) == 0 < min(len(splits.train), len(splits.test))
    assert list(data.val_dataloader()) == []
    assert len(splits.digest(data.samples)) == len(splits.validation_digest(data.samples)) == 64


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("items", "message"),
    [
        (Blobs(wrong=31), "site 'a': expected to read sample 31. It failed: OSError: file 31 is truncated"),
        (Mixed(), r"site 'a': expected inputs \(1, 8, 8\), torch.uint8, as sample 0, got \(1, 6, 8\)"),
    ],
)
def test_batches_unreadable_sample_is_named(items: Any, message: str, workers: int) -> None:
    inputs = stored(items, workers)
    try:
        with pytest.raises(UserError, match=f"^{message}") as caught:
            list(split_inputs(inputs, 4))
    finally:
        inputs.close()
    assert "\n" not in str(caught.value)


def test_stored_inputs_require_pairs_and_equal_shapes() -> None:
    with pytest.raises(UserError, match=r"^site 'a': expected items \(input, label\), got a tuple as sample 0"):
        stored(Triples())
    with pytest.raises(UserError, match=r"^site 'b': .* as sample 0 of site 'a', got \(3, 8, 8\)"):
        StoredInputs([StoredPart(Blobs(), "site 'a'", "", True), StoredPart(Pictures(), "site 'b'", "", True)])
    with pytest.raises(UserError, match=r"^site 'c': expected at least one sample, got none"):
        StoredInputs([StoredPart(Blobs(0), "site 'c'")])


def test_stored_inputs_pictures_become_channels_first() -> None:
    x = stored(Pictures())[torch.tensor([5])]
    assert torch.equal(x, PIXELS[[5]].expand(-1, 3, -1, -1))


def test_stored_inputs_are_pickled_without_workers() -> None:
    inputs = stored(workers=1)
    batches(inputs)
    copy = pickle.loads(pickle.dumps(inputs))
    inputs.close()
    assert torch.equal(copy[torch.arange(3)], PIXELS[:3])


def test_digest_reads_few_samples_and_depends_on_source_and_content() -> None:
    def digest(items: Any, index: torch.Tensor | None = None, identity: str = "") -> bytes:
        inputs = StoredInputs([StoredPart(items, "site 'a'", identity, True)])
        return inputs.digest(torch.arange(40) if index is None else index)

    first = digest(Blobs())
    assert digest(Blobs()) == first
    others = [
        digest(Blobs(seed=1)),
        digest(Blobs(61)),
        digest(Blobs(), identity="seed=0"),
        digest(Blobs(), torch.arange(1, 41)),
    ]
    assert first not in others
    assert len({*others}) == len(others)


def test_digest_of_many_samples_reads_64(tmp_path: Path) -> None:
    inputs = stored(Marked(str(tmp_path), 1000))
    inputs.digest(torch.arange(900))
    assert len((tmp_path / "reads.txt").read_text().splitlines()) <= 2 + 64


def test_workers_end_with_a_killed_parent(tmp_path: Path) -> None:
    pid = os.fork()
    if pid == 0:
        inputs = stored(workers=2)
        read = inputs.batches(torch.arange(60).split(4))  # type: ignore[no-untyped-call]
        next(read)
        pids = [str(process.pid) for process in inputs._workers[0].loader._iterator._workers]  # type: ignore[union-attr]
        (tmp_path / "draft").write_text(" ".join(pids))
        (tmp_path / "draft").rename(tmp_path / "pids")
        time.sleep(60)
        os._exit(0)
    while not (tmp_path / "pids").exists():
        time.sleep(0.05)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    deadline = time.monotonic() + 5
    while any(map(_is_running, (tmp_path / "pids").read_text().split())):
        assert time.monotonic() < deadline, "a worker outlived its parent"
        time.sleep(0.05)


def _is_running(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_images_above_the_memory_limit_equal_resident_ones(tmp_path: Path) -> None:
    for index in range(6):
        path = tmp_path / "images" / str(index % 3) / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(index).integers(0, 256, (8, 9, 3), dtype=np.uint8)).save(path)
    resident = load_samples(str(tmp_path / "images"))
    stored = load_samples(str(tmp_path / "images"), memory_limit=0.0)
    assert isinstance(stored.inputs, StoredInputs)
    assert torch.equal(stored.inputs[torch.arange(6)], cast(torch.Tensor, resident.inputs))
    assert torch.equal(stored.targets, resident.targets)
    few = load_samples(str(tmp_path / "images"), memory_limit=0.0, ignore_label=1)
    assert len(few.inputs) == len(few) == 4
    before = stored.digest()
    assert load_samples(str(tmp_path / "images"), memory_limit=0.0).digest() == before


def test_digest_of_image_files_depends_on_names_and_edits_that_are_not_read(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for index in range(100):
        path = tmp_path / "images" / f"class{index % 2}" / f"{index:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(path)

    def digest() -> str:
        return load_samples(str(tmp_path / "images"), memory_limit=0.0).digest()

    before = digest()
    assert digest() == before
    edited = tmp_path / "images/class0/002.png"
    content, times = edited.read_bytes(), edited.stat()
    edited.write_bytes(content)
    os.utime(edited, ns=(times.st_atime_ns, times.st_mtime_ns + 1))
    assert digest() != before
    os.utime(edited, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert digest() == before
    edited.rename(edited.with_name("003.png"))  # of equal length, in the same order
    assert digest() != before


def test_adopted_stored_samples_are_read_by_the_workers_of_the_option() -> None:
    samples = load_samples(sites={"a": Blobs()})
    data = FederatedDataModule(sites={"a": Blobs()}, num_workers=3)
    data.adopt(samples)
    assert isinstance(data.samples.inputs, StoredInputs)
    assert data.samples.inputs.num_workers == 3
