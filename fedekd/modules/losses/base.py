"""Protocol of a loss term, the weighting of exits, and the supervised loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from fedekd.errors import require
from fedekd.functional import upcast_to_float32
from fedekd.modules.prediction import ModelOutput
from fedekd.tasks import Task

Record = Callable[[str, Tensor], None]
"""`record(name, value)` logs the mean over the epoch of a batch's scalar `value`."""


class LossTerm(Protocol):
    """One summand of a loss: any object with a `name` that is called per batch.

    Attributes:
        name: Name in the logs, as in `loss/supervised`.

    Example:
        >>> class Sparsity:
        ...     name = "sparsity"
        ...
        ...     def __call__(self, student, teacher, targets, record):
        ...         return 1e-3 * student.output.abs().mean()
    """

    name: str

    def __call__(self, student: ModelOutput, teacher: ModelOutput | None, targets: Tensor, record: Record) -> Tensor:
        """Compute the term for one batch.

        Args:
            student: Outputs of the trained network for B samples.
            teacher: Outputs of the frozen teacher; None without a teacher.
            targets: Class indices or real targets, shape (B,).
            record: Logs further scalars of the batch.

        Returns:
            A scalar.
        """
        ...


def weighted_exit_loss(
    exits: Sequence[Tensor], loss: Callable[[Tensor], Tensor], weights: Sequence[float] | None = None
) -> Tensor:
    r"""Compute $\sum_e w_e\, \ell(z_e)$ over the outputs of a network's exits.

    Args:
        exits: $z_e$, one tensor per exit.
        loss: $\ell$, from one exit's output to a scalar.
        weights: $w_e$; None weights all E exits by 1 / E. An exit of weight 0 is skipped: its head gets no gradient
            instead of a zero gradient.

    Raises:
        UserError: If the numbers of weights and exits differ.
    """
    if weights is None:
        if len(exits) == 1:
            return loss(exits[0])
        weights = [1.0 / len(exits)] * len(exits)
    require(len(weights) == len(exits), "exit_weights", f"{len(exits)} weights, one per exit", weights)
    terms = [weight * loss(output) for weight, output in zip(weights, exits, strict=True) if weight]
    return torch.stack(terms).sum() if terms else exits[0].new_zeros(())


class SupervisedLoss:
    r"""Supervised loss of all exits.

    $$L_{sup} = \sum_e w_e\, \mathrm{mean}_i\, \ell(z_{e,i}, y_i)$$

    The per-sample loss is cross-entropy for classification and the squared error for regression. With class weights,
    the mean over the batch is the weighted one of `torch.nn.functional.cross_entropy`.

    Args:
        task: `classification` or `regression`.
        exit_weights: $w_e$, one per exit; None weights all E exits by 1 / E.
        offset: Added to every output, shape (C,): the log prior of the classes makes the loss that of a balanced
            predictor (logit adjustment, Menon et al., ICLR 2021). None (the default) adds nothing.

    Attributes:
        class_weights: Weight of each class in the mean, shape (C,); None (the default) weights all samples equally.
    """

    name = "supervised"
    class_weights: Tensor | None = None

    def __init__(self, task: Task, exit_weights: Sequence[float] | None = None, offset: Tensor | None = None) -> None:
        self.task, self.exit_weights, self.offset = task, exit_weights, offset

    def __call__(self, student: ModelOutput, teacher: ModelOutput | None, targets: Tensor, record: Record) -> Tensor:
        """Compute the mean over the batch."""

        def loss(output: Tensor) -> Tensor:
            output = upcast_to_float32(output)
            if self.offset is not None:
                output = output + self.offset.to(output)
            if self.task == "regression":
                return torch.nn.functional.mse_loss(output, targets.to(output.dtype).reshape(output.shape))
            weight = None if self.class_weights is None else self.class_weights.to(output)
            return torch.nn.functional.cross_entropy(output, targets, weight=weight)

        return weighted_exit_loss(student.exits, loss, self.exit_weights)
