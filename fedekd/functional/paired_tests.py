"""Is a model worse than another? Exact tests on samples that both have judged, valid whatever their number."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from scipy.special import logsumexp
from scipy.stats import beta, binom

#: Stakes of the bets, as shares of what may be lost at once; the p-value is that of the mean of the fortunes.
_STAKES = np.geomspace(0.005, 0.9, 16)


def paired_p_value(worse: int, better: int, samples: int, margin: float = 0.0, slack: float = 0.01) -> float:
    r"""A p-value for "the new model's accuracy is lower than the old one's by the margin or more".

    Of n samples that both models have judged, b only the old one gets right, and c only the new one. With margin 0
    this is the exact sign test, $P(\mathrm{Bin}(b + c, \tfrac12) \le b)$: samples on which both are right, or both
    wrong, say nothing.

    With a margin m > 0 the hypothesis is $p_c - p_b \le -m$. Given the $s = b + c$ samples on which they differ, c is
    binomial with probability $\theta = p_c / q$, and under the hypothesis $\theta \le (1 - m / q) / 2$, which rises
    with $q = p_b + p_c$. So q is replaced by its upper confidence bound of Clopper and Pearson at level $\gamma$, and
    $\gamma$ is added: the probability that the bound fails (Berger and Boos, 1994). Where the bound is at most m the
    hypothesis is ruled out, and $\gamma$ is all that is left. What is given is the largest such value for c or more
    better ones, so that it never rises with c. The test is exact for every n.

    Args:
        worse: b, samples that the old model alone gets right.
        better: c, samples that the new model alone gets right.
        samples: n, all samples, at least b + c.
        margin: m, in [0, 1).
        slack: gamma, in (0, 1); without a margin it is not needed.

    Returns:
        In [0, 1]; 1 without samples on which they differ and without a margin: nothing speaks against the old model.

    Raises:
        ValueError: The counts do not fit together, or a number is out of its range.

    Example:
        >>> paired_p_value(worse=1, better=5, samples=100)
        0.109375
        >>> round(paired_p_value(worse=5, better=5, samples=500, margin=0.02), 4)
        0.0873
    """
    if not (min(worse, better) >= 0 and worse + better <= samples):
        raise ValueError(f"{worse} worse and {better} better of {samples} samples cannot be")
    if not (0 <= margin < 1 and 0 < slack < 1):
        raise ValueError(f"margin is {margin}, and must be in [0, 1); slack is {slack}, and must be in (0, 1)")
    return float(paired_p_values(worse, samples, margin, slack)[better])


def paired_p_values(worse: int, samples: int, margin: float = 0.0, slack: float = 0.01) -> npt.NDArray[np.float64]:
    """`paired_p_value` for 0, 1, ... better ones, as many as there may be: (samples - worse + 1,), never rising."""
    better = np.arange(samples - worse + 1)
    differing = worse + better
    if margin == 0:
        return np.asarray(binom.cdf(worse, differing, 0.5), dtype=np.float64)
    if samples == 0:
        return np.ones(1)
    most = np.ones(len(better))
    some = differing < samples
    most[some] = beta.ppf(1.0 - slack, differing[some] + 1, samples - differing[some])
    won = np.clip((1.0 - margin / most) / 2.0, 0.0, None)
    # As many better ones or more; of none there are always as many, but where the bound rules the hypothesis out.
    tail = np.where(most <= margin, 0.0, binom.sf(better - 1, differing, won))
    values: npt.NDArray[np.float64] = np.maximum.accumulate(np.minimum(1.0, slack + tail)[::-1])[::-1]
    return values


def betting_p_value(gains: npt.ArrayLike, margin: float = 0.0) -> float:
    r"""A p-value for "the mean gain is at most minus the margin", of gains in [-1, 1], by betting against it.

    Whoever stakes the share $\lambda$ on every sample has $\prod_i \big(1 + \lambda \frac{g_i + m}{1 - m}\big)$ in the
    end; under the hypothesis that is a supermartingale which begins at 1, so that its mean over some $\lambda$ is at
    least 1/p with probability p at most (Markov; Waudby-Smith and Ramdas, JRSS B 2024). The order of the samples does
    not matter, and neither do their variances have to be known.

    Args:
        gains: How much better the new model is on each sample, (n,), in [-1, 1]; clip losses before they are compared.
        margin: m, in [0, 1).

    Returns:
        In (0, 1]; 1 without samples.

    Raises:
        ValueError: A gain is out of range, or the margin is.

    Example:
        >>> betting_p_value([]), betting_p_value([-0.2] * 50)
        (1.0, 1.0)
        >>> round(betting_p_value([0.1] * 200), 5)
        0.0
    """
    values = np.asarray(gains, dtype=np.float64)
    if values.ndim != 1 or not bool((np.abs(values) <= 1).all()):
        raise ValueError("gains must be numbers in [-1, 1], one a sample")
    if not 0 <= margin < 1:
        raise ValueError(f"margin is {margin}, and must be in [0, 1)")
    payoffs = (values + margin) / (1.0 - margin)
    logarithms = np.log1p(np.outer(_STAKES, payoffs)).sum(axis=1)
    fortune = float(logsumexp(logarithms)) - math.log(len(_STAKES))
    return math.exp(min(0.0, -fortune))
