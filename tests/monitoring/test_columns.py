"""Columns of outputs that are not finite."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from fedekd.monitoring import MonitoredColumns

NAN, INF = math.nan, math.inf


class Fixed(nn.Module):
    """Network with the same output for every input."""

    def __init__(self, output: list[float]) -> None:
        super().__init__()
        self.output = nn.Parameter(torch.tensor([output]))

    def forward(self, x: Tensor) -> Tensor:
        return self.output.expand(len(x), -1)


def columns(task: str, deployed: list[float], proxy: list[float], local: list[float]) -> dict[str, list]:
    network = Fixed(deployed)
    client = SimpleNamespace(
        deployed_model=network,
        spec=SimpleNamespace(task=task),
        networks={"private": network, "proxy": Fixed(proxy)},
        in_target_unit=lambda output: output,
    )
    found = MonitoredColumns(client, Fixed(local)).of_batch(torch.zeros(1, 3))
    return {name: values[0] for name, values in found.items() if name not in ("sample", "model")}


@pytest.mark.parametrize("value", [NAN, INF])
def test_monitored_columns_of_classes_not_finite_are_wrong(value: float) -> None:
    assert columns("classification", [value, 1.0], [0.0, 0.0], [0.0, 9.0]) == {
        "policy": "none",
        "confidence": 0.0,
        "disagreement": 1.0,
        "label_federated": -1,
        "label_local": 1,
    }


def test_monitored_columns_of_values_not_finite_are_infinite() -> None:
    found = columns("regression", [2.0], [NAN], [NAN])
    assert found == {
        "policy": "none",
        "value_last": 2.0,
        "disagreement": INF,
        "value_federated": 2.0,
        "value_local": INF,
    }
