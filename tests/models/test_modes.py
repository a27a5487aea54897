"""Evaluation mode for a while leaves no trace."""

from __future__ import annotations

from contextlib import suppress

import pytest
import torch
from torch import nn

from fedekd.models import eval_mode


class Merging(nn.Module):
    """Adds its low-rank part to its weight for evaluation, and takes it out again for training."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.low_rank = torch.zeros(3), torch.ones(3)

    def train(self, mode: bool = True) -> Merging:
        if mode != self.training:
            self.weight += -self.low_rank if mode else self.low_rank
        return super().train(mode)


@pytest.mark.parametrize("training", [True, False])
def test_a_network_that_does_more_than_set_a_flag_is_restored(training: bool) -> None:
    network = nn.Sequential(Merging(), nn.Dropout()).train(training)
    before = network[0].weight.clone()
    with eval_mode(network):
        assert not any(part.training for part in network.modules())
        assert torch.equal(network[0].weight, torch.ones(3))
    assert all(part.training == training for part in network.modules())
    assert torch.equal(network[0].weight, before)


@pytest.mark.parametrize("frozen", [0, 1])
def test_parts_in_another_mode_keep_it(frozen: int) -> None:
    network = nn.Sequential(nn.BatchNorm1d(2), nn.Dropout())
    network[frozen].eval()
    with suppress(ValueError), eval_mode(network):
        assert not network[1 - frozen].training
        raise ValueError("it fails")
    assert network.training
    assert (network[frozen].training, network[1 - frozen].training) == (False, True)
