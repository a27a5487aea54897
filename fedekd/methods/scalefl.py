"""ScaleFL: clients hold parts of a model in depth and width, taught by their deepest exit (Ilhan et al., CVPR 2023)."""

from __future__ import annotations

from typing import Literal, cast

from torch import nn

from fedekd.errors import UserError
from fedekd.methods.client import Client
from fedekd.methods.submodels import NestedFedAvg
from fedekd.models import MultiExitNetwork
from fedekd.modules import LossTerm, SelfDistillationLoss, SupervisedLoss
from fedekd.modules.losses.exits import require_at_least_0, require_temperature

#: What is meant as a whole number of rounds may lie a rounding error above it.
_ROUNDING = 1e-9


class ScaleFL(NestedFedAvg):
    r"""Clients of unlike depth and width, averaged weight by weight; a client's deepest exit teaches the others.

    A client of d exits minimises, the second term once a share of the rounds is over,

    $$\sum_e w_e\, \mathrm{CE}_e + \gamma \sum_{e < d} w_e\, T^2\, \mathrm{KL}(\mathrm{sg}\,p_d^T \,\|\, p_e^T),
    \qquad w_e = \frac{2 e}{d (d + 1)}.$$

    Args:
        distillation_weight: gamma, at least 0. The authors' code averages the divergence over the classes, too: its
            gamma of 1 is 0.1 here for ten classes.
        temperature: T, above 0.
        warm_up: Exits learn from the labels alone for this share of the rounds, from 0 to 1.
        weights: uniform counts every client alike, samples by its training samples.
    """

    def __init__(
        self,
        distillation_weight: float = 0.1,
        temperature: float = 3.0,
        warm_up: float = 0.25,
        weights: Literal["uniform", "samples"] = "uniform",
    ) -> None:
        super().__init__(weights)
        if not 0 <= warm_up <= 1:
            raise UserError(f"method.warm_up is {warm_up}, and must be from 0 to 1")
        require_at_least_0(**{"method.distillation_weight": distillation_weight})
        require_temperature(temperature, "method.temperature")
        self.distillation_weight, self.temperature, self.warm_up = distillation_weight, temperature, warm_up

    def objectives(self, client: Client, network: nn.Module, round_idx: int) -> list[LossTerm]:
        """Cross-entropy, the deeper the heavier, and what the deepest exit teaches."""
        exits = cast(MultiExitNetwork, network).num_exits
        weights = [2 * place / (exits * (exits + 1)) for place in range(1, exits + 1)]
        found: list[LossTerm] = [SupervisedLoss(client.spec.task, weights)]
        if self.distillation_weight and round_idx >= self.warm_up * client.spec.rounds - _ROUNDING:
            found.append(SelfDistillationLoss(self.distillation_weight, self.temperature, weights))
        return found
