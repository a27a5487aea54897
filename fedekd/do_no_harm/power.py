"""Power of the do-no-harm test, and numbers of samples that it needs."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
from scipy.stats import binom

from fedekd.do_no_harm.rule import DoNoHarm
from fedekd.functional.paired_tests import paired_p_values
from fedekd.functional.unconditional_test import critical_better_counts, outcome_p_value

#: Counts with a smaller probability are omitted.
_NEGLIGIBLE = 1e-9

#: Largest number of samples that is searched.
MOST_SAMPLES = 100_000


def acceptance_probability(rule: DoNoHarm, gain: float, differing: float, samples: int) -> float:
    """Compute the exact probability that a client deploys the federated model.

    For a gain of at most minus the margin this is the probability of a wrong decision, at most `rule.level`; for a
    larger gain it is the power of the test. It refers to one comparison of two classifiers.

    Args:
        rule: The decision rule; its `rule` must be `certified`.
        gain: True accuracy of the federated model minus that of the local model, in [-differing, differing].
        differing: Probability that exactly one of the two models is correct, in [0, 1].
        samples: Number of compared samples, at least 0.

    Returns:
        The probability, with an error of at most 1e-6.

    Raises:
        ValueError: An argument is out of its range.

    Example:
        >>> round(acceptance_probability(DoNoHarm(), gain=0.005, differing=0.05, samples=2300), 2)
        0.41
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


def fewest_samples(rule: DoNoHarm) -> int:
    """Compute the fewest samples with which a certified comparison can accept.

    With fewer samples the local model is deployed even if only the federated one is ever correct.

    Args:
        rule: The decision rule.

    Example:
        >>> fewest_samples(DoNoHarm(confidence=0.9)), fewest_samples(DoNoHarm(confidence=0.9, margin=0.05))
        (4, 4)
    """
    p_value = _plain_p_value(rule)
    return _first(lambda samples: p_value(0, samples, samples) <= rule.level, 1, MOST_SAMPLES) or MOST_SAMPLES


def deciding_samples(rule: DoNoHarm, worse: int, better: int, samples: int) -> int | None:
    """Estimate how many samples would accept, at the observed rates.

    The search is by bisection. Counts are rounded to whole samples, so some smaller numbers may accept, too. If the
    observed rates are the true ones, about half of all draws of so many samples accept.

    Args:
        rule: The decision rule; its `rule` must be `certified`.
        worse: Samples that only the local model classifies correctly.
        better: Samples that only the federated model classifies correctly.
        samples: All compared samples, at least 1.

    Returns:
        The number, `samples` if they accept; None if the search finds none up to 100,000, as where the gain does not
        exceed minus the margin.

    Example:
        >>> deciding_samples(DoNoHarm(), worse=4, better=6, samples=702), deciding_samples(DoNoHarm(), 0, 0, 195)
        (2984, None)
    """
    p_value = _plain_p_value(rule)

    def accepts(number: int) -> bool:
        scale = number / samples
        counts = round(worse * scale), round(better * scale)
        return p_value(min(counts[0], number - counts[1]), counts[1], number) <= rule.level

    if rule.p_value(worse, better, samples) <= rule.level:
        return samples
    has_gain = better - worse + samples * rule.margin > 0
    return _first(accepts, samples + 1, MOST_SAMPLES) if has_gain else None


def _plain_p_value(rule: DoNoHarm) -> Callable[[int, int, int], float]:
    """Return the test without the maximum over other outcomes, for searches."""
    if rule.test == "sign":
        return rule.p_value
    return lambda worse, better, samples: outcome_p_value(worse, better, samples, rule.margin, rule.nuisance_level)


def _first(is_enough: Callable[[int], bool], start: int, limit: int) -> int | None:
    """Return the first number that is enough, by doubling and bisection."""
    low, high = start - 1, start
    while not is_enough(high):
        if high >= limit:
            return None
        low, high = high, min(2 * high, limit)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if is_enough(middle) else (middle, high)
    return high


@lru_cache(maxsize=1 << 14)
def _min_better(rule: DoNoHarm, worse: int, samples: int) -> int:
    """Minimum of better samples for acceptance; samples - worse + 1 if none."""
    if rule.test == "sign":
        is_rejected = paired_p_values(worse, samples, rule.margin, rule.nuisance_level) > rule.level
        return int(is_rejected.sum())
    critical = critical_better_counts(samples, rule.margin, rule.level, rule.nuisance_level)
    # With d differing samples, at most d - critical[d] may be worse, which never decreases with d.
    return int(np.searchsorted(np.arange(samples + 1) - critical, worse)) - worse
