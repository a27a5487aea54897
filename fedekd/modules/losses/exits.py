"""The terms of a loss that need several exits: those of SAFE-KD (arXiv 2602.03043), and DepthFL's."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, stack

from fedekd import functional as F
from fedekd.errors import UserError
from fedekd.modules.losses.distillation import Record, weighted_exit_loss
from fedekd.modules.prediction import ModelOutput


class DKDLoss:
    r"""$a \sum_e w_e\, \mathrm{DKD}(\text{teacher} \to e)$: every exit learns from the teacher's last one.

    Args:
        weight: a, at least 0.
        alpha: Weight of the target's term in `fedekd.functional.decoupled_distillation`, at least 0.
        beta: Weight of the other classes' term, at least 0.
        temperature: T, above 0.
        exit_weights: $w_e$; None weighs all exits alike, 1 / E each.

    Attributes:
        warmth: A factor in [0, 1] that whoever trains may raise over the first epochs.
    """

    name = "distilled"

    def __init__(
        self,
        weight: float = 1.0,
        alpha: float = 1.0,
        beta: float = 8.0,
        temperature: float = 4.0,
        exit_weights: Sequence[float] | None = None,
    ) -> None:
        require_at_least_0(distillation_weight=weight, dkd_alpha=alpha, dkd_beta=beta)
        require_temperature(temperature)
        self.weight, self.alpha, self.beta, self.temperature = weight, alpha, beta, temperature
        self.exit_weights = exit_weights
        self.warmup_factor = 1.0

    def __call__(self, student: ModelOutput, teacher: ModelOutput | None, targets: Tensor, record: Record) -> Tensor:
        """The mean over the batch."""
        assert teacher is not None

        def loss(logits: Tensor) -> Tensor:
            return F.decoupled_distillation(
                logits, teacher.output, targets, self.alpha, self.beta, self.temperature
            ).mean()

        return self.warmup_factor * self.weight * weighted_exit_loss(student.exits, loss, self.exit_weights)


class SelfDistillationLoss:
    r"""$b \sum_{e<E} w_e\, T^2\, \mathrm{KL}(\mathrm{sg}\,p_E^T \,\|\, p_e^T)$: shallow exits learn from the deepest.

    Args:
        weight: b, at least 0.
        temperature: T, above 0.
        exit_weights: $w_e$, of all E exits; None weighs all alike, 1 / E each.
    """

    name = "consistency"

    def __init__(
        self, weight: float = 1.0, temperature: float = 4.0, exit_weights: Sequence[float] | None = None
    ) -> None:
        require_at_least_0(consistency_weight=weight)
        require_temperature(temperature)
        self.weight, self.temperature, self.exit_weights = weight, temperature, exit_weights

    def __call__(self, student: ModelOutput, teacher: ModelOutput | None, targets: Tensor, record: Record) -> Tensor:
        """The mean over the batch; 0 for a network of one exit."""
        deepest, exits = student.output.detach(), len(student.exits)
        if exits == 1:
            return deepest.new_zeros(())

        def loss(logits: Tensor) -> Tensor:
            return F.kl_distillation(logits, deepest, self.temperature).mean()

        weights = [1.0 / exits] * exits if self.exit_weights is None else self.exit_weights
        return self.weight * weighted_exit_loss(student.exits[:-1], loss, weights[:-1])


class MutualExitLoss:
    r"""$\lambda \frac{1}{E (E - 1)} \sum_e \sum_{j \ne e} \mathrm{KL}(\mathrm{sg}\,p_j \,\|\, p_e)$.

    Every exit learns from all others: DepthFL's self-distillation (Kim et al., ICLR 2023), over the number of exits.

    Args:
        weight: lambda, at least 0.
    """

    name = "mutual"

    def __init__(self, weight: float = 1.0) -> None:
        require_at_least_0(distillation_weight=weight)
        self.weight = weight

    def __call__(self, student: ModelOutput, teacher: ModelOutput | None, targets: Tensor, record: Record) -> Tensor:
        """The mean over the batch; 0 for a network of one exit."""
        exits = student.exits
        if len(exits) == 1:
            return exits[0].new_zeros(())
        pairs = [
            F.kl_distillation(learner, other.detach()).mean()
            for place, learner in enumerate(exits)
            for number, other in enumerate(exits)
            if number != place
        ]
        return self.weight * stack(pairs).mean()


def require_temperature(temperature: float, name: str = "temperature") -> None:
    """Hold a temperature to be a finite number above 0.

    Raises:
        UserError: If it is not.
    """
    if not 0 < temperature < math.inf:
        raise UserError(f"{name} is {temperature}, and must be a finite number above 0")


def require_exit_weights(weights: Sequence[float], exits: int) -> None:
    """Hold the weights of exits to be one for each, at least 0, and not all 0.

    Raises:
        UserError: If they are not.
    """
    if len(weights) != exits:
        raise UserError(f"exit_weights has {len(weights)} numbers, and the network has {exits} exits")
    if not all(0 <= weight < math.inf for weight in weights) or not any(weights):
        raise UserError(f"exit_weights is {list(weights)}, and must hold finite numbers of at least 0, not all 0")


def require_at_least_0(**values: float) -> None:
    """Hold weights, by what they are called, to be finite numbers of at least 0.

    Raises:
        UserError: If one is not.
    """
    for name, value in values.items():
        if not 0 <= value < math.inf:
            raise UserError(f"{name} is {value}, and must be a finite number of at least 0")
