"""The score of one client's test split: accuracy or RMSE (FedeKD Section 4.2)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torchmetrics.functional import mean_squared_error

from fedekd.tasks import Task, require_task

SCORE_NAME: dict[Task, str] = {"classification": "accuracy", "regression": "rmse"}
"""What the score of a task is called in logs and in `summary.json`."""


def score(outputs: Tensor, targets: Tensor, task: Task) -> float:
    r"""Accuracy of logits, or root mean squared error of regression outputs, over a whole split.

    Both are taken in double precision from all samples at once, so the score does not depend on the
    evaluation's batch size: $\frac1N \sum_i 1[\hat y_i = y_i]$ or $\sqrt{\frac1N \sum_i (\hat y_i -
    y_i)^2}$.

    Args:
        outputs: Logits, shape (N, C); for regression shape (N, 1) or (N,).
        targets: Labels, shape (N,); for regression real numbers, shape (N,) or (N, 1).
        task: Which of the two.

    Returns:
        Accuracy in [0, 1], or RMSE in the target's unit; NaN if there are no samples, or an output is not finite.

    Raises:
        UserError: `task` is unknown.
        ValueError: The shapes do not fit together.

    Example:
        >>> score(torch.tensor([[2.0, 1.0], [0.0, 3.0]]), torch.tensor([0, 0]), "classification")
        0.5
        >>> score(torch.tensor([[1.0], [7.0]]), torch.tensor([0.0, 0.0]), "regression")
        5.0
    """
    return _SCORES[require_task(task)](outputs.detach(), targets.detach())


def _accuracy(logits: Tensor, labels: Tensor) -> float:
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(
            f"accuracy needs logits (N, C) and labels (N,), but has {tuple(logits.shape)} and {tuple(labels.shape)}"
        )
    if not torch.isfinite(logits).all():
        return math.nan  # argmax would take the first class for a model that has diverged
    # Counted here: torchmetrics divides in float32, and 0.9338 would read 0.9337999820709229 in a summary.
    return (logits.argmax(dim=1) == labels).to(torch.float64).mean().item()


def _rmse(outputs: Tensor, targets: Tensor) -> float:
    n = len(outputs)
    for name, tensor in (("outputs", outputs), ("targets", targets)):
        if tensor.shape not in {(n,), (n, 1)}:
            raise ValueError(f"RMSE needs {name} of shape ({n},) or ({n}, 1), but has {tuple(tensor.shape)}")
    if n == 0 or not torch.isfinite(outputs).all():
        return math.nan
    predicted, wanted = outputs.to(torch.float64).flatten(), targets.to(torch.float64).flatten()
    return mean_squared_error(predicted, wanted, squared=False).item()


_SCORES: dict[Task, Callable[[Tensor, Tensor], float]] = {"classification": _accuracy, "regression": _rmse}
