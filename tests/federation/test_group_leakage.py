"""Scans of one patient in training and test raise a score; groups prevent it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fedekd.configuration.options import parts_of
from fedekd.data import FederatedDataModule
from fedekd.federation import Orchestrator

PATIENTS, SCANS, CLASSES = 800, 10, 10
OPTIONS = (
    *("--data.num_clients=2", "--data.partition=iid", "--rounds=1", "--client.local_epochs=8", "--method=Local"),
    *("--client.private_model=ProxyCNN", "--client.optimizer.lr=2e-3"),
    *("--trainer.precision=32-true", "--trainer.accelerator=cpu"),
)


def write_scans(path: Path, seed: int) -> None:
    """Write 10 near-copies of an image per patient, with one random label per patient."""
    rng = np.random.default_rng(seed)
    patient = rng.permutation(np.repeat(np.arange(PATIENTS), SCANS))
    images = rng.integers(30, 226, (PATIENTS, 8, 8))[patient] + rng.normal(0, 6, (len(patient), 8, 8))
    labels = rng.integers(0, CLASSES, PATIENTS)[patient]
    np.savez(path, images=np.clip(images, 0, 255).astype(np.uint8), labels=labels, patient=patient)


def run(path: Path, *options: str) -> tuple[FederatedDataModule, float]:
    """Return the data and the mean test accuracy of the local models."""
    parts = parts_of([*OPTIONS, f"--data.dataset={path}", *options])
    return parts["data"], Orchestrator(**parts).run()["mean"]


@pytest.mark.slow
def test_random_labels_give_chance_accuracy_with_groups_only(tmp_path: Path) -> None:
    write_scans(tmp_path / "scans.npz", seed=0)
    grouped, accuracy = run(tmp_path / "scans.npz", "--data.group_column=patient")
    assert not [line for line in grouped.warnings() if "near-copies" in line]
    assert abs(accuracy - 1 / CLASSES) <= 0.03
    plain, accuracy = run(tmp_path / "scans.npz")
    assert [line for line in plain.warnings() if "near-copies" in line]
    assert accuracy > 0.5
