"""Exact paired tests of the accuracy or loss of two models on the same samples."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from scipy.special import logsumexp
from scipy.stats import beta, binom

from fedekd.functional.e_process import STAKES


def paired_p_value(worse: int, better: int, samples: int, margin: float = 0.0, nuisance_level: float = 0.01) -> float:
    r"""Compute the p-value for "the new model is worse by the margin or more".

    Of n samples that both models have predicted, b are correct only under the old model and c only under the new one.
    With margin 0 this is the exact sign test, $P(\mathrm{Bin}(b + c, \tfrac12) \le b)$: samples on which both models
    are correct, or both wrong, carry no information.

    With a margin m > 0 the hypothesis is $p_c - p_b \le -m$. Given the $s = b + c$ discordant samples, c is binomial
    with probability $\theta = p_c / q$, and under the hypothesis $\theta \le (1 - m / q) / 2$, which increases with
    $q = p_b + p_c$. So q is replaced by its upper Clopper-Pearson bound at level $\gamma$, and $\gamma$, the
    probability that the bound fails, is added (Berger and Boos, 1994). If the bound is at most m, the hypothesis is
    excluded, and the p-value is $\gamma$. The result is the maximum of these values over c or more better samples, so
    that it never increases with c. The test is exact for every n.

    Args:
        worse: b, samples that only the old model predicts correctly, at least 0.
        better: c, samples that only the new model predicts correctly, at least 0.
        samples: n, number of all samples, at least b + c.
        margin: m, in [0, 1).
        nuisance_level: gamma, in (0, 1); unused with margin 0.

    Returns:
        A p-value in [0, 1]; 1 without discordant samples and without a margin.

    Raises:
        ValueError: If a value is out of range.

    Example:
        >>> paired_p_value(worse=1, better=5, samples=100)
        0.109375
        >>> round(paired_p_value(worse=5, better=5, samples=500, margin=0.02), 4)
        0.0873

    Reference:
        Berger and Boos, P values maximized over a confidence set for the nuisance parameter, JASA 1994.
    """
    require_paired_counts(worse, better, samples, margin, nuisance_level)
    return float(paired_p_values(worse, samples, margin, nuisance_level)[better])


def require_paired_counts(worse: int, better: int, samples: int, margin: float, nuisance_level: float) -> None:
    """Check the arguments of a test of paired classifiers.

    Raises:
        ValueError: If a value is out of range.
    """
    if not (min(worse, better) >= 0 and worse + better <= samples):
        raise ValueError(f"worse, better: expected at least 0 and a sum of at most {samples}, got {worse}, {better}")
    if not 0 <= margin < 1:
        raise ValueError(f"margin: expected a number in [0, 1), got {margin}")
    if not 0 < nuisance_level < 1:
        raise ValueError(f"nuisance_level: expected a number in (0, 1), got {nuisance_level}")


def paired_p_values(
    worse: int, samples: int, margin: float = 0.0, nuisance_level: float = 0.01
) -> npt.NDArray[np.float64]:
    """Compute `paired_p_value` for 0, 1, ... better samples.

    Returns:
        p-values that never increase, shape (samples - worse + 1,).
    """
    better = np.arange(samples - worse + 1)
    discordant = worse + better
    if margin == 0:
        return np.asarray(binom.cdf(worse, discordant, 0.5), dtype=np.float64)
    if samples == 0:
        return np.ones(1)
    bound = np.ones(len(better))
    below = discordant < samples
    bound[below] = beta.ppf(1.0 - nuisance_level, discordant[below] + 1, samples - discordant[below])
    theta = np.clip((1.0 - margin / bound) / 2.0, 0.0, None)
    # Probability of as many better samples or more; 0 where the bound excludes the hypothesis.
    tail = np.where(bound <= margin, 0.0, binom.sf(better - 1, discordant, theta))
    values: npt.NDArray[np.float64] = np.maximum.accumulate(np.minimum(1.0, nuisance_level + tail)[::-1])[::-1]
    return values


def betting_payoffs(gains: npt.ArrayLike, margin: float) -> npt.NDArray[np.float64]:
    r"""Compute the payoff of each sample, $\frac{g_i + m}{1 - m}$.

    Its mean is at most 0 under the hypothesis.

    Args:
        gains: Improvement of the new model per sample, shape (n,), in [-1, 1].
        margin: m, in [0, 1).

    Raises:
        ValueError: If a gain or the margin is out of range.
    """
    values = np.asarray(gains, dtype=np.float64)
    if values.ndim != 1 or not bool((np.abs(values) <= 1).all()):
        raise ValueError("gains: expected numbers in [-1, 1], one per sample")
    if not 0 <= margin < 1:
        raise ValueError(f"margin: expected a number in [0, 1), got {margin}")
    return (values + margin) / (1.0 - margin)


def betting_p_value(gains: npt.ArrayLike, margin: float = 0.0, stake: float | None = None) -> float:
    r"""Compute the p-value for "the mean gain is at most minus the margin" by betting.

    A bet of the fraction $\lambda$ on every sample has the wealth
    $\prod_i \big(1 + \lambda \frac{g_i + m}{1 - m}\big)$. Under the hypothesis it is a supermartingale that starts at
    1, so it is at least 1/p with probability of at most p (Markov), as is its mean over several $\lambda$. The order of
    the samples has no influence, and their variances need not be known.

    Args:
        gains: Improvement of the new model per sample, shape (n,), in [-1, 1]; clip losses before subtracting them.
        margin: m, in [0, 1).
        stake: lambda, in (0, 1), chosen without these gains, see `betting_stake`. By default the mean over 16 stakes,
            which needs no choice and is less powerful.

    Returns:
        A p-value in (0, 1]; 1 without samples.

    Raises:
        ValueError: If a gain, the margin or the stake is out of range.

    Example:
        >>> betting_p_value([]), betting_p_value([-0.2] * 50)
        (1.0, 1.0)
        >>> round(betting_p_value([0.1] * 200), 5)
        0.0

    Reference:
        Waudby-Smith and Ramdas, Estimating means of bounded random variables by betting, JRSS B 2024.
    """
    payoffs = betting_payoffs(gains, margin)
    if stake is not None and not 0 < stake < 1:
        raise ValueError(f"stake: expected a number in (0, 1), got {stake}")
    stakes = STAKES if stake is None else np.array([stake])
    log_wealth = np.log1p(np.outer(stakes, payoffs)).sum(axis=1)
    log_mean = float(logsumexp(log_wealth)) - math.log(len(stakes))
    return math.exp(min(0.0, -log_mean))


def betting_stake(gains: npt.ArrayLike, margin: float, samples: int, level: float) -> float:
    r"""Choose the stake of `betting_p_value` before its gains are known.

    $\lambda = \sqrt{2 \ln(1 / \alpha) / (n \hat\sigma^2)}$ has the largest wealth at the smallest gain that n samples
    can detect. The variance is estimated on other samples; every estimate gives an exact test, a good one a powerful
    test.

    Args:
        gains: Improvements on other samples, shape (k,), in [-1, 1].
        margin: m, in [0, 1).
        samples: n, number of gains to test.
        level: alpha, in (0, 1).

    Returns:
        A stake in (0, 0.9].

    Example:
        >>> round(betting_stake([0.1, -0.1] * 200, margin=0.0, samples=780, level=0.1), 3)
        0.746

    Reference:
        Waudby-Smith and Ramdas, Estimating means of bounded random variables by betting, JRSS B 2024, equations 23 and
        24: the predictable plug-in, whose variance also has one pseudo-observation of 1/4.
    """
    payoffs = (np.asarray(gains, dtype=np.float64) + margin) / (1.0 - margin)
    deviations = payoffs - payoffs.mean() if len(payoffs) else payoffs
    variance = (0.25 + float(deviations @ deviations)) / (len(payoffs) + 1)
    return min(float(STAKES[-1]), math.sqrt(2.0 * math.log(1.0 / level) / (max(samples, 1) * variance)))
