"""SafeKD against Local: the selected policy, rows of a small run, and its repetition."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from experiments.safe_exits import __main__ as experiment
from experiments.safe_exits.measures import FILES, TARGET_RISKS, largest_saving
from fedekd.early_exit import ExitPolicy
from fedekd.early_exit.scoring import ExitOutputs
from fedekd.models import ExitCosts

COSTS = ExitCosts(stages=(10, 90), heads=(1, 1), proxy=0)


def outputs(samples: int = 400) -> ExitOutputs:
    """Outputs of two exits; the first is right for most confident images only."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (samples,), generator=generator)
    logits = torch.randn(samples, 2, 3, generator=generator)
    logits[torch.arange(samples), 0, labels] += 2.0
    logits[torch.arange(samples), 1, labels] += 4.0
    return ExitOutputs(logits, labels)


def policy(threshold: float) -> ExitPolicy:
    return ExitPolicy((threshold, -math.inf), (threshold, -math.inf), (True, False), 0.05, 0.9, "ltt")


@pytest.mark.parametrize("loss", [0.0, 0.005, 0.02, 0.5])
def test_largest_saving_equals_literal_search(loss: float) -> None:
    part = outputs()
    thresholds = [0.4, 0.6, 0.8, 0.9, 0.95, 0.98, 0.995, math.inf]
    confidence, correct = part.logits[:, 0].softmax(1).amax(1).double(), part.correct
    allowed = {}
    for threshold in thresholds:
        takes = confidence >= threshold
        accuracy = (correct[takes, 0].sum() + correct[~takes, 1].sum()).item() / len(part)
        costs = [11 / 101, 1.0 if threshold == math.inf else 102 / 101]  # a closed exit is not evaluated
        cost = (takes.sum() * costs[0] + (~takes).sum() * costs[1]).item() / len(part)
        if accuracy >= correct[:, 1].double().mean().item() - loss - 1e-9 and cost < 1:
            allowed[threshold] = cost
    found = largest_saving([policy(threshold) for threshold in thresholds], part, COSTS, loss)
    assert (None if found is None else found.thresholds[0]) == min(allowed, key=allowed.__getitem__, default=None)


def test_main_measures_both_networks_once_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = tmp_path / "results"
    argv = [
        "--datasets",
        "digits",
        "--models",
        "PrivateCNN",
        "--seeds",
        "1",
        "--epochs",
        "1",
        "--max_samples",
        "400",
        "--corrupted",
        "20",
    ]
    argv += ["--batches", "2", "--output", str(tmp_path / "runs"), "--results", str(results)]
    experiment.main(argv)
    frames = {name: pd.read_csv(results / f"{name}.csv") for name in FILES}
    counts = {"exits": 3, "policies": len(TARGET_RISKS), "corruptions": 30, "networks": 1}
    for name, frame in frames.items():
        assert frame["method"].value_counts().to_dict() == {"SafeKD": counts[name], "Local": counts[name]}
    exits = frames["exits"]
    assert exits[["ece", "scaled_ece"]].stack().between(0, 1).all()
    assert exits.groupby("method")["share"].sum().tolist() == pytest.approx([1, 1])
    assert {"area", "saved_0.0", "change_0.5"} <= {*frames["networks"]}

    def fail(*arguments: Any) -> int:
        raise AssertionError("trained again")

    monkeypatch.setattr("experiments.hospital_runs.fedekd", fail)
    before = (results / "networks.csv").read_bytes()
    experiment.main(argv)
    assert (results / "networks.csv").read_bytes() == before
    networks = frames["networks"]
    networks[networks["method"] == "Local"].to_csv(results / "networks.csv", index=False)  # killed before the last row
    experiment.main(argv)
    again = pd.read_csv(results / "exits.csv")
    pd.testing.assert_frame_equal(again.drop(columns="commit"), exits.drop(columns="commit"))
    assert len(pd.read_csv(results / "networks.csv")) == 2


def test_differences_pair_seeds() -> None:
    setting = {"dataset": "digits", "model": "PrivateCNN", "samples": 0, "epochs": 2, "corrupted": 0, "batches": 0}
    rows = [
        {**setting, "method": method, "seed": seed, **dict.fromkeys(experiment.PRINTED, gain * (1 + seed))}
        for method, gain in (("SafeKD", 0.3), ("Local", 0.1))
        for seed in range(3)
    ]
    [row] = experiment.differences(pd.DataFrame(rows[:2] + rows[3:])).to_dict("records")
    assert row["seeds"] == 2
    assert row["area"] == "+0.3000 (0.1000)"
