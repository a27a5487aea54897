"""Calibration of a classifier (Guo et al., 2017, arXiv 1706.04599)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torchmetrics.functional.classification import binary_calibration_error

from fedekd.functional.shapes import require_same_shape


@dataclass(frozen=True)
class ReliabilityBin:
    """Point of a reliability diagram: samples with confidence in one interval.

    Attributes:
        low: Lower end of the interval, included.
        high: Upper end, excluded; the last interval includes 1.
        count: Number of samples, at least 1.
        confidence: Mean confidence of the samples.
        accuracy: Fraction of the samples that are classified correctly.
    """

    low: float
    high: float
    count: int
    confidence: float
    accuracy: float


def reliability(confidence: Tensor, correct: Tensor, bins: int = 15) -> list[ReliabilityBin]:
    r"""Return the reliability diagram: accuracy and confidence per bin.

    Bins have equal width. Bin m of M holds the confidences in $[\frac{m-1}M, \frac mM)$, as in torchmetrics; the last
    bin also holds 1. Guo et al. assign an inner edge to the bin below instead.

    Args:
        confidence: Confidence of each prediction, in [0, 1], shape (N,). NaN is counted in the last bin, whose
            mean confidence is then NaN.
        correct: True where a prediction is correct, bool, shape (N,).
        bins: Number of bins M, at least 1.

    Returns:
        The bins with at least one sample, in ascending order of confidence; means in float64.

    Raises:
        ValueError: If the shapes differ or are not (N,), `correct` is not bool, a confidence lies outside [0, 1], or
            `bins` is less than 1.

    Example:
        >>> reliability(torch.tensor([0.25, 0.75, 1.0]), torch.tensor([True, False, True]), bins=2)[1]
        ReliabilityBin(low=0.5, high=1.0, count=2, confidence=0.875, accuracy=0.5)
    """
    values = _validated(confidence, correct, bins)
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64)
    bin_indices = torch.bucketize(values, edges[1:-1], right=True)
    counts = torch.bincount(bin_indices, minlength=bins)
    confidences, accuracies = (
        torch.bincount(bin_indices, weights=weights, minlength=bins) / counts
        for weights in (values, correct.to("cpu", torch.float64))
    )
    columns = zip(edges[:-1], edges[1:], counts, confidences, accuracies, strict=True)
    return [
        ReliabilityBin(low.item(), high.item(), int(count), mean.item(), accuracy.item())
        for low, high, count, mean, accuracy in columns
        if count
    ]


def expected_calibration_error(confidence: Tensor, correct: Tensor, bins: int = 15) -> float:
    r"""Return the expected calibration error, by torchmetrics in float64.

    $$\mathrm{ECE} = \sum_m \frac{|B_m|}N |\mathrm{acc}(B_m) - \mathrm{conf}(B_m)|$$

    with the bins $B_m$ of `reliability`, which have equal width.

    Args:
        confidence: Confidence of each prediction, in [0, 1], shape (N,).
        correct: True where a prediction is correct, bool, shape (N,).
        bins: Number of bins M, at least 1.

    Returns:
        The error, in [0, 1]; NaN if there are no samples or a confidence is NaN.

    Raises:
        ValueError: As `reliability`.

    Reference:
        Guo et al. (arXiv 1706.04599), Eq. 3.

    Example:
        >>> expected_calibration_error(torch.tensor([0.75] * 4), torch.tensor([True, True, True, False]))
        0.0
    """
    values = _validated(confidence, correct, bins)
    if not len(values) or values.isnan().any():
        return math.nan
    # torchmetrics gives a confidence of exactly 1 a bin of its own; the largest float64 below 1 is in the last bin.
    below_one = values.clamp(max=math.nextafter(1, 0))
    return binary_calibration_error(below_one, correct.to("cpu", torch.int64), bins, validate_args=False).item()


def _validated(confidence: Tensor, correct: Tensor, bins: int) -> Tensor:
    """Check the arguments and return the confidences as float64 on the CPU."""
    require_same_shape(confidence=confidence, correct=correct)
    if confidence.ndim != 1:
        raise ValueError(f"confidence: expected shape (N,), got {tuple(confidence.shape)}")
    if correct.dtype != torch.bool:
        raise ValueError(f"correct: expected bool, got {correct.dtype}")
    if bins < 1:
        raise ValueError(f"bins: expected at least 1, got {bins}")
    values = confidence.detach().to("cpu", torch.float64)
    if ((values < 0) | (values > 1)).any():
        raise ValueError(f"confidence: expected values in [0, 1], got {values.min().item()} to {values.max().item()}")
    return values
