"""Real-valued targets: standardised in training, scored in their own unit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from fedekd.data import ClientSplits, Samples
from fedekd.methods import Client, ClientOptions

from .conftest import make_spec


def make_client(num_classes: int, shift: float = 100.0, scale: float = 10.0) -> Client:
    inputs = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
    samples = Samples("values", inputs, 100 + 10 * inputs[:, 0], "regression", num_classes)
    parts = [torch.arange(4), torch.arange(4, 6), torch.arange(6, 8), *[torch.empty(0, dtype=torch.int64)] * 3]
    splits = ClientSplits(0, *parts, target_shift=shift, target_scale=scale)
    model = {"class_path": "torch.nn.Linear", "init_args": {"in_features": 5, "out_features": 1}}
    options: Any = ClientOptions(private_model=model)
    spec = make_spec(task="regression", input_shape=(5,), num_outputs=1, client=options)
    client = Client(0, splits, samples, replace(spec, client=options))
    with torch.no_grad():
        client.networks["private"].weight.zero_()[0, 0] = 1.0  # the standardised target
        client.networks["private"].bias.zero_()
    return client


def test_client_real_targets_are_standardised_and_scored_in_their_unit() -> None:
    client = make_client(num_classes=0)
    assert torch.allclose(client.training_targets, client.samples.inputs[:, 0], atol=1e-5)
    assert client.score("test") == pytest.approx(0.0, abs=1e-4)
    client.networks["private"].bias.data.fill_(1.0)
    assert client.score("test") == pytest.approx(10.0, abs=1e-3)
    assert client.held_out("test")[0].tolist() == pytest.approx([100.0, 100.0], abs=1e-2)


def test_client_large_real_targets_differ_after_standardisation() -> None:
    client = make_client(num_classes=0, shift=1_600_000_000.0, scale=2.0)
    times = torch.arange(8, dtype=torch.float64) + 1_600_000_000
    client.samples = replace(client.samples, targets=times)
    assert client.training_targets.dtype == torch.float32
    assert client.training_targets.tolist() == [number / 2 for number in range(8)]


def test_client_grades_are_unchanged() -> None:
    client = make_client(num_classes=5)
    assert client.training_targets is client.samples.targets
    outputs = torch.ones(2, 1)
    assert client.in_target_unit(outputs) is outputs
