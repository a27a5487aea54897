"""Walking down the scores of one exit: how many would leave at each threshold, and how many of them are wrong."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fedekd.functional.binomial import error_p_value

#: So many samples nobody has.
_NEVER = 1e9

Scores = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]


class RiskCurve(NamedTuple):
    """The distinct scores of some samples at one exit, from high to low.

    Attributes:
        thresholds: Distinct scores, falling, shape (t,).
        samples: m, how many have at least that score.
        errors: k, how many of those are wrong.
    """

    thresholds: Scores
    samples: npt.NDArray[np.int64]
    errors: npt.NDArray[np.int64]

    @property
    def risk(self) -> Scores:
        """The share of errors among those who would leave, k / m."""
        return self.errors / self.samples

    def at(self, place: int) -> RiskCurve:
        """One of the thresholds alone, where the p-values of all would take long for nothing."""
        only = slice(place, place + 1)
        return RiskCurve(self.thresholds[only], self.samples[only], self.errors[only])


def risk_curve(scores: Scores, correct: Flags) -> RiskCurve:
    """All thresholds at which something changes.

    Args:
        scores: Of the samples that come to this exit, shape (n,).
        correct: Whether it is right about them, shape (n,).

    Example:
        >>> walk = risk_curve(np.array([0.5, 0.9, 0.9]), np.array([False, True, True]))
        >>> walk.thresholds.tolist(), walk.samples.tolist(), walk.errors.tolist()
        ([0.9, 0.5], [2, 3], [0, 1])
    """
    order = np.argsort(-scores, kind="stable")
    falling = scores[order]
    # Samples of one score leave together, or a threshold would not say who leaves.
    last_of_each = np.append(falling[1:] != falling[:-1], True)[: len(falling)]
    samples = np.arange(1, len(falling) + 1)[last_of_each]
    return RiskCurve(falling[last_of_each], samples, np.cumsum(~correct[order])[last_of_each])


def expected_p_value(walk: RiskCurve, alpha: float, ratio: float) -> Scores:
    """The p-value to expect at each threshold from `ratio` times as many samples with the same share of errors."""
    return error_p_value(walk.errors * ratio, walk.samples * ratio, alpha)


def samples_needed(walk: RiskCurve, alpha: float, delta: float, samples: int) -> int | None:
    """About how many samples it takes until some threshold's p-value is expected to be at most delta.

    Args:
        walk: Of tuning samples at one exit.
        alpha: The error rate to hold.
        delta: The level.
        samples: How many samples, of all that enter the network, the walk was made from.

    Returns:
        The number, of all that enter the network; None where the error rate is never seen clearly below alpha.
    """
    below = walk.risk < alpha * (1.0 - 1e-9)  # 1 - 0.95 is above 1 / 20
    if not below.any():
        return None
    promising = RiskCurve(walk.thresholds[below], walk.samples[below], walk.errors[below])
    low, high = 1.0 / samples, 1.0
    while expected_p_value(promising, alpha, high).min() > delta:
        low, high = high, 2 * high
        if high * samples > _NEVER:
            return None
    while high - low > 1e-3 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if expected_p_value(promising, alpha, middle).min() <= delta else (middle, high)
    return math.ceil(high * samples)
