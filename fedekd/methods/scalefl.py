"""ScaleFL (Ilhan et al., CVPR 2023)."""

from __future__ import annotations

from typing import Literal, cast

from torch import nn

from fedekd.errors import require
from fedekd.methods.client import Client
from fedekd.methods.submodel_fedavg import SubmodelFedAvg
from fedekd.models import MultiExitNetwork
from fedekd.modules import LossTerm, SelfDistillationLoss, SupervisedLoss
from fedekd.modules.losses import require_nonnegative, require_temperature

#: A product that should be a whole number of rounds may exceed it by a rounding error.
_ROUNDING = 1e-9


class ScaleFL(SubmodelFedAvg):
    r"""ScaleFL: clients hold different depths and widths of one network.

    A client's deepest exit teaches its other exits. A client with d exits minimises, the second term only after a
    fraction `warm_up` of the rounds,

    $$\sum_e w_e\, \mathrm{CE}_e + \gamma \sum_{e < d} w_e\, T^2\, \mathrm{KL}(\mathrm{sg}\,p_d^T \,\|\, p_e^T),
    \qquad w_e = \frac{2 e}{d (d + 1)}.$$

    Args:
        distillation_weight: gamma, at least 0. The authors' code also averages the divergence over the classes: its
            gamma of 1 is 0.1 here for ten classes.
        temperature: T, above 0.
        warm_up: Fraction of the rounds in which exits learn only from labels, in [0, 1].
        weights: `uniform`, or `samples` to weight clients by their training samples.

    Raises:
        UserError: If a value is out of range.

    Reference:
        Ilhan et al., ScaleFL: Resource-Adaptive Federated Learning with Heterogeneous Clients, CVPR 2023.
    """

    def __init__(
        self,
        distillation_weight: float = 0.1,
        temperature: float = 3.0,
        warm_up: float = 0.25,
        weights: Literal["uniform", "samples"] = "uniform",
    ) -> None:
        super().__init__(weights)
        require(0 <= warm_up <= 1, "method.warm_up", "a number in [0, 1]", warm_up)
        require_nonnegative("method.distillation_weight", distillation_weight)
        require_temperature(temperature, "method.temperature")
        self.distillation_weight, self.temperature, self.warm_up = distillation_weight, temperature, warm_up

    def loss_terms(self, client: Client, network: nn.Module, round_idx: int) -> list[LossTerm]:
        """Return the depth-weighted cross-entropy and the self-distillation."""
        exits = cast(MultiExitNetwork, network).num_exits
        weights = [2 * number / (exits * (exits + 1)) for number in range(1, exits + 1)]
        terms: list[LossTerm] = [SupervisedLoss(client.spec.task, weights)]
        if self.distillation_weight and round_idx >= self.warm_up * client.spec.rounds - _ROUNDING:
            terms.append(SelfDistillationLoss(self.distillation_weight, self.temperature, weights))
        return terms
