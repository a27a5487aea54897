"""The same samples in every format give the same data and the same run, byte for byte."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedekd.cli import main
from fedekd.data import load_samples

CLASSES = ("ant", "bee", "cat")
FAST = [
    *("--client.local_epochs=1", "--trainer.accelerator=cpu", "--trainer.threads=1", "--logger=null", "--quiet"),
    *("--data.batch_size=16", "--rounds=2"),
]


def write_site(folder: Path, seed: int, size: int = 60) -> None:
    """Write the same images as FOLDER/, FOLDER.csv and FOLDER.npz."""
    rng = np.random.default_rng(seed)
    labels = np.sort(np.arange(size) % 3)
    images = (rng.integers(0, 80, (size, 9, 8)) + 80 * labels[:, None, None]).astype(np.uint8)
    lines = ["path,label"]
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        path = folder / CLASSES[label] / f"{index:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
        lines.append(f"{path},{CLASSES[label]}")  # absolute: the manifest is linked below
    folder.with_suffix(".csv").write_text("\n".join(lines))
    np.savez(folder.with_suffix(".npz"), images=images, labels=labels, class_names=np.array(CLASSES))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undrawn: None) -> Path:
    for seed, name in enumerate(("a", "b", "c")):
        write_site(tmp_path / name, seed)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_one_data_set_in_every_format_gives_the_same_metrics(here: Path) -> None:
    options = ["--data.num_clients=2", "--data.alpha=50", "--data.image_size=8"]
    metrics, digests = [], []
    for source in ("a", "a.csv", "a.npz"):
        digests.append(load_samples(source, image_size=8).digest())
        assert main(["fit", *FAST, *options, f"--data.dataset={source}", f"--output=run-{source}"]) == 0
        metrics.append(Path(f"run-{source}/metrics.csv").read_bytes())
    assert digests[0] == digests[1] == digests[2]
    assert metrics[0] == metrics[1] == metrics[2]


def test_sites_of_three_formats_give_the_same_metrics(here: Path) -> None:
    kinds = {"same": ("", "", ""), "mixed": ("", ".csv", ".npz"), "other": (".npz", "", ".csv")}
    metrics = []
    for kind, suffixes in kinds.items():
        (here / kind).mkdir()
        for name, suffix in zip(("a", "b", "c"), suffixes, strict=True):
            os.symlink(here / f"{name}{suffix}", here / kind / f"{name}{suffix}")
        assert main(["fit", *FAST, f"--data.sites={kind}", f"--output=run-{kind}"]) == 0
        metrics.append(Path(f"run-{kind}/metrics.csv").read_bytes())
    assert metrics[0] == metrics[1] == metrics[2]
    with Path("run-same/metrics.csv").open(newline="") as file:
        assert any("client_a" in name for name in next(csv.reader(file)))
