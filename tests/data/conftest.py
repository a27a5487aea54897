"""Small data files that the tests of this folder write."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedekd.data import Samples

WriteNpz = Callable[..., Path]


@pytest.fixture
def write_npz(tmp_path: Path) -> WriteNpz:
    """Write NAME.npz in MedMNIST's layout: split sizes, random pixels, labels 0..classes-1 in turn."""

    def write(
        name: str = "tiny",
        sizes: tuple[int, int, int] = (30, 0, 12),
        shape: tuple[int, ...] = (8, 8),
        classes: int = 3,
        **replaced: Any,
    ) -> Path:
        rng = np.random.default_rng(0)
        arrays: dict[str, Any] = {}
        for split, size in zip(("train", "val", "test"), sizes, strict=True):
            arrays[f"{split}_images"] = rng.integers(0, 256, (size, *shape), dtype=np.uint8)
            arrays[f"{split}_labels"] = (np.arange(size) % classes).astype(np.uint8)[:, None]
        arrays.update(replaced)
        path = tmp_path / f"{name}.npz"
        np.savez(path, **{key: value for key, value in arrays.items() if value is not None})
        return path

    return write


@pytest.fixture
def blobs() -> Samples:
    """120 images of three grades; the brightness of an image tells one of two clusters."""
    rng = np.random.default_rng(1)
    bright = np.arange(120) % 2
    images = (rng.integers(0, 40, (120, 8, 8)) + 200 * bright[:, None, None]).astype(np.uint8)
    labels = np.arange(120) % 3
    return Samples.from_arrays("blobs", images, labels, "regression", 3)
