"""What a report on exits takes for its samples."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fedekd.data import FederatedDataModule
from fedekd.early_exit.report import exit_report
from fedekd.early_exit.report.exit_report import ReportOptions, make_exit_report
from fedekd.federation import Orchestrator, RoundOptions
from fedekd.methods import ClientOptions, SafeKD
from fedekd.modules import TrainerFactory


@pytest.fixture
def client(tmp_path: Path, write_blobs: Callable[..., Path]) -> Any:
    """Create one client with 300 images, sorted by class."""
    npz = write_blobs(tmp_path / "blobs.npz", num_samples=300)
    run = Orchestrator(
        SafeKD(),
        FederatedDataModule(str(npz), num_clients=1, partition="iid"),
        client=ClientOptions(local_epochs=1, exits=2),
        trainer=TrainerFactory(accelerator="cpu", threads=1, precision="32-true"),
        rounds=RoundOptions(rounds=1),
    )
    return run.engine.client(0)  # type: ignore[attr-defined]


def test_corruptions_use_images_spread_over_each_split(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    received = []

    def spy(network: Any, policy: Any, costs: Any, *parts: Any) -> list[Any]:
        received.extend(parts)
        return []

    monkeypatch.setattr(exit_report, "evaluate_corruptions", spy)
    make_exit_report({"SafeKD": client}, ReportOptions(draws=1, corrupted=15, batches=0, target_risks=(0.1,)))
    splits = [client.splits.tuning, client.splits.calibration, client.splits.test]
    for part, split in zip(received, splits, strict=True):
        assert len(part.images) == 15
        # The first and the last are there, and no two neighbours lie far apart.
        assert torch.equal(part.images[0], client.samples.inputs[split[0]])
        assert torch.equal(part.images[-1], client.samples.inputs[split[-1]])


def test_policies_equal_calibrate_client(client: Any) -> None:
    from fedekd.early_exit import SelectiveRiskCalibrator
    from fedekd.early_exit.client_calibration import calibrate_client

    report = make_exit_report(
        {"SafeKD": client}, ReportOptions(draws=1, corrupted=0, batches=0, target_risks=(0.1, 0.4))
    )
    for line in report.policies:
        assert line.policy == calibrate_client(client, SelectiveRiskCalibrator(line.policy.target_risk, 0.9))
