"""Whether a classifier is right as often as it says (Guo et al., 2017, arXiv 1706.04599)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fedekd.functional.shapes import require_same_shape


@dataclass(frozen=True)
class ReliabilityBin:
    """The samples whose confidence lies in one interval.

    Args:
        low: Lower end of the interval, not part of it, save for 0.
        high: Upper end, part of it.
        count: Number of samples, at least 1.
        confidence: Their mean confidence.
        accuracy: The share of them that are right.
    """

    low: float
    high: float
    count: int
    confidence: float
    accuracy: float


def reliability(confidence: Tensor, correct: Tensor, bins: int = 15) -> list[ReliabilityBin]:
    r"""Accuracy against confidence, in bins of equal width: the points of a reliability diagram.

    Bin m of M holds confidences in $(\frac{m-1}M, \frac mM]$; the first also holds 0.

    Args:
        confidence: Of each prediction, in [0, 1], shape (N,); NaN goes to the last bin, whose mean is then NaN.
        correct: Whether each prediction is right, bool, shape (N,).
        bins: M, at least 1.

    Returns:
        The bins that hold a sample, by rising confidence.

    Raises:
        ValueError: The shapes differ or are not (N,), `correct` is not bool, a confidence lies outside [0, 1], or
            there is no bin.

    Example:
        >>> reliability(torch.tensor([0.5, 0.75, 1.0]), torch.tensor([True, False, True]), bins=2)[1]
        ReliabilityBin(low=0.5, high=1.0, count=2, confidence=0.875, accuracy=0.5)
    """
    require_same_shape(confidence=confidence, correct=correct)
    if confidence.ndim != 1:
        raise ValueError(f"confidence must have shape (N,), but has {tuple(confidence.shape)}")
    if correct.dtype != torch.bool:
        raise ValueError(f"correct must be bool, but is {correct.dtype}")
    if bins < 1:
        raise ValueError(f"bins must be at least 1, but is {bins}")
    values = confidence.detach().to("cpu", torch.float64)
    if ((values < 0) | (values > 1)).any():
        raise ValueError(f"confidence must lie in [0, 1], but spans {values.min().item()} to {values.max().item()}")
    edges = torch.arange(bins + 1, dtype=torch.float64) / bins
    members = torch.bucketize(values, edges[1:-1])  # the number of inner edges below a value
    counts = torch.bincount(members, minlength=bins)
    confidences = torch.bincount(members, weights=values, minlength=bins) / counts
    accuracies = torch.bincount(members, weights=correct.to("cpu", torch.float64), minlength=bins) / counts
    columns = zip(edges[:-1], edges[1:], counts, confidences, accuracies, strict=True)
    return [
        ReliabilityBin(low.item(), high.item(), int(count), mean.item(), accuracy.item())
        for low, high, count, mean, accuracy in columns
        if count
    ]


def expected_calibration_error(confidence: Tensor, correct: Tensor, bins: int = 15) -> float:
    r"""Distance of accuracy from confidence, on average over samples and by bins (Guo et al., Eq. 3).

    $$\mathrm{ECE} = \sum_m \frac{|B_m|}N |\mathrm{acc}(B_m) - \mathrm{conf}(B_m)|$$

    with $B_m$ the bins of `reliability`. torchmetrics' `multiclass_calibration_error` gives an edge to the bin above
    it instead, and 1 to a bin of its own; where no confidence lies on an edge, the two agree.

    Args:
        confidence: Of each prediction, in [0, 1], shape (N,).
        correct: Whether each prediction is right, bool, shape (N,).
        bins: Number of bins, at least 1.

    Returns:
        The error in [0, 1]; NaN if there are no samples or a confidence is NaN.

    Raises:
        ValueError: As `reliability`.

    Example:
        >>> expected_calibration_error(torch.tensor([0.75] * 4), torch.tensor([True, True, True, False]))
        0.0
        >>> expected_calibration_error(torch.ones(4), torch.tensor([True, True, True, False]))
        0.25
    """
    filled = reliability(confidence, correct, bins)
    if not filled:
        return math.nan
    return sum(part.count * abs(part.accuracy - part.confidence) for part in filled) / len(confidence)
