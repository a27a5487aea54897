"""DepthFL: clients hold as many stages as they can compute; their exits teach each other (Kim et al., ICLR 2023)."""

from __future__ import annotations

import math
from typing import Literal

from torch import nn

from fedekd.errors import UserError
from fedekd.methods.client import Client
from fedekd.methods.submodels import NestedFedAvg
from fedekd.modules import LossTerm, MutualExitLoss, SupervisedLoss
from fedekd.modules.losses.exits import require_at_least_0


class DepthFL(NestedFedAvg):
    r"""Clients of unlike depth, averaged stage by stage; within a client every exit learns from all others.

    A client of d exits minimises, with a weight that rises over the first rounds,

    $$\frac1d \sum_e \Big[\mathrm{CE}_e + \frac{\lambda_t}{d - 1} \sum_{j \ne e}
    \mathrm{KL}(\mathrm{sg}\,p_j \,\|\, p_e)\Big], \qquad \lambda_t = \lambda\, e^{-5 (1 - \min(1, t / (r T)))^2}.$$

    The paper's loss is d times this one; so divided, a learning rate means what it means for the other methods. The
    paper trains with FedDyn or FedAvg; this is FedAvg.

    Args:
        distillation_weight: lambda, at least 0.
        ramp_up: r, the share of the T rounds over which the weight rises, from 0 to 1.
        weights: uniform counts every client alike, samples by its training samples.
    """

    def __init__(
        self,
        distillation_weight: float = 1.0,
        ramp_up: float = 0.3,
        weights: Literal["uniform", "samples"] = "uniform",
    ) -> None:
        super().__init__(weights)
        if not 0 <= ramp_up <= 1:
            raise UserError(f"method.ramp_up is {ramp_up}, and must be from 0 to 1")
        require_at_least_0(**{"method.distillation_weight": distillation_weight})
        self.distillation_weight, self.ramp_up = distillation_weight, ramp_up

    def weight_in(self, round_idx: int, rounds: int) -> float:
        """lambda_t in round t + 1 of T."""
        rising = self.ramp_up * rounds
        missing = 1.0 - min(1.0, round_idx / rising) if rising else 0.0
        return self.distillation_weight * math.exp(-5.0 * missing**2)

    def objectives(self, client: Client, network: nn.Module, round_idx: int) -> list[LossTerm]:
        """Cross-entropy at all exits, and what they learn from each other."""
        found: list[LossTerm] = [SupervisedLoss(client.spec.task)]
        if self.distillation_weight:
            found.append(MutualExitLoss(self.weight_in(round_idx, client.spec.rounds)))
        return found
