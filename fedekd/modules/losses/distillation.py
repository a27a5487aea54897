"""The terms of which a loss is the sum. Each is a small object over `fedekd.functional`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor

from fedekd import functional as F
from fedekd.errors import UserError, nearest
from fedekd.modules.energies import Energy
from fedekd.modules.prediction import ModelOutput
from fedekd.tasks import Task

Record = Callable[[str, Tensor], None]
Gate = Literal["energy", "shuffled", "none"]


class LossTerm(Protocol):
    """One term of a loss.

    Attributes:
        name: Its name in the logs, as in `loss/supervised`.
    """

    name: str

    def __call__(self, student: ModelOutput, teacher: ModelOutput | None, targets: Tensor, record: Record) -> Tensor:
        """The term's value, a scalar; `record(name, value)` notes what else is worth knowing of the batch."""
        ...


def per_sample_distillation(task: Task, student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """The distillation loss (B,) of the task: KL(teacher || student) T^2, or the squared error."""
    if task == "regression":
        return F.squared_error_distillation(student, teacher)
    return F.kl_distillation(student, teacher, temperature)


def weighted_exit_loss(
    exits: Sequence[Tensor], loss: Callable[[Tensor], Tensor], weights: Sequence[float] | None = None
) -> Tensor:
    r"""$\sum_e w_e\, \ell(z_e)$ over the outputs of a network's exits.

    Args:
        exits: $z_e$, one tensor per exit.
        loss: Gives a scalar for each.
        weights: $w_e$; None weighs all E exits alike, 1 / E each: a plain network's loss is what it always was. An
            exit of weight 0 is left out: its head gets no gradient, not one of zeros.

    Raises:
        UserError: If there is not one weight for each exit.
    """
    if weights is None:
        if len(exits) == 1:
            return loss(exits[0])
        weights = [1.0 / len(exits)] * len(exits)
    if len(weights) != len(exits):
        raise UserError(f"exit_weights has {len(weights)} numbers, and the network has {len(exits)} exits")
    terms = [weight * loss(output) for weight, output in zip(weights, exits, strict=True) if weight]
    return torch.stack(terms).sum() if terms else exits[0].new_zeros(())


class SupervisedLoss:
    """L_sup: cross-entropy for classification, mean squared error for regression; of several exits, weighted.

    Args:
        task: Decides which.
        exit_weights: One weight an exit; None weighs all E exits alike, 1 / E each.
    """

    name = "supervised"

    def __init__(self, task: Task, exit_weights: Sequence[float] | None = None) -> None:
        self.task, self.exit_weights = task, exit_weights

    def __call__(self, student: ModelOutput, teacher: ModelOutput | None, targets: Tensor, record: Record) -> Tensor:
        """The mean over the batch."""

        def loss(output: Tensor) -> Tensor:
            output = F.upcast_to_float32(output)
            if self.task == "regression":
                return torch.nn.functional.mse_loss(output, targets.to(output.dtype).reshape(output.shape))
            return torch.nn.functional.cross_entropy(output, targets)

        return weighted_exit_loss(student.exits, loss, self.exit_weights)


class DistillationLoss:
    """Plain distillation of the teacher, averaged over the batch (the forward stage of Algorithm 1)."""

    name = "distilled"

    def __init__(self, task: Task, temperature: float = 1.0) -> None:
        if not temperature > 0:
            raise UserError(f"temperature is {temperature}, and must be above 0")
        self.task, self.temperature = task, temperature

    def __call__(self, student: ModelOutput, teacher: ModelOutput | None, targets: Tensor, record: Record) -> Tensor:
        """The mean over the batch."""
        assert teacher is not None
        return per_sample_distillation(self.task, student.output, teacher.output, self.temperature).mean()


def energy_weights(energy: Tensor, beta: float) -> Tensor:
    """The gate (Eq. 3)."""
    return F.trust_weights(energy, beta)


def shuffled_weights(energy: Tensor, beta: float) -> Tensor:
    """The gate's own weights, permuted within the batch: does its ranking matter, or only its mean of 1/2?"""
    return F.trust_weights(energy, beta)[torch.randperm(len(energy), device=energy.device)]


def full_weights(energy: Tensor, beta: float) -> Tensor:
    """No gate: weight 1 for every sample."""
    return torch.ones_like(energy)


GATES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "energy": energy_weights,
    "shuffled": shuffled_weights,
    "none": full_weights,
}


class GatedDistillationLoss:
    r"""lambda_kd L_BKD: distillation of the proxy, trusted sample by sample (Eq. 3-5).

    Of a network with exits each has a gate of its own, $\lambda \sum_e v_e \cdot \mathrm{mean}_i\, w_{i,e}\,
    \mathrm{KL}(q_i \| p_{i,e})$: what one exit is still to learn of the proxy another may know better. The feature
    energy, of which there is but one a sample, gives all exits the same gate.

    Records `gate/weight_mean`, `gate/weight_std` (both within the batch) and `gate/energy_mean`; of exits before the
    last the same as `exit_1/gate/weight_mean` and so on.

    Args:
        task: Decides the distillation loss.
        energy: E(x).
        beta: Sharpness of the gate, above 0.
        lambda_kd: Weight of the term, at least 0.
        gate: `energy` is Eq. 3; `none` trusts every sample fully; `shuffled` is the control.
        exit_weights: $v_e$; None weighs all E exits alike, 1 / E each. An exit of weight 0 is left out.
    """

    name = "gated"

    def __init__(
        self,
        task: Task,
        energy: Energy,
        beta: float,
        lambda_kd: float,
        gate: Gate = "energy",
        exit_weights: Sequence[float] | None = None,
    ) -> None:
        if not beta > 0:
            raise UserError(f"beta is {beta}, and must be above 0")
        if not lambda_kd >= 0:
            raise UserError(f"lambda_kd is {lambda_kd}, and must be at least 0")
        if gate not in GATES:
            raise UserError(f"gate is {gate!r}, which is not known; {nearest(gate, GATES)}")
        self.task, self.energy, self.beta, self.lambda_kd = task, energy, beta, lambda_kd
        self.weigh, self.exit_weights = GATES[gate], exit_weights

    def __call__(self, student: ModelOutput, teacher: ModelOutput | None, targets: Tensor, record: Record) -> Tensor:
        """The weighted mean over the batch, times lambda_kd."""
        assert teacher is not None
        exits = len(student.exits)
        shares = [1.0 / exits] * exits if self.exit_weights is None else self.exit_weights
        losses: dict[int, Tensor] = {}
        for place, (output, share) in enumerate(zip(student.exits, shares, strict=True), start=1):
            if share:
                own = ModelOutput((output,), student.features)
                losses[place] = share * self._loss(own, teacher, "" if place == exits else f"exit_{place}/", record)
        total = torch.stack(list(losses.values())).sum() if len(losses) > 1 else next(iter(losses.values()))
        return self.lambda_kd * total

    def _loss(self, student: ModelOutput, teacher: ModelOutput, prefix: str, record: Record) -> Tensor:
        """The weighted mean of one exit, and what is worth knowing of its gate."""
        with torch.no_grad():
            energy = self.energy(student.detach(), teacher)
            weights = self.weigh(energy, self.beta)
        record(f"{prefix}gate/weight_mean", weights.mean())
        record(f"{prefix}gate/weight_std", weights.std(correction=0))
        record(f"{prefix}gate/energy_mean", energy.mean())
        loss = per_sample_distillation(self.task, student.output, teacher.output)
        return F.gated_distillation(loss, weights)
