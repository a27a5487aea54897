"""What repeated runs allow to be said: against published figures, between two methods, among several."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev

import numpy as np
import numpy.typing as npt

#: Level of every test.
LEVEL = 0.05

#: Fewest seeds from which a spread is taken, and fewest pairs from which Wilcoxon's test can reach the level:
#: with five pairs its smallest two-sided p is 2 / 2^5 = 0.0625.
MIN_SEEDS = 3
MIN_PAIRS = 6


def welch(values: Sequence[float], published_mean: float, published_std: float, published_n: int) -> float:
    """Welch's t-test of our seeds against a published mean and standard deviation.

    Args:
        values: Ours, one a seed, at least two.
        published_mean: Theirs.
        published_std: Their sample standard deviation.
        published_n: How many runs are behind it.

    Returns:
        The two-sided p-value. Without any spread on either side: 1 if the means are equal, else 0.

    Example:
        >>> round(welch([1.0, 2.0, 3.0], 2.0, 1.0, 10), 3)
        1.0
    """
    from scipy.stats import ttest_ind_from_stats

    ours, spread = mean(values), stdev(values)
    if spread == published_std == 0.0:
        return float(ours == published_mean)
    test = ttest_ind_from_stats(ours, spread, len(values), published_mean, published_std, published_n, equal_var=False)
    return float(test.pvalue)


@dataclass(frozen=True)
class PairedTest:
    """Two methods over the seeds that both have.

    Attributes:
        pairs: How many.
        difference: Mean of the first minus the second; NaN without a pair.
        p: Two-sided p of Wilcoxon's signed-rank test; None with fewer than `MIN_PAIRS` pairs, or a diverged run.
    """

    pairs: int
    difference: float
    p: float | None


def paired(first: Mapping[int, float], second: Mapping[int, float]) -> PairedTest:
    """Wilcoxon's signed-rank test of two methods over seeds.

    Pairs without a difference are ranked with the others, and their ranks halved between both signs; the p-value is
    exact up to 50 pairs where there are no ties.

    Args:
        first: Value by seed.
        second: Value by seed.

    Example:
        >>> paired({0: 0.5, 1: 0.75}, {0: 0.25, 1: 0.5, 2: 0.5})
        PairedTest(pairs=2, difference=0.25, p=None)
    """
    from scipy.stats import wilcoxon

    differences = [first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())]
    if not differences:
        return PairedTest(0, math.nan, None)
    if len(differences) < MIN_PAIRS:
        p = None
    elif any(math.isnan(value) for value in differences):
        p = None  # a run diverged: no rank says how bad that is
    elif not any(differences):
        p = 1.0
    else:
        p = float(wilcoxon(differences, zero_method="zsplit").pvalue)
    return PairedTest(len(differences), math.fsum(differences) / len(differences), p)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment: all at most `LEVEL` may be called significant together.

    Example:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
    """
    adjusted = [0.0] * len(p_values)
    highest = 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = highest
    return adjusted


@dataclass(frozen=True)
class Ranking:
    """Methods ranked over repetitions, 1 the best (Demsar, JMLR 2006).

    Attributes:
        mean_ranks: By method, best first; equal scores share the mean of their ranks.
        repetitions: How many.
        p: Of Friedman's test that all are alike.
        critical_difference: Mean ranks further apart than this differ by Nemenyi's test at `LEVEL`.
    """

    mean_ranks: Mapping[str, float]
    repetitions: int
    p: float
    critical_difference: float

    def alike(self) -> list[tuple[str, ...]]:
        """The largest runs of neighbours that Nemenyi's test does not tell apart, two methods or more."""
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
        scores: By method, a score a repetition, in the same order for all; 3 methods and 2 repetitions or more.
        higher_is_better: Whether the largest score has rank 1.
    """
    from scipy.stats import friedmanchisquare, rankdata, studentized_range

    names = list(scores)
    table: npt.NDArray[np.float64] = np.array([scores[name] for name in names], dtype=np.float64)
    k, n = table.shape
    if k < 3 or n < 2:
        raise ValueError(f"a ranking needs 3 methods and 2 repetitions, got {k} and {n}")
    ranks = rankdata(-table if higher_is_better else table, axis=0).mean(axis=1)
    p = 1.0 if (table == table[0]).all() else float(friedmanchisquare(*table).pvalue)
    q = studentized_range.ppf(1 - LEVEL, k, np.inf) / math.sqrt(2)
    order = np.argsort(ranks, kind="stable")
    return Ranking({names[i]: float(ranks[i]) for i in order}, n, p, float(q * math.sqrt(k * (k + 1) / (6 * n))))
