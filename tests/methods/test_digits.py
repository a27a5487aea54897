"""Every method on scikit-learn's digits, in each task that it supports."""

from __future__ import annotations

import math

import pytest

from fedekd.data import FederatedDataModule
from fedekd.federation import RoundOptions
from fedekd.metrics import primary_metric

from .conftest import Federate
from .test_methods import CASES, METHODS, small_client


@pytest.mark.slow
@pytest.mark.parametrize(("name", "task"), CASES)
def test_method_runs_on_digits(name: str, task: str, federate: Federate) -> None:
    data = FederatedDataModule("digits", num_clients=3, alpha=5.0, batch_size=128, task=task)  # type: ignore[arg-type]
    client = small_client(name)
    summary = federate(METHODS[name](), data=data, client=client, rounds=RoundOptions(rounds=1)).run()
    assert summary["dataset"] == "digits"
    assert summary["metric"] == primary_metric(task).name  # type: ignore[arg-type]
    assert all(math.isfinite(entry["score"]) and math.isfinite(entry["local"]) for entry in summary["clients"])
