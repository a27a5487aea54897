"""FedProx (Li et al., MLSys 2020)."""

from __future__ import annotations

from typing import Literal

from torch import nn

from fedekd.functional import Aggregator
from fedekd.methods.client import Client
from fedekd.methods.fedavg import FedAvg
from fedekd.modules import LossTerm, ProximalPenalty
from fedekd.modules.losses import copy_parameters, require_nonnegative


class FedProx(FedAvg):
    r"""FedProx: FedAvg with a proximal term that keeps clients near the global model.

    A client minimises $L_k(\theta) + \frac{\mu}{2} \|\theta - \theta^t\|^2$, with $\theta^t$ the global model it
    received.

    Args:
        mu: Weight of the proximal term, at least 0; 0 is FedAvg, bit for bit.
        weights: `uniform`, or `samples` to weight clients by their training samples.
        aggregator: Another aggregator, by class_path; null is the mean with `weights`.
        finetune_epochs: Epochs of local training after the last round, at least 0. Local has no such epochs.
        finetune_lr_factor: Factor of the learning rate in these epochs, above 0.

    Raises:
        UserError: If `mu` or `finetune_epochs` is negative, or `finetune_lr_factor` not above 0.

    Reference:
        Li et al., Federated Optimization in Heterogeneous Networks, MLSys 2020, Eq. 2.
    """

    def __init__(
        self,
        mu: float = 0.01,
        weights: Literal["uniform", "samples"] = "uniform",
        aggregator: Aggregator | None = None,
        finetune_epochs: int = 0,
        finetune_lr_factor: float = 1.0,
    ) -> None:
        super().__init__(weights, aggregator, finetune_epochs, finetune_lr_factor)
        require_nonnegative("method.mu", mu)
        self.mu = mu

    def loss_terms(self, client: Client, network: nn.Module, round_idx: int) -> list[LossTerm]:
        """Return L_k and the proximal term."""
        terms = super().loss_terms(client, network, round_idx)
        return [*terms, ProximalPenalty(network, copy_parameters(network), self.mu)] if self.mu else terms
