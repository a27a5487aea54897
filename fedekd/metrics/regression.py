"""Metrics of regression, from the outputs and targets of a whole split."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torchmetrics.functional import mean_absolute_error, mean_squared_error


def rmse(outputs: Tensor, targets: Tensor, num_classes: int) -> float:
    r"""Root mean squared error $\sqrt{\frac1N \sum_i (\hat y_i - y_i)^2}$, in float64.

    Args:
        outputs: Shape (N, 1) or (N,).
        targets: Real numbers, shape (N,) or (N, 1).
        num_classes: Number of grades; not used.

    Returns:
        A value of at least 0 in the unit of the targets; NaN if there are no samples or an output is not finite.

    Raises:
        ValueError: If the shapes do not match.
    """
    pair = _pair("RMSE", outputs, targets)
    return math.nan if pair is None else mean_squared_error(*pair, squared=False).item()


def mae(outputs: Tensor, targets: Tensor, num_classes: int) -> float:
    r"""Mean absolute error $\frac1N \sum_i |\hat y_i - y_i|$, in float64.

    Args:
        outputs: Shape (N, 1) or (N,).
        targets: Real numbers, shape (N,) or (N, 1).
        num_classes: Number of grades; not used.

    Returns:
        A value of at least 0 in the unit of the targets; NaN if there are no samples or an output is not finite.

    Raises:
        ValueError: If the shapes do not match.
    """
    pair = _pair("MAE", outputs, targets)
    return math.nan if pair is None else mean_absolute_error(*pair).item()


def r2(outputs: Tensor, targets: Tensor, num_classes: int) -> float:
    r"""Coefficient of determination, by scikit-learn in float64.

    $$R^2 = 1 - \frac{\sum_i (\hat y_i - y_i)^2}{\sum_i (y_i - \bar y)^2}$$

    Args:
        outputs: Shape (N, 1) or (N,).
        targets: Real numbers, shape (N,) or (N, 1).
        num_classes: Number of grades; not used.

    Returns:
        A value of at most 1; NaN if all targets are equal or an output is not finite.

    Raises:
        ValueError: If the shapes do not match.
    """
    pair = _pair("R2", outputs, targets)
    if pair is None or bool((pair[1] == pair[1][0]).all()):
        return math.nan
    # torchmetrics returns 1 for sums of squares below 1e-4, and cancels far from 0: 1.11 at an offset of 1e8.
    from sklearn.metrics import r2_score  # 0.3 s, and only for regression

    predicted, expected = (values.cpu().numpy() for values in pair)
    return float(r2_score(expected, predicted))


def quadratic_kappa(outputs: Tensor, targets: Tensor, num_classes: int) -> float:
    r"""Cohen's kappa of grades with quadratic weights, by scikit-learn in float64.

    $$\kappa = 1 - \frac{\sum_{jk} (j - k)^2 O_{jk}}{\sum_{jk} (j - k)^2 E_{jk}}$$

    with $O$ the samples by grade and output, and $E$ those expected of independent outputs with equal marginals.
    Outputs are rounded to the nearest grade 0..C-1.

    Args:
        outputs: Shape (N, 1) or (N,).
        targets: Grades 0..C-1, shape (N,) or (N, 1).
        num_classes: C, at least 2.

    Returns:
        A value in [-1, 1]; NaN if all targets and rounded outputs are one grade, or an output is not finite.

    Raises:
        ValueError: If the shapes do not match.

    Reference:
        Cohen, Weighted kappa, Psychological Bulletin 70 (1968).
    """
    pair = _pair("quadratic kappa", outputs, targets)
    if pair is None:
        return math.nan
    predicted, expected = (values.round().clamp(0, num_classes - 1).long().cpu().numpy() for values in pair)
    if (predicted == expected[0]).all() and (expected == expected[0]).all():
        return math.nan  # 0 / 0
    from sklearn.metrics import cohen_kappa_score  # 0.3 s, and only with grades

    return float(cohen_kappa_score(expected, predicted, labels=list(range(num_classes)), weights="quadratic"))


def _pair(name: str, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return outputs and targets, float64, shape (N,).

    Returns:
        None if there are no samples or an output is not finite.

    Raises:
        ValueError: If the shapes do not match.
    """
    n = len(outputs)
    for argument, tensor in (("outputs", outputs), ("targets", targets)):
        if tensor.shape not in {(n,), (n, 1)}:
            raise ValueError(f"{name}: expected {argument} of shape ({n},) or ({n}, 1), got {tuple(tensor.shape)}")
    if n == 0 or not torch.isfinite(outputs).all():
        return None
    return outputs.to(torch.float64).flatten(), targets.to(torch.float64).flatten()
