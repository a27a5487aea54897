"""What so many errors among so many samples say of an error rate, exactly: no large-sample approximation."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from scipy.special import betainc
from scipy.stats import beta

Counts = npt.ArrayLike


def error_p_value(errors: Counts, samples: Counts, alpha: float) -> npt.NDArray[np.float64]:
    r"""How likely so few errors are where the error rate is $\alpha$: $P(\mathrm{Bin}(m, \alpha) \le k)$.

    A p-value for "the error rate exceeds $\alpha$": the test that rejects where it is at most $\delta$ errs with
    probability $\delta$ at most, whatever m. Counts need not be whole, for forecasts of other sample sizes: the
    binomial distribution is taken in its form as an incomplete beta function.

    Args:
        errors: k, 0..m, any shape.
        samples: m, at least 0, of the same shape.
        alpha: $\alpha$, in (0, 1).

    Returns:
        p-values in [0, 1]; 1 where there are no samples.

    Example:
        >>> float(error_p_value(0, 45, 0.05).round(4))
        0.0994
    """
    k, m = np.asarray(errors, dtype=np.float64), np.asarray(samples, dtype=np.float64)
    wrong_at_times = k < m
    # Where all m are wrong, the incomplete beta function has no parameter, and the probability is 1.
    p: npt.NDArray[np.float64] = betainc(np.where(wrong_at_times, m - k, 1.0), k + 1.0, 1.0 - alpha)
    return np.where(wrong_at_times, p, 1.0)


def samples_without_error(alpha: float, delta: float) -> int:
    r"""How many samples without a single error show at level $\delta$ that the error rate is at most $\alpha$.

    Args:
        alpha: In (0, 1).
        delta: In (0, 1).

    Example:
        >>> [samples_without_error(alpha, 1 - 0.9 ** (1 / 3)) for alpha in (0.01, 0.02, 0.05, 0.1)]
        [335, 167, 66, 32]
    """
    least = math.ceil(math.log(delta) / math.log1p(-alpha))
    # The quotient of logarithms may round to either side of a whole number.
    return next(m for m in (least - 1, least, least + 1) if m >= 1 and (1.0 - alpha) ** m <= delta)


def clopper_pearson(errors: int, samples: int, level: float = 0.95) -> tuple[float, float]:
    """The two-sided interval of Clopper and Pearson (1934) for a rate of which `errors` of `samples` were seen.

    Args:
        errors: 0..samples.
        samples: At least 1.
        level: How sure, in (0, 1).

    Returns:
        Lower and upper end, in [0, 1].

    Raises:
        ValueError: The counts do not fit together.

    Example:
        >>> [round(end, 3) for end in clopper_pearson(50, 500)]
        [0.075, 0.13]
    """
    if not 0 <= errors <= samples or samples < 1:
        raise ValueError(f"{errors} errors of {samples} samples cannot be")
    tail = (1.0 - level) / 2.0
    low = 0.0 if errors == 0 else float(beta.ppf(tail, errors, samples - errors + 1))
    high = 1.0 if errors == samples else float(beta.ppf(1.0 - tail, errors + 1, samples - errors))
    return low, high
