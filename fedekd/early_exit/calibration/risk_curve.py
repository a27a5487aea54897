"""Error rate of one exit as a function of its threshold."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fedekd.functional.binomial import error_p_value

#: Upper limit of the sample-size search.
_MAX_SAMPLES = 1e9

Scores = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]


class RiskCurve(NamedTuple):
    """Samples and errors at each distinct score of one exit, in decreasing order.

    Attributes:
        thresholds: Distinct scores in decreasing order, shape (t,).
        samples: Number m of samples with at least that score, shape (t,); of g groups, shape (t, g).
        errors: Number k of errors among them, of the same shape.
    """

    thresholds: Scores
    samples: npt.NDArray[np.int64]
    errors: npt.NDArray[np.int64]

    @property
    def risk(self) -> Scores:
        """Error rate k / m among the samples that exit at each threshold; NaN without."""
        with np.errstate(invalid="ignore"):
            return self.errors / self.samples

    def take(self, index: slice | npt.NDArray[Any]) -> RiskCurve:
        """Select thresholds by slice, index or mask."""
        return RiskCurve(self.thresholds[index], self.samples[index], self.errors[index])


def risk_curve(scores: Scores, correct: Flags) -> RiskCurve:
    """Count samples and errors at each distinct score.

    Args:
        scores: Scores of the samples that reach this exit, shape (n,).
        correct: Whether the exit's prediction is correct, shape (n,).

    Example:
        >>> curve = risk_curve(np.array([0.5, 0.9, 0.9]), np.array([False, True, True]))
        >>> curve.thresholds.tolist(), curve.samples.tolist(), curve.errors.tolist()
        ([0.9, 0.5], [2, 3], [0, 1])
    """
    order = np.argsort(-scores, kind="stable")
    decreasing = scores[order]
    # Samples with equal scores exit together: a threshold cannot separate them.
    is_last_of_ties = np.append(decreasing[1:] != decreasing[:-1], True)[: len(decreasing)]
    samples = np.arange(1, len(decreasing) + 1)[is_last_of_ties]
    return RiskCurve(decreasing[is_last_of_ties], samples, np.cumsum(~correct[order])[is_last_of_ties])


def group_curve(scores: Scores, correct: Flags, groups: npt.NDArray[np.int64], tested: Sequence[int]) -> RiskCurve:
    """Count samples and errors of several groups at each distinct score.

    Args:
        scores: Scores of the samples that reach this exit, shape (n,).
        correct: Whether the exit's prediction is correct, shape (n,).
        groups: Number of the group of each sample, shape (n,).
        tested: Numbers of the g groups that are counted.

    Returns:
        Counts of shape (t,) for one group that has all samples, else (t, g).
    """
    curve = risk_curve(scores, correct)
    if len(tested) == 1:
        return curve
    counts = []
    for group in tested:
        mask = groups == group
        ascending = np.sort(scores[mask]), np.sort(scores[mask & ~correct])
        counts.append([len(part) - np.searchsorted(part, curve.thresholds) for part in ascending])
    samples, errors = np.moveaxis(np.asarray(counts, dtype=np.int64), 0, -1)
    return RiskCurve(curve.thresholds, samples, errors)


def expected_p_value(curve: RiskCurve, target_risk: float, ratio: float) -> Scores:
    """Compute the p-value expected at each threshold for another sample size.

    The other sample has the same error rates.

    Args:
        curve: Counts of the tuning samples.
        target_risk: Tested error rate, in (0, 1).
        ratio: Size of the other sample divided by the size of this one.

    Returns:
        P-values, shape (t,); of several groups the largest, for "the error rate of some group exceeds the target".
    """
    p = error_p_value(curve.errors * ratio, curve.samples * ratio, target_risk)
    return p if p.ndim == 1 else p.max(axis=1)


def required_samples(curve: RiskCurve, target_risk: float, level: float, samples: int) -> int | None:
    """Estimate the sample size at which some threshold is expected to pass.

    It is too low with few tuning samples: the smallest of their error rates, over all thresholds, is taken as a true
    one.

    Args:
        curve: Counts of the tuning samples at one exit.
        target_risk: Tested error rate, in (0, 1).
        level: Significance level of the test, in (0, 1).
        samples: Number of tuning samples that enter the network, from which the curve was computed.

    Returns:
        The number of samples that enter the network; None if no threshold has an error rate clearly below the target
        or more than 1e9 samples are needed.
    """
    below = curve.risk < target_risk * (1.0 - 1e-9)  # in floating point 1 - 0.95 > 1 / 20
    if below.ndim == 2:
        below = np.asarray(below.all(axis=1))
    if not below.any():
        return None
    promising = curve.take(below)
    low, high = 1.0 / samples, 1.0
    while expected_p_value(promising, target_risk, high).min() > level:
        low, high = high, 2 * high
        if high * samples > _MAX_SAMPLES:
            return None
    while high - low > 1e-3 * high:
        middle = (low + high) / 2
        is_enough = expected_p_value(promising, target_risk, middle).min() <= level
        low, high = (low, middle) if is_enough else (middle, high)
    return math.ceil(high * samples)
