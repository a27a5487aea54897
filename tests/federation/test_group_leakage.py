"""Scans of one patient in training and test raise a score; groups prevent it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from fedekd.configuration.options import parts_of
from fedekd.data import FederatedDataModule, Samples
from fedekd.federation import Orchestrator

PATIENTS, SCANS, CLASSES = 800, 10, 10
OPTIONS = (
    *("--data.dataset=scans", "--data.num_clients=2", "--data.partition=iid", "--rounds=1", "--client.local_epochs=8"),
    *(
        "--method=Local",
        "--client.private_model=ProxyCNN",
        "--client.optimizer.lr=2e-3",
        "--trainer.precision=32-true",
        "--trainer.accelerator=cpu",
    ),
)


def scans(seed: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return 10 near-copies of an image per patient, one random label per patient, and the patients."""
    rng = np.random.default_rng(seed)
    patient = rng.permutation(np.repeat(np.arange(PATIENTS), SCANS))
    images = rng.integers(30, 226, (PATIENTS, 8, 8))[patient] + rng.normal(0, 6, (len(patient), 8, 8))
    return np.clip(images, 0, 255).astype(np.uint8), rng.integers(0, CLASSES, PATIENTS)[patient], patient


def run(folder: Path, seed: int, with_groups: bool) -> tuple[FederatedDataModule, float]:
    """Return the data and the mean test accuracy of the local baselines."""
    images, labels, patient = scans(seed)
    group = torch.from_numpy(patient) if with_groups else None
    parts = parts_of([*OPTIONS, f"--seed={seed}"])
    parts["data"].adopt(Samples.from_arrays("scans", images, labels, "classification", CLASSES, group=group))
    summary = Orchestrator(**parts, output=folder).run()
    return parts["data"], summary["local_mean"]


@pytest.mark.slow
def test_random_labels_give_chance_accuracy_with_groups_only(tmp_path: Path) -> None:
    grouped, accuracy = run(tmp_path / "grouped", 0, with_groups=True)
    assert not [line for line in grouped.warnings() if "near-copies" in line]
    assert abs(accuracy - 1 / CLASSES) <= 0.03
    plain, accuracy = run(tmp_path / "plain", 0, with_groups=False)
    assert [line for line in plain.warnings() if "near-copies" in line]
    assert accuracy > 0.5
