"""What all tests share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from fedekd.data import FederatedDataModule


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
    for name, part in (("train", slice(0, third)), ("val", slice(third, third)), ("test", slice(third, None))):
        arrays[f"{name}_images"] = images[part].astype(np.uint8)
        arrays[f"{name}_labels"] = labels[part, None].astype(np.uint8)
    np.savez(path, **arrays)
    return path


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
