"""Power of the do-no-harm test."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from scipy.stats import binom

from fedekd.do_no_harm.rule import DoNoHarm
from fedekd.functional.paired_tests import paired_p_values

#: Counts with a smaller probability are omitted.
_NEGLIGIBLE = 1e-9


def acceptance_probability(rule: DoNoHarm, gain: float, differing: float, samples: int) -> float:
    """Compute the exact probability that a client deploys the federated model.

    For a gain of at most minus the margin this is the probability of a wrong decision, at most `rule.level`; for a
    larger gain it is the power of the test. It refers to one comparison of two classifiers.

    Args:
        rule: The decision rule; its `rule` must be `certified`.
        gain: True accuracy of the federated model minus that of the local model, in [-differing, differing].
        differing: Probability that exactly one of the two models is correct, in [0, 1].
        samples: Number of samples of the holdout split, at least 0.

    Returns:
        The probability, with an error of at most 1e-6.

    Raises:
        ValueError: An argument is out of its range.

    Example:
        >>> round(acceptance_probability(DoNoHarm(), gain=0.005, differing=0.05, samples=2300), 2)
        0.38
    """
    if not (abs(gain) <= differing <= 1 and samples >= 0):
        raise ValueError(
            "gain, differing and samples: expected |gain| <= differing <= 1 and samples >= 0, got"
            f" {gain}, {differing} and {samples}"
        )
    worse_rate = (differing - gain) / 2.0
    better_rate = (differing + gain) / 2.0 / (1.0 - worse_rate) if worse_rate < 1.0 else 0.0
    counts = np.arange(samples + 1)
    probabilities = binom.pmf(counts, samples, worse_rate)
    total = 0.0
    for worse in counts[probabilities > _NEGLIGIBLE].tolist():
        # Given the number of worse samples, the better ones are binomial among the rest.
        accepted = binom.sf(_min_better(rule, worse, samples) - 1, samples - worse, better_rate)
        total += float(probabilities[worse] * accepted)
    return total


@lru_cache(maxsize=1 << 14)
def _min_better(rule: DoNoHarm, worse: int, samples: int) -> int:
    """Minimum of better samples for acceptance; samples - worse + 1 if none."""
    is_rejected = paired_p_values(worse, samples, rule.margin, rule.nuisance_level) > rule.level
    return int(is_rejected.sum())
