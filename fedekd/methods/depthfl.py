"""DepthFL (Kim et al., ICLR 2023)."""

from __future__ import annotations

import math
from typing import Literal

from torch import nn

from fedekd.errors import require
from fedekd.methods.client import Client
from fedekd.methods.submodel_fedavg import SubmodelFedAvg
from fedekd.modules import LossTerm, MutualExitLoss, SupervisedLoss
from fedekd.modules.losses import require_nonnegative


class DepthFL(SubmodelFedAvg):
    r"""DepthFL: clients hold different depths of one network, averaged per stage.

    The exits of a client distil each other. A client with d exits minimises, with a weight that rises over the first
    rounds,

    $$\frac1d \sum_e \Big[\mathrm{CE}_e + \frac{\lambda_t}{d - 1} \sum_{j \ne e}
    \mathrm{KL}(\mathrm{sg}\,p_j \,\|\, p_e)\Big], \qquad \lambda_t = \lambda\, e^{-5 (1 - \min(1, t / (r T)))^2}.$$

    The paper's loss is d times this loss; the division makes learning rates comparable with those of other methods. The
    paper aggregates by FedDyn or FedAvg, this class by FedAvg.

    Args:
        distillation_weight: lambda, at least 0.
        ramp_up: r, fraction of the T rounds over which the weight rises, in [0, 1].
        weights: `uniform`, or `samples` to weight clients by their training samples.

    Raises:
        UserError: If a value is out of range.

    Reference:
        Kim et al., DepthFL: Depthwise Federated Learning for Heterogeneous Clients, ICLR 2023.
    """

    def __init__(
        self,
        distillation_weight: float = 1.0,
        ramp_up: float = 0.3,
        weights: Literal["uniform", "samples"] = "uniform",
    ) -> None:
        super().__init__(weights)
        require(0 <= ramp_up <= 1, "method.ramp_up", "a number in [0, 1]", ramp_up)
        require_nonnegative("method.distillation_weight", distillation_weight)
        self.distillation_weight, self.ramp_up = distillation_weight, ramp_up

    def distillation_weight_at(self, round_idx: int, rounds: int) -> float:
        """Return lambda_t in round t + 1 of T."""
        ramp_rounds = self.ramp_up * rounds
        remaining = 1.0 - min(1.0, round_idx / ramp_rounds) if ramp_rounds else 0.0
        return self.distillation_weight * math.exp(-5.0 * remaining**2)

    def loss_terms(self, client: Client, network: nn.Module, round_idx: int) -> list[LossTerm]:
        """Return the cross-entropy and the mutual distillation of all exits."""
        terms: list[LossTerm] = [SupervisedLoss(client.spec.task)]
        if self.distillation_weight:
            terms.append(MutualExitLoss(self.distillation_weight_at(round_idx, client.spec.rounds)))
        return terms
