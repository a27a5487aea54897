"""What a certificate can see: how likely a client takes a federated model of a given gain, exactly."""

from __future__ import annotations

import numpy as np
from scipy.stats import binom

from fedekd.certificates.do_no_harm import DoNoHarm
from fedekd.functional import paired_p_value

#: Numbers of differing samples less likely than this are left out.
_NEGLIGIBLE = 1e-9


def acceptance(rule: DoNoHarm, gain: float, differing: float, samples: int) -> float:
    """The probability that a client takes the federated model at one look.

    Where the gain is minus the margin or less, this is the probability of a false accept, and at most the rule's
    level; elsewhere it is the power of the test.

    Args:
        rule: When a client takes it; its `keep` must be `certified`.
        gain: True accuracy of the federated model less that of the local one, at most `differing` in size.
        differing: The probability that one of the two is right and the other wrong, in [0, 1].
        samples: Samples of the certificate split.

    Returns:
        A probability, up to 1e-6.

    Raises:
        ValueError: The numbers do not fit together.

    Example:
        >>> round(acceptance(DoNoHarm(), gain=0.005, differing=0.05, samples=2300), 2)
        0.38
    """
    if not (abs(gain) <= differing <= 1 and samples >= 0):
        raise ValueError(f"a gain of {gain} where {differing} differ, on {samples} samples, cannot be")
    if differing == 0:
        return float(paired_p_value(0, 0, samples, rule.margin, rule.level / 10) <= rule.level)
    better = (1.0 + gain / differing) / 2.0
    numbers = np.arange(samples + 1)
    likely = binom.pmf(numbers, samples, differing)
    total = 0.0
    for number, probability in zip(numbers[likely > _NEGLIGIBLE], likely[likely > _NEGLIGIBLE], strict=True):
        needed = _needed(rule, int(number), samples)
        if needed <= number:
            total += float(probability * binom.sf(needed - 1, number, better))
    return total


def _needed(rule: DoNoHarm, differing: int, samples: int) -> int:
    """The least number of better ones, of those that differ, that has the model taken; one more than all for none."""
    low, high = 0, differing + 1
    while low < high:  # the more are better, the lower is the p-value
        middle = (low + high) // 2
        taken = paired_p_value(differing - middle, middle, samples, rule.margin, rule.level / 10) <= rule.level
        low, high = (low, middle) if taken else (middle + 1, high)
    return low
