"""What all tests share."""

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

from fedekd.data import FederatedDataModule
from fedekd.federation import RunFolder


def pytest_collection_finish() -> None:
    """What has been imported stays: the collections at the end of each round need not walk it."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """Extension modules complain at exit of what is still frozen."""
    gc.unfreeze()


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs draw no figures, which takes longer than to train on a hundred images."""
    monkeypatch.setattr(RunFolder, "draw", lambda *arguments: None)


@pytest.fixture(autouse=True)
def quiet_wandb(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test may reach the network."""
    monkeypatch.setenv("WANDB_MODE", "offline")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors gain nothing from threads, and tests may run side by side."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def write_npz(path: Path, num_samples: int = 120, channels: int = 1, num_classes: int = 3, seed: int = 0) -> Path:
    """A small data set in MedMNIST's layout whose classes can be told apart."""
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
    """`write_npz`, for fixtures of other files."""
    return write_npz


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
    """The records of a .wandb file: a header, then frames as in LevelDB's log, cut at every 32 KiB."""
    from wandb.proto import wandb_internal_pb2

    data = file.read_bytes()
    position, record = _FILE_HEADER, b""
    while position + _FRAME_HEADER <= len(data):
        left = _BLOCK - position % _BLOCK
        if left < _FRAME_HEADER:  # the rest of a block that has no room for a frame's header is padding
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
    """The offline runs below a folder."""
    return _run_folders


@pytest.fixture
def read_history() -> Callable[[Path], list[dict[str, Any]]]:
    """The rows that one offline run holds, W&B's own names (`_step` and the like) left out."""

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
    """All records of one kind that one offline run holds."""

    def read(folder: Path, kind: str) -> list[Any]:
        records = _records(next(folder.glob("*.wandb")))
        return [getattr(record, kind) for record in records if record.WhichOneof("record_type") == kind]

    return read
