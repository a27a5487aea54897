"""Distillation between exits, and from a teacher to all exits."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn, no_grad, stack

from fedekd import functional as F
from fedekd.errors import UserError
from fedekd.modules.losses.base import Record, weighted_exit_loss
from fedekd.modules.losses.checks import require_nonnegative, require_temperature
from fedekd.modules.prediction import ModelOutput


class DKDLoss:
    r"""Decoupled distillation from the teacher's last exit to every exit.

    $$a \sum_e w_e\, \mathrm{DKD}(\text{teacher} \to e)$$

    Args:
        weight: a, at least 0.
        alpha: Weight of the target term in `fedekd.functional.decoupled_distillation`, at least 0.
        beta: Weight of the non-target term, at least 0.
        temperature: T, above 0.
        exit_weights: $w_e$; None weights all E exits by 1 / E.

    Attributes:
        warmup_factor: Factor of the term in [0, 1], set by the training module (linear warm-up); 1 at first.

    Raises:
        UserError: If a value is out of range.

    Reference:
        Zhao et al., Decoupled Knowledge Distillation, CVPR 2022, Eq. 7; SAFE-KD, arXiv 2602.03043.
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
        require_nonnegative("distillation_weight", weight)
        require_nonnegative("dkd_alpha", alpha)
        require_nonnegative("dkd_beta", beta)
        require_temperature(temperature)
        self.weight, self.alpha, self.beta, self.temperature = weight, alpha, beta, temperature
        self.exit_weights = exit_weights
        self.warmup_factor = 1.0

    def __call__(self, student: ModelOutput, teacher: ModelOutput | None, targets: Tensor, record: Record) -> Tensor:
        """Compute the mean over the batch."""
        assert teacher is not None

        def loss(logits: Tensor) -> Tensor:
            return F.decoupled_distillation(
                logits, teacher.output, targets, self.alpha, self.beta, self.temperature
            ).mean()

        return self.warmup_factor * self.weight * weighted_exit_loss(student.exits, loss, self.exit_weights)


class SelfDistillationLoss:
    r"""Self-distillation from the deepest exit to the others.

    $$b \sum_{e<E} w_e\, T^2\, \mathrm{KL}(\mathrm{sg}\,p_E^T \,\|\, p_e^T)$$

    With a `teacher_head` $\tilde h$ the teacher is $\tilde p = \mathrm{softmax}(\tilde h(\mathrm{sg}\,\phi(x)))$ in
    place of $p_E$: another head on the live features, which must be part of the student's output.

    Args:
        weight: b, at least 0.
        temperature: T, above 0.
        exit_weights: $w_e$ of all E exits; None weights all by 1 / E.
        teacher_head: $\tilde h$, from features (B, F) to logits (B, C), in evaluation mode and not trained; None is the
            deepest exit.
        offset: Added to the outputs of teacher and students, shape (C,), as in `SupervisedLoss`; None adds nothing.

    Raises:
        UserError: If a value is out of range, or there are no features for the `teacher_head`.

    Reference:
        Zhang et al., Be Your Own Teacher, ICCV 2019; SAFE-KD, arXiv 2602.03043. The head: CAFEDistill, arXiv
        2601.10015.
    """

    name = "consistency"

    def __init__(
        self,
        weight: float = 1.0,
        temperature: float = 4.0,
        exit_weights: Sequence[float] | None = None,
        teacher_head: nn.Module | None = None,
        offset: Tensor | None = None,
    ) -> None:
        require_nonnegative("consistency_weight", weight)
        require_temperature(temperature)
        self.weight, self.temperature, self.exit_weights = weight, temperature, exit_weights
        self.teacher_head, self.offset = teacher_head, offset

    def __call__(self, student: ModelOutput, teacher: ModelOutput | None, targets: Tensor, record: Record) -> Tensor:
        """Compute the mean over the batch; 0 for a network with one exit."""
        exits = len(student.exits)
        if exits == 1:
            return student.output.new_zeros(())
        deepest = self._shifted(self._teacher_output(student))

        def loss(logits: Tensor) -> Tensor:
            return F.kl_distillation(self._shifted(logits), deepest, self.temperature).mean()

        weights = [1.0 / exits] * exits if self.exit_weights is None else self.exit_weights
        return self.weight * weighted_exit_loss(student.exits[:-1], loss, weights[:-1])

    def _teacher_output(self, student: ModelOutput) -> Tensor:
        if self.teacher_head is None:
            return student.output.detach()
        if student.features is None:
            raise UserError("teacher_head: expected a student output with features. Set with_features=True")
        with no_grad():
            output: Tensor = self.teacher_head(student.features.detach())
        return output

    def _shifted(self, logits: Tensor) -> Tensor:
        return logits if self.offset is None else F.upcast_to_float32(logits) + self.offset.to(logits.device)


class MutualExitLoss:
    r"""Mutual distillation: every exit learns from all others.

    $$\lambda \frac{1}{E (E - 1)} \sum_e \sum_{j \ne e} \mathrm{KL}(\mathrm{sg}\,p_j \,\|\, p_e)$$

    Args:
        weight: lambda, at least 0.

    Raises:
        UserError: If the weight is out of range.

    Reference:
        DepthFL (Kim et al., ICLR 2023); their loss divided by the number of exits.
    """

    name = "mutual"

    def __init__(self, weight: float = 1.0) -> None:
        require_nonnegative("distillation_weight", weight)
        self.weight = weight

    def __call__(self, student: ModelOutput, teacher: ModelOutput | None, targets: Tensor, record: Record) -> Tensor:
        """Compute the mean over the batch; 0 for a network with one exit."""
        exits = student.exits
        if len(exits) == 1:
            return exits[0].new_zeros(())
        pairs = [
            F.kl_distillation(learner, teacher_exit.detach()).mean()
            for learner_index, learner in enumerate(exits)
            for teacher_index, teacher_exit in enumerate(exits)
            if teacher_index != learner_index
        ]
        return self.weight * stack(pairs).mean()
