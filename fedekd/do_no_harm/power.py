"""Power of the do-no-harm test, and numbers of samples that it needs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache, partial

import numpy as np
import numpy.typing as npt
from scipy.stats import binom, norm

from fedekd.do_no_harm.evidence import METRICS, Evidence
from fedekd.do_no_harm.rule import DoNoHarm
from fedekd.functional.metric_tests import LARGEST_STAKE, plugin_betting_p_value
from fedekd.functional.paired_tests import betting_p_value, betting_stake, paired_p_values
from fedekd.functional.unconditional_test import critical_better_counts, outcome_p_value
from fedekd.tasks import Task

#: Counts with a smaller probability are omitted.
_NEGLIGIBLE = 1e-9

#: Largest number of samples that is searched.
MOST_SAMPLES = 100_000


def acceptance_probability(rule: DoNoHarm, gain: float, differing: float, samples: int) -> float:
    """Compute the exact probability that a client deploys the federated model.

    For a gain of at most minus the margin this is the probability of a wrong decision, at most `rule.level`; for a
    larger gain it is the power of the test. It refers to one comparison of two classifiers in accuracy. In AUROC of
    two classes the arguments are those of the pairs, and `recall_acceptance` has the probability in recall.

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
    better_rate = min(1.0, (differing + gain) / 2.0 / (1.0 - worse_rate)) if worse_rate < 1.0 else 0.0
    counts = np.arange(samples + 1)
    probabilities = binom.pmf(counts, samples, worse_rate)
    total = 0.0
    for worse in counts[probabilities > _NEGLIGIBLE].tolist():
        # Given the number of worse samples, the better ones are binomial among the rest.
        accepted = binom.sf(_min_better(rule, worse, samples) - 1, samples - worse, better_rate)
        total += float(probabilities[worse] * accepted)
    return total


def recall_acceptance(
    rule: DoNoHarm, gains: Sequence[float], differing: Sequence[float], samples: Sequence[int]
) -> float:
    """Compute the exact probability that all classes are accepted in recall.

    The samples of different classes are independent, so it is the product of `acceptance_probability`.

    Args:
        rule: The decision rule; its `rule` must be `certified`.
        gains: True recall of the federated model minus that of the local model, per class.
        differing: Probability that exactly one of the two models is correct, per class.
        samples: Number of compared samples, per class.

    Example:
        >>> rule = DoNoHarm(metric="recall", margin=0.05)
        >>> round(recall_acceptance(rule, [0.0, 0.02], [0.05, 0.1], [100, 60]), 2)
        0.44
    """
    rows = zip(gains, differing, samples, strict=True)
    return math.prod(acceptance_probability(rule, *row) for row in rows)


def estimate_acceptance(rule: DoNoHarm, gains: npt.ArrayLike, samples: int, draws: int = 2000, seed: int = 0) -> float:
    """Estimate the probability of acceptance by a betting test, from simulated draws.

    Regression and balanced accuracy have no finite set of outcomes to sum over. The standard error is at most
    1 / (2 sqrt(draws)).

    Args:
        rule: The decision rule; its `rule` must be `certified`.
        gains: Values of the tested quantity, which are drawn with replacement, shape (k,): differences of squared
            errors in units of `rule.clip`, or `balanced_gains`, in [-1, 1].
        samples: Number of values per draw.
        draws: Number of draws, at least 1.
        seed: Seed of the draws.

    Example:
        >>> round(estimate_acceptance(DoNoHarm(), [0.1, -0.05], 60, draws=200), 2)
        0.01
    """
    values, generator = np.asarray(gains, dtype=np.float64), np.random.default_rng(seed)
    p_value = _betting(rule, values)
    accepted = sum(p_value(generator.choice(values, samples)) <= rule.level for _ in range(draws))
    return accepted / draws


def _betting(rule: DoNoHarm, gains: npt.NDArray[np.float64]) -> Callable[[npt.NDArray[np.float64]], float]:
    """Return the betting test of the rule; a stake is chosen by the gains."""
    if rule.metric != "accuracy":
        return lambda drawn: plugin_betting_p_value(drawn, rule.margin, rule.level)
    margin = rule.margin / rule.clip
    if not rule.takes_stake:
        return lambda drawn: betting_p_value(drawn, margin)
    return lambda drawn: betting_p_value(drawn, margin, betting_stake(gains, margin, len(drawn), rule.level))


def deciding_gains(rule: DoNoHarm, gains: npt.ArrayLike) -> int | None:
    """Estimate how many values a betting test needs, if those observed repeat.

    The observed ones must have been rejected: the number is larger than theirs.

    Args:
        rule: The decision rule; its `rule` must be `certified`.
        gains: Observed values, see `estimate_acceptance`.

    Returns:
        The number; None if the search finds none up to 100,000, as where the mean does not exceed minus the margin.

    Example:
        >>> deciding_gains(DoNoHarm(), [0.1, -0.05] * 20), deciding_gains(DoNoHarm(), [0.0] * 20)
        (115, None)
    """
    values = np.asarray(gains, dtype=np.float64)
    margin = rule.margin / (rule.clip if rule.metric == "accuracy" else 1.0)
    if not len(values) or values.mean() <= -margin:
        return None
    p_value = _betting(rule, values)
    start = len(values) + 1
    return _first(lambda number: p_value(np.resize(values, number)) <= rule.level, start, MOST_SAMPLES)


def deciding_parts(rule: DoNoHarm, evidence: Evidence) -> int | None:
    """Estimate how many samples let every test of the evidence accept.

    At the number of `deciding_samples` one test accepts in half of all draws. For the m tests that do not accept yet to
    accept together in at least half of them, each must with probability $q = 2^{-1/m}$. By the normal
    approximation it does at $(1 + z_q / z_{1-level})^2$ times this number.

    Args:
        rule: The decision rule; its `rule` must be `certified`.
        evidence: Evidence with the outcomes of its tests.

    Returns:
        The number over all tests, at the observed shares of the tests; None if one of them finds none.
    """
    ratios: list[float] = []
    for part in evidence.parts:
        found = deciding_samples(rule, *part) if part.samples else None
        if found is None:
            return None
        ratios.append(found / part.samples)
    rejected = [ratio for ratio in ratios if ratio > 1]
    critical, joint = norm.isf(rule.level), norm.ppf(0.5 ** (1 / max(len(rejected), 1)))
    more = (1 + joint / critical) ** 2 if critical > 0 else 1.0
    scale = max([1.0, *(more * ratio for ratio in rejected)])
    return math.ceil(scale * sum(part.samples for part in evidence.parts))


def fewest_samples(rule: DoNoHarm, task: Task = "classification", num_classes: int = 2) -> int:
    """Compute the fewest samples with which a certified comparison can accept.

    With fewer samples the local model is deployed even if only the federated one is ever correct. For a metric of
    classes it is the number of samples of each class. `auroc_delong` has no such bound; it needs 2 samples of each
    class for a variance.

    Args:
        rule: The decision rule.
        task: `classification` or `regression`.
        num_classes: Classes of the task; the test of `auroc` depends on whether they are two.

    Example:
        >>> fewest_samples(DoNoHarm(confidence=0.9)), fewest_samples(DoNoHarm(confidence=0.9, margin=0.05))
        (4, 4)
        >>> fewest_samples(DoNoHarm(metric="balanced_accuracy")), fewest_samples(DoNoHarm(metric="auroc_delong"))
        (4, 2)
        >>> fewest_samples(DoNoHarm(), "regression")
        4
    """
    if not METRICS[rule.metric].is_exact:
        return 2
    if task == "regression":
        stake = LARGEST_STAKE if rule.takes_stake else None
        margin = rule.margin / rule.clip
        found = _first(lambda number: betting_p_value(np.ones(number), margin, stake) <= rule.level, 1, MOST_SAMPLES)
        return found or MOST_SAMPLES
    if rule.metric == "balanced_accuracy" or (rule.metric == "auroc" and num_classes > 2):
        can_accept = partial(_accepts_ones, rule)
        return _first(can_accept, 1, MOST_SAMPLES) or MOST_SAMPLES
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


def _accepts_ones(rule: DoNoHarm, number: int) -> bool:
    """Return True if as many gains of 1 accept."""
    return plugin_betting_p_value(np.ones(number), rule.margin, rule.level) <= rule.level


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
