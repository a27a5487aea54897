r"""Exact unconditional test of two paired classifiers.

Of n samples b are correct only under the old model and c only under the new one: (b, c, n - b - c) is trinomial with
the probabilities $p_b$, $p_c$ and $1 - q$, where $q = p_b + p_c$. The hypothesis is $p_b - p_c \ge m$. All outcomes are
ordered by one statistic, and the probability of as extreme outcomes is maximised over the unknown q.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from scipy.special import bdtrc, betaincinv, gammaln, ndtri, xlog1py, xlogy

from fedekd.functional.paired_tests import require_paired_counts

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

#: Scores whose difference is smaller are ties.
_TIE = 1e-9

#: Distance of neighbouring rates of the grid, in units of 1 / sqrt(n) on the arcsine scale.
_STEP = 0.05

#: Factor on probabilities at the rates of the grid. Half a step has the length 0.025 / sqrt(n), and the information is
#: at most 4 n, so that between rates a probability rises by 0.13% to leading order; 0.08% was measured.
_BETWEEN_RATES = 1.002

#: Smallest tail, as a share of gamma. Smaller ones need not be compared with those of other outcomes.
_SMALLEST_TAIL = 1e-3

#: Differing samples outside of this range have a probability of at most 1e-12 (Bernstein's inequality).
_LOG_OMITTED = math.log(2e12)


def score_statistic(differing: npt.ArrayLike, better: npt.ArrayLike, samples: int, margin: float) -> Floats:
    r"""Compute Tango's score statistic of "worse by the margin or more".

    $T = (c - b + n m) / \sqrt{n (\tilde q - m^2)}$, where $\tilde q$ is the maximum likelihood estimate of q under
    $p_b - p_c = m$. T increases with c and decreases with b: larger values contradict the hypothesis.

    Args:
        differing: b + c.
        better: c, at most `differing`.
        samples: n, at least 1.
        margin: m, in [0, 1).

    Returns:
        T, in the broadcast shape of the counts; 0 for equal models without a margin.

    Reference:
        Tango, Equivalence test and confidence interval for the difference in proportions for the paired-sample design,
        Statistics in Medicine 1998.
    """
    d, c = np.asarray(differing, dtype=np.float64), np.asarray(better, dtype=np.float64)
    # The estimate of p_c is the positive root of 2 n p^2 + linear p - constant = 0.
    linear = 2.0 * (samples - d) * margin - d * (1.0 - margin) + 2.0 * c * margin
    constant = c * margin * (1.0 - margin)
    root = np.sqrt(linear**2 + 8.0 * samples * constant)
    # Two forms of the root: neither subtracts nearly equal numbers.
    rate = np.where(linear > 0, 2.0 * constant / np.maximum(linear + root, 1e-300), (root - linear) / (4.0 * samples))
    variance = samples * (2.0 * rate + margin - margin**2)
    statistic: Floats = np.where(
        variance > 0, (2.0 * c - d + samples * margin) / np.sqrt(np.maximum(variance, 1e-300)), 0.0
    )
    return statistic


@lru_cache(maxsize=1 << 14)
def unconditional_p_value(
    worse: int, better: int, samples: int, margin: float = 0.0, nuisance_level: float = 0.001
) -> float:
    r"""Compute the unconditional p-value of "worse by the margin or more".

    Of n samples that both models have predicted, b are correct only under the old model and c only under the new one.
    The p-value is $\gamma + \max_{q \in C} P_q(T \ge t)$: T orders all outcomes (`score_statistic`), t is its observed
    value, $P_q$ is the distribution with $p_b - p_c = m$ and $p_b + p_c = q$, and C is the Clopper-Pearson interval of
    q, which fails with a probability of at most $\gamma$ (Berger and Boos, 1994). The result is the maximum over all
    outcomes with at most b worse and at least c better samples, so it never increases with c or decreases with b.

    The test needs no discordant samples to condition on. It is more powerful than `paired_p_value` above all with a
    margin or few discordant samples.

    Args:
        worse: b, samples that only the old model predicts correctly, at least 0.
        better: c, samples that only the new model predicts correctly, at least 0.
        samples: n, number of all samples, at least b + c.
        margin: m, in [0, 1).
        nuisance_level: gamma, in (0, 1).

    Returns:
        A p-value in [0, 1]; 1 without samples, and without discordant samples if the margin is 0.

    Raises:
        ValueError: If a value is out of range.

    Example:
        >>> round(unconditional_p_value(worse=1, better=5, samples=100), 4)
        0.0662
        >>> round(unconditional_p_value(worse=5, better=5, samples=500, margin=0.02), 4)
        0.0057

    Reference:
        Berger and Boos, P values maximized over a confidence set for the nuisance parameter, JASA 1994; Lloyd and
        Moldovan, Exact one-sided confidence limits for the difference between two correlated proportions, Statistics
        in Medicine 2007.
    """
    require_paired_counts(worse, better, samples, margin, nuisance_level)
    if samples == 0:
        return 1.0
    rates = _rates(samples, margin)
    value = outcome_p_value(worse, better, samples, margin, nuisance_level)
    first, last = _interval(worse + better, samples, margin, nuisance_level)
    for step, candidates in ((-1, np.arange(last + 1)), (1, np.arange(first, len(rates)))):
        b, c = worse, better
        # Each step increases T and lowers the tails: a rate whose tail is at most the value cannot raise it later.
        while value < 1 and len(candidates) and (b > 0 if step < 0 else b + c < samples):
            b, c = (b - 1, c) if step < 0 else (b, c + 1)
            tails = _tails(rates[candidates], b + c, c, samples, margin)
            low, high = _interval(b + c, samples, margin, nuisance_level)
            inside = (candidates >= low) & (candidates <= high)
            value = max(value, nuisance_level + float(tails.max(where=inside, initial=0.0)))
            candidates = candidates[nuisance_level + tails > value]
    return min(1.0, value)


@lru_cache(maxsize=256)
def critical_better_counts(samples: int, margin: float, level: float, nuisance_level: float) -> Ints:
    """Compute the rejection region of `unconditional_p_value`.

    Args:
        samples: n, at least 0.
        margin: m, in [0, 1).
        level: Largest p-value that rejects, at least 2 nuisance_level, below 1.
        nuisance_level: gamma, in (0, 1).

    Returns:
        For 0..n differing samples, the fewest better samples with a p-value of at most `level`; one more than the
        differing samples if no number suffices. Shape (n + 1,), read-only.

    Raises:
        ValueError: If a value is out of range.
    """
    require_paired_counts(0, 0, samples, margin, nuisance_level)
    if not 2 * nuisance_level <= level < 1:
        raise ValueError(f"level: expected at least {2 * nuisance_level:g} and less than 1, got {level}")
    differing = np.arange(samples + 1)
    counts = differing + 1
    if samples > 0:
        tail = (level - nuisance_level) / _BETWEEN_RATES
        kept = np.array([_largest_kept_score(rate, samples, margin, tail) for rate in _rates(samples, margin)])
        intervals = [_interval(d, samples, margin, nuisance_level) for d in differing.tolist()]
        bounds = np.array([kept[low : high + 1].max(initial=-np.inf) for low, high in intervals])
        counts = _fewest_better(differing, bounds + _TIE, samples, margin)
        # Reject only if all outcomes with fewer worse or more better samples are rejected, see `unconditional_p_value`.
        fewer_worse = np.maximum.accumulate(counts)
        more_better = np.maximum.accumulate((counts - differing)[::-1])[::-1] + differing
        counts = np.minimum(np.maximum(fewer_worse, more_better), differing + 1)
    counts.flags.writeable = False
    return counts


def outcome_p_value(worse: int, better: int, samples: int, margin: float, nuisance_level: float) -> float:
    """Compute the p-value without the maximum over other outcomes."""
    low, high = _interval(worse + better, samples, margin, nuisance_level)
    rates = _rates(samples, margin)[low : high + 1]
    tails = _tails(rates, worse + better, better, samples, margin)
    return min(1.0, nuisance_level + float(tails.max(initial=_SMALLEST_TAIL * nuisance_level)))


@lru_cache(maxsize=64)
def _rates(samples: int, margin: float) -> Floats:
    """Return the grid of the nuisance parameter q in [m, 1].

    It is equidistant on the arcsine scale, where the Fisher information is at most 4 n for every margin.
    """
    steps = math.ceil(math.pi / 2.0 * math.sqrt(samples) / _STEP)
    return np.asarray(margin + (1.0 - margin) * np.sin(np.linspace(0.0, math.pi / 2.0, steps + 1)) ** 2)


def _interval(differing: int, samples: int, margin: float, nuisance_level: float) -> tuple[int, int]:
    """Return the range of rates that encloses the Clopper-Pearson interval of q.

    First and last index; the last one is below the first one if the interval excludes the hypothesis.
    """
    low, high = 0.0, 1.0
    if differing > 0:
        low = float(betaincinv(differing, samples - differing + 1, nuisance_level / 2.0))
    if differing < samples:
        high = float(betaincinv(differing + 1, samples - differing, 1.0 - nuisance_level / 2.0))
    if high < margin:
        return 0, -1
    rates = _rates(samples, margin)
    first, last = np.searchsorted(rates, low, side="right") - 1, np.searchsorted(rates, high)
    return max(int(first), 0), min(int(last), len(rates) - 1)


def _binomial(counts: Floats | Ints, trials: Floats | Ints | int, probability: float) -> Floats:
    """Compute binomial probabilities, several times as fast as scipy.stats."""
    ways = gammaln(np.add(trials, 1)) - gammaln(counts + 1) - gammaln(np.subtract(trials, counts) + 1)
    probabilities: Floats = np.exp(
        ways + xlogy(counts, probability) + xlog1py(np.subtract(trials, counts), -probability)
    )
    return probabilities


def _support(rate: float, samples: int) -> tuple[int, int]:
    """Return the range of differing samples whose probabilities are summed."""
    third = _LOG_OMITTED / 3.0
    width = third + math.sqrt(third**2 + 2.0 * _LOG_OMITTED * samples * rate * (1.0 - rate))
    return max(0, math.floor(samples * rate - width)), min(samples, math.ceil(samples * rate + width))


def _share_better(rate: float, margin: float) -> float:
    """Return the probability that a differing sample is better, on the boundary.

    The boundary is the worst case: d = b + c is Bin(n, q) for every p_b - p_c, and given d, c is Bin(d, p_c / q). T
    increases with c at fixed d, so {T >= t} is {c >= k(d)}, and its probability increases with p_c / q = (1 - (p_b -
    p_c) / q) / 2. At fixed q it is therefore largest where p_b - p_c is smallest, which is m.
    """
    return (1.0 - margin / rate) / 2.0 if rate > 0 else 0.5


def _tails(rates: Floats, differing: int, better: int, samples: int, margin: float) -> Floats:
    """Compute P_q(T >= t) for every rate q, where t is the score of the counts.

    Includes the largest possible rise between the rates of the grid.
    """
    if not len(rates):
        return np.zeros(0)
    supports = [_support(rate, samples) for rate in rates.tolist()]
    start, stop = min(low for low, _ in supports), max(high for _, high in supports)
    threshold = float(score_statistic(differing, better, samples, margin)) - _TIE
    counts = np.arange(start, stop + 1)
    fewest = _fewest_better(counts, np.full(len(counts), threshold), samples, margin)
    tails = []
    for rate, (low, high) in zip(rates.tolist(), supports, strict=True):
        part = slice(low - start, high - start + 1)
        given = bdtrc(fewest[part] - 1, counts[part], _share_better(rate, margin))
        tails.append(float(_binomial(counts[part], samples, rate) @ given))
    return _BETWEEN_RATES * np.array(tails)


def _fewest_better(differing: Ints, thresholds: Floats, samples: int, margin: float) -> Ints:
    """Return the fewest better samples with T >= threshold, by bisection.

    One more than the differing samples if there are none.
    """
    low, high = np.full(len(differing), -1), differing + 1
    while bool((high - low > 1).any()):
        middle = (low + high) // 2
        reached = score_statistic(differing, middle.clip(min=0), samples, margin) >= thresholds
        is_open = high - low > 1
        high = np.where(is_open & reached, middle, high)
        low = np.where(is_open & ~reached, middle, low)
    return high


def _largest_kept_score(rate: float, samples: int, margin: float, tail: float) -> float:
    """Return the largest score t with P_q(T >= t) > tail, at one rate q.

    The outcomes around the normal approximation are sorted by their scores.
    """
    low, high = _support(rate, samples)
    differing, share = np.arange(low, high + 1), _share_better(rate, margin)
    weights = _binomial(differing, samples, rate)
    variance = samples * np.maximum(np.maximum(differing / samples, margin) - margin**2, 0.0)
    centre = np.ceil((differing - samples * margin - float(ndtri(tail)) * np.sqrt(variance)) / 2.0)
    width = 6
    while True:
        start = (centre.astype(np.int64) - width).clip(0, differing + 1)
        stop = np.minimum(start + 2 * width, differing + 1)
        better = start[:, None] + np.arange(2 * width)
        rows, columns = np.nonzero(better < stop[:, None])
        d, c = differing[rows], better[rows, columns]
        scores = score_statistic(d, c, samples, margin)
        order = np.argsort(-scores)
        probabilities = (weights[rows] * _binomial(c, d, share))[order]
        beyond = float(weights @ bdtrc(stop - 1, differing, share))
        index = int(np.searchsorted(beyond + np.cumsum(probabilities), tail, side="right"))
        if index < len(scores):
            score = float(scores[order[index]])
            above, below = stop <= differing, start > 0
            lowest_above = score_statistic(differing[above], stop[above], samples, margin).min(initial=np.inf)
            highest_below = score_statistic(differing[below], start[below] - 1, samples, margin).max(initial=-np.inf)
            # Otherwise an outcome outside of the sorted ones belongs between them.
            if highest_below + _TIE < score < lowest_above - _TIE:
                return score
        width *= 2
