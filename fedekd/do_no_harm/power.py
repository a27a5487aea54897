"""What a certificate can see: how likely a client takes a federated model of a given gain, exactly."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from scipy.stats import binom

from fedekd.do_no_harm.rule import DoNoHarm
from fedekd.functional.paired_tests import paired_p_values

#: Numbers of worse samples less likely than this are left out.
_NEGLIGIBLE = 1e-9


def acceptance_probability(rule: DoNoHarm, gain: float, differing: float, samples: int) -> float:
    """The probability that a client takes the federated model at one look.

    Where the gain is minus the margin or less, this is the probability of a false accept, and at most the rule's
    level; elsewhere it is the power of the test.

    Args:
        rule: When a client takes it; its `rule` must be `certified`.
        gain: True accuracy of the federated model less that of the local one, at most `differing` in size.
        differing: The probability that one of the two is right and the other wrong, in [0, 1].
        samples: Samples of the holdout split.

    Returns:
        A probability, up to 1e-6.

    Raises:
        ValueError: The numbers do not fit together.

    Example:
        >>> round(acceptance_probability(DoNoHarm(), gain=0.005, differing=0.05, samples=2300), 2)
        0.38
    """
    if not (abs(gain) <= differing <= 1 and samples >= 0):
        raise ValueError(f"a gain of {gain} where {differing} differ, on {samples} samples, cannot be")
    lost = (differing - gain) / 2.0
    won_elsewhere = (differing + gain) / 2.0 / (1.0 - lost) if lost < 1.0 else 0.0
    numbers = np.arange(samples + 1)
    likely = binom.pmf(numbers, samples, lost)
    total = 0.0
    for worse in numbers[likely > _NEGLIGIBLE].tolist():
        needed = _needed(rule, worse, samples)
        # Given those that are worse, the better ones are among the others.
        total += float(likely[worse] * binom.sf(needed - 1, samples - worse, won_elsewhere))
    return total


@lru_cache(maxsize=1 << 14)
def _needed(rule: DoNoHarm, worse: int, samples: int) -> int:
    """The least number of better ones that has the model taken; one more than there can be if none has."""
    refused = paired_p_values(worse, samples, rule.margin, rule.nuisance_level) > rule.level
    return int(refused.sum())
