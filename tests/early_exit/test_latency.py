from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from fedekd.early_exit import ExitPolicy, Latency, measure_latency, network_fingerprint
from fedekd.errors import UserError
from fedekd.models import PrivateCNN, multi_exit


def test_measure_latency_returns_one_entry_per_batch_size():
    network = multi_exit(PrivateCNN(1, 8, 3), 3, 2).train()
    shapes = []
    network.stages[0].register_forward_hook(lambda stage, inputs, output: shapes.append(inputs[0].shape[0]))
    policy = ExitPolicy(
        (0.0, -math.inf), (0.0, -math.inf), (False, False), 0.05, 0.9, "ltt", network=network_fingerprint(network)
    )
    entries = measure_latency(network, policy, torch.randn(5, 1, 8, 8), batch_sizes=(1, 8), batches=3)
    assert [entry.batch_size for entry in entries] == [1, 8]
    assert all(isinstance(entry, Latency) for entry in entries)
    assert all(0 < entry.ratio < math.inf for entry in entries)
    assert all(0 <= entry.error < math.inf for entry in entries)
    # Alternating full and early; two pairs for warm-up; images are used cyclically; 20 times as many single images.
    assert shapes == [1] * 2 * (2 + 60) + [8] * 2 * (2 + 3)
    assert network.training
    assert network_fingerprint(network) == policy.network


def test_measure_latency_other_network_raises():
    network = multi_exit(PrivateCNN(1, 8, 3), 3, 2)
    policy = ExitPolicy((0.5, -math.inf), (0.5, -math.inf), (False, False), 0.05, 0.9, "ltt", network="ab" * 32)
    network.stages[0] = nn.Identity()
    with pytest.raises(UserError, match="calibrate this one"):
        measure_latency(network, policy, torch.zeros(1, 1, 8, 8), (1,), 1)
