"""Exact binomial tests and intervals of an error rate, for every sample size."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.special import betainc
from scipy.stats import binomtest

Counts = npt.ArrayLike


def error_p_value(errors: Counts, samples: Counts, target_risk: float) -> npt.NDArray[np.float64]:
    r"""Compute the binomial p-value for "the error rate exceeds the target risk".

    $$p = P(\mathrm{Bin}(m, r) \le k) = I_{1 - r}(m - k, k + 1)$$

    with I the regularised incomplete beta function. Rejecting where p is at most $\delta$ has an error probability of
    at most $\delta$ for every m. Counts may be fractional, to forecast other sample sizes.

    Args:
        errors: k, in [0, m], any shape.
        samples: m, at least 0, of the same shape.
        target_risk: r, in (0, 1).

    Returns:
        p-values in [0, 1], float64; 1 if there are no samples.

    Example:
        >>> float(error_p_value(0, 45, 0.05).round(4))
        0.0994
    """
    k, m = np.asarray(errors, dtype=np.float64), np.asarray(samples, dtype=np.float64)
    some_correct = k < m
    # If all m are errors, the beta function is undefined and the probability is 1.
    p: npt.NDArray[np.float64] = betainc(np.where(some_correct, m - k, 1.0), k + 1.0, 1.0 - target_risk)
    return np.where(some_correct, p, 1.0)


def clopper_pearson(errors: int, samples: int, confidence: float = 0.95) -> tuple[float, float]:
    """Compute the exact two-sided confidence interval of an error rate.

    Args:
        errors: Number of errors, in 0..samples.
        samples: Number of samples, at least 1.
        confidence: Confidence level, in (0, 1).

    Returns:
        Lower and upper limit, in [0, 1].

    Raises:
        ValueError: If a count is out of range.

    Example:
        >>> [round(limit, 3) for limit in clopper_pearson(50, 500)]
        [0.075, 0.13]

    Reference:
        Clopper and Pearson, Biometrika 1934; computed by `scipy.stats.binomtest`.
    """
    interval = binomtest(errors, samples).proportion_ci(confidence_level=confidence, method="exact")
    return float(interval.low), float(interval.high)
