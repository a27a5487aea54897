"""Fixtures of all tests."""

from __future__ import annotations

import gc
import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings

from fedekd.data import FederatedDataModule
from fedekd.federation import RoundOptions, RunFolder

settings.register_profile("fedekd", deadline=None)  # a busy machine must not fail a test
settings.load_profile("fedekd")


def pytest_collection_finish() -> None:
    """Freeze imported objects: collections at the end of each round skip them."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """Unfreeze: extension modules warn at exit about frozen objects."""
    gc.unfreeze()


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let runs draw no figures, which takes longer than training on 100 images."""
    monkeypatch.setattr(RunFolder, "write_figures", lambda *arguments: None)


@pytest.fixture(autouse=True)
def saved_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Save every round: tests stop runs whose rounds take milliseconds."""
    monkeypatch.setattr(RoundOptions, "is_save_due", lambda *arguments: True)


@pytest.fixture(autouse=True)
def quiet_wandb(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep W&B offline: no test may use the network."""
    monkeypatch.setenv("WANDB_MODE", "offline")


@pytest.fixture(autouse=True)
def seed_torch() -> None:
    """Seed every test alike: its random numbers must not depend on the tests before it in the same process."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Use one thread: small tensors gain nothing from more, and tests run in parallel."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def write_npz(path: Path, num_samples: int = 120, channels: int = 1, num_classes: int = 3, seed: int = 0) -> Path:
    """Write a small data set in MedMNIST's layout with separable classes."""
    rng = np.random.default_rng(seed)
    labels = np.arange(num_samples) % num_classes
    shape = (num_samples, 8, 8) if channels == 1 else (num_samples, 8, 8, channels)
    images = rng.integers(0, 80, shape) + (labels * 80).reshape(-1, *[1] * (len(shape) - 1))
    third = num_samples // 3
    arrays = {}
    for name, part in (
        ("train", slice(0, third)),
        ("val", slice(third, third)),
        ("test", slice(third, None)),
    ):
        arrays[f"{name}_images"] = images[part].astype(np.uint8)
        arrays[f"{name}_labels"] = labels[part, None].astype(np.uint8)
    np.savez(path, **arrays)
    return path


@pytest.fixture(scope="session")
def write_blobs() -> Callable[..., Path]:
    """Return `write_npz`."""
    return write_npz


@pytest.fixture
def error_line(capsys: pytest.CaptureFixture[str]) -> Callable[[], str]:
    """Return what was printed on stderr, which must be one line that starts with `error: `."""

    def read() -> str:
        text = capsys.readouterr().err
        assert text.startswith("error: "), text
        assert text.count("\n") == 1, text
        return text

    return read


@pytest.fixture
def npz(tmp_path: Path) -> Path:
    """The path of a small data set."""
    return write_npz(tmp_path / "blobs.npz")


@pytest.fixture
def blobs(npz: Path) -> FederatedDataModule:
    """Three clients of a small data set."""
    return FederatedDataModule(str(npz), num_clients=3, alpha=1.0, batch_size=8)


@pytest.fixture
def blob_grades(npz: Path) -> FederatedDataModule:
    """Three clients of a small regression data set."""
    return FederatedDataModule(str(npz), num_clients=3, alpha=5.0, batch_size=8, task="regression")


_BLOCK, _FRAME_HEADER, _FILE_HEADER = 32768, 7, 7
_FULL, _LAST = 1, 4


def _records(file: Path) -> Iterator[Any]:
    """Yield the records of a .wandb file: a header, then frames of LevelDB's log in blocks of 32 KiB."""
    from wandb.proto import wandb_internal_pb2

    data = file.read_bytes()
    position, record = _FILE_HEADER, b""
    while position + _FRAME_HEADER <= len(data):
        left = _BLOCK - position % _BLOCK
        if left < _FRAME_HEADER:  # padding: no room for the header of a frame
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        position += _FRAME_HEADER
        record += data[position : position + length]
        position += length
        if kind in (_FULL, _LAST):
            yield wandb_internal_pb2.Record.FromString(record)
            record = b""


def _run_folders(save_dir: Path) -> list[Path]:
    return sorted((save_dir / "wandb").glob("offline-run-*"))


@pytest.fixture
def run_folders() -> Callable[[Path], list[Path]]:
    """Return a function that lists the offline runs in a folder."""
    return _run_folders


@pytest.fixture
def read_history() -> Callable[[Path], list[dict[str, Any]]]:
    """Return a reader of the rows of an offline run, without W&B's own keys such as `_step`."""

    def read(folder: Path) -> list[dict[str, Any]]:
        rows = []
        for record in _records(next(folder.glob("*.wandb"))):
            if record.WhichOneof("record_type") == "history":
                items = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
                rows.append({name: json.loads(text) for name, text in items.items() if name[0] != "_"})
        return rows

    return read


@pytest.fixture
def read_records() -> Callable[[Path, str], list[Any]]:
    """Return a reader of all records of one kind in an offline run."""

    def read(folder: Path, kind: str) -> list[Any]:
        records = _records(next(folder.glob("*.wandb")))
        return [getattr(record, kind) for record in records if record.WhichOneof("record_type") == kind]

    return read
