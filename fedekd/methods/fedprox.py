"""FedProx: FedAvg whose clients stay near the global model (Li et al., MLSys 2020)."""

from __future__ import annotations

from typing import Literal

from torch import nn

from fedekd.errors import UserError
from fedekd.functional import Aggregator
from fedekd.methods.client import Client
from fedekd.methods.fedavg import FedAvg
from fedekd.modules import LossTerm
from fedekd.modules.losses.regularizers import ProximalPenalty, trainable


class FedProx(FedAvg):
    """Each client minimises L_k(theta) + (mu / 2) ||theta - theta^t||^2, with theta^t the global model it was sent.

    Args:
        mu: Weight of the proximal term, at least 0; with 0 it is FedAvg, bit for bit.
        weights: uniform counts every client alike, samples by its training samples.
        aggregator: Another way to merge, by class_path; null takes the mean with `weights`.
        finetune_epochs: After the last round each client trains the global model on its own for so many epochs.
    """

    def __init__(
        self,
        mu: float = 0.01,
        weights: Literal["uniform", "samples"] = "uniform",
        aggregator: Aggregator | None = None,
        finetune_epochs: int = 0,
    ) -> None:
        super().__init__(weights, aggregator, finetune_epochs)
        if not mu >= 0:
            raise UserError(f"method.mu is {mu}, and must be at least 0")
        self.mu = mu

    def objectives(self, client: Client, network: nn.Module, round_idx: int) -> list[LossTerm]:
        """L_k and the proximal term."""
        objectives = super().objectives(client, network, round_idx)
        return [*objectives, ProximalPenalty(network, trainable(network), self.mu)] if self.mu else objectives
