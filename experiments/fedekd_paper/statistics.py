"""Statistical tests over seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev

import numpy as np
import numpy.typing as npt
from scipy.stats import friedmanchisquare, rankdata, studentized_range, t, ttest_ind_from_stats, wilcoxon

#: Level of all tests.
LEVEL = 0.05

#: Fewest seeds for a standard deviation, and fewest pairs for Wilcoxon's test: with five pairs its smallest two-sided
#: p-value is 2 / 2^5 = 0.0625.
MIN_SEEDS = 3
MIN_PAIRS = 6


def welch(values: Sequence[float], published_mean: float, published_std: float, published_n: int) -> float:
    """Welch's t-test of measured values against published moments.

    Args:
        values: Measured values, one per seed, at least two.
        published_mean: Published mean.
        published_std: Published sample standard deviation.
        published_n: Number of runs behind it.

    Returns:
        The two-sided p-value. Without spread on both sides: 1 if the means are equal, else 0.

    Example:
        >>> round(welch([1.0, 2.0, 3.0], 2.0, 1.0, 10), 3)
        1.0
    """
    measured = mean(values), stdev(values), len(values)
    if measured[1] == published_std == 0.0:
        return float(measured[0] == published_mean)
    return float(ttest_ind_from_stats(*measured, published_mean, published_std, published_n, equal_var=False).pvalue)


def t_interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the 95% confidence interval of a mean by Student's t.

    Args:
        values: One per seed, at least two.

    Example:
        >>> [round(end, 3) for end in t_interval([1.0, 2.0, 3.0])]
        [-0.484, 4.484]
    """
    half = float(t.ppf(1 - LEVEL / 2, len(values) - 1)) * stdev(values) / math.sqrt(len(values))
    return mean(values) - half, mean(values) + half


def signed_rank(differences: Sequence[float]) -> float:
    """Wilcoxon's signed-rank test of paired differences.

    Zero differences are ranked, and their ranks split between both signs. The p-value is exact for up to 50 pairs
    without ties.

    Args:
        differences: One per seed.

    Returns:
        The two-sided p-value; NaN with fewer than `MIN_PAIRS` pairs or after a diverged run.

    Example:
        >>> signed_rank([0.1, 0.2, 0.3, 0.4, 0.5, 0.6]), signed_rank([0.1])
        (0.03125, nan)
    """
    if len(differences) < MIN_PAIRS or any(math.isnan(difference) for difference in differences):
        return math.nan
    return float(wilcoxon(differences, zero_method="zsplit").pvalue) if any(differences) else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment of a family of p-values; NaN is ignored.

    Example:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
    """
    adjusted = [math.nan] * len(p_values)
    tested = sorted((p, index) for index, p in enumerate(p_values) if not math.isnan(p))
    highest = 0.0
    for rank_, (p, index) in enumerate(tested):
        highest = max(highest, min(1.0, (len(tested) - rank_) * p))
        adjusted[index] = highest
    return adjusted


@dataclass(frozen=True)
class Ranking:
    """Methods ranked over repetitions, 1 the best (Demsar, JMLR 2006).

    Attributes:
        mean_ranks: Mean rank by method, best first; equal scores share the mean of their ranks.
        repetitions: Number of repetitions.
        p: p-value of Friedman's test that all methods are equal.
        critical_difference: Mean ranks that differ by more than this differ by Nemenyi's test at `LEVEL`.
    """

    mean_ranks: Mapping[str, float]
    repetitions: int
    p: float
    critical_difference: float

    def groups(self) -> list[tuple[str, ...]]:
        """Return maximal groups that Nemenyi's test does not separate."""
        names, ranks = list(self.mean_ranks), list(self.mean_ranks.values())
        groups: list[tuple[str, ...]] = []
        end = 0
        for start in range(len(names)):
            last = max(i for i in range(len(names)) if ranks[i] - ranks[start] <= self.critical_difference)
            if last > start and last > end:
                groups.append(tuple(names[start : last + 1]))
            end = max(end, last)
        return groups


def rank(scores: Mapping[str, Sequence[float]], higher_is_better: bool) -> Ranking:
    """Friedman's test and Nemenyi's critical difference.

    Args:
        scores: By method, one score per repetition in a common order; at least 3 methods and 2 repetitions.
        higher_is_better: True if the largest score has rank 1.

    Raises:
        ValueError: If there are too few methods or repetitions.
    """
    names = list(scores)
    table: npt.NDArray[np.float64] = np.array([scores[name] for name in names], dtype=np.float64)
    k, n = table.shape
    if k < 3 or n < 2:
        raise ValueError(f"scores: expected at least 3 methods and 2 repetitions, got {k} and {n}")
    ranks = rankdata(-table if higher_is_better else table, axis=0).mean(axis=1)
    p = 1.0 if (table == table[0]).all() else float(friedmanchisquare(*table).pvalue)
    q = studentized_range.ppf(1 - LEVEL, k, np.inf) / math.sqrt(2)
    order = np.argsort(ranks, kind="stable")
    return Ranking({names[i]: float(ranks[i]) for i in order}, n, p, float(q * math.sqrt(k * (k + 1) / (6 * n))))
