"""The same labelled images in every format."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

CLASSES = ("ant", "bee", "cat")


class Written(NamedTuple):
    """Images, labels, splits and patients, in the order of the files."""

    images: Any
    labels: Any
    split: Any
    patient: Any
    folder: Path

    def source(self, kind: str) -> str:
        return str(self.folder / {"folder": "folder", "manifest": "list.csv", "npz": "all.npz", "hf": "hf"}[kind])


def write_formats(folder: Path, images: Any, labels: Any, split: Any = None, classes: Any = CLASSES) -> Written:
    """Write images as folder/, list.csv and all.npz, sorted by split and class."""
    split = np.zeros(len(labels), int) if split is None else split
    order = np.lexsort((labels, split))
    images, labels, split = images[order], labels[order], split[order]
    patient = np.array([f"p{i // 2:03d}" for i in range(len(labels))])
    rows = []
    for i, (image, label, part) in enumerate(zip(images, labels, split, strict=True)):
        path = Path("folder", ("train", "val", "test")[part], classes[label], f"{i:04d}.png")
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / path)
        rows.append((path, classes[label], ("train", "valid", "test")[part], patient[i]))
    with (folder / "list.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("path", "label", "split", "patient"), *rows])
    names = np.array(("train", "val", "test"))[split]
    np.savez(
        folder / "all.npz", images=images, labels=labels, split=names, patient=patient, class_names=np.array(classes)
    )
    return Written(images, labels, split, patient, folder)


@pytest.fixture
def written(tmp_path: Path) -> Written:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (24, 9, 8), np.uint8)
    return write_formats(tmp_path, images, np.arange(24) % 3, np.arange(24) // 3 % 3)
