"""Exact paired tests: against sums of fractions and loops over bets, and by enumeration of outcomes."""

from __future__ import annotations

import math
from fractions import Fraction
from functools import cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, binomtest, multinomial

from fedekd.functional import betting_p_value, betting_stake, paired_p_value
from fedekd.functional.binomial import clopper_pearson

MARGINS = (0.0, 0.05, 0.1, 0.3)
LEVELS = (0.01, 0.05, 0.1, 0.3)


def tail(wins: int, of: int, chance: Fraction) -> Fraction:
    """P(Bin(of, chance) >= wins), term by term."""
    return sum((math.comb(of, k) * chance**k * (1 - chance) ** (of - k) for k in range(wins, of + 1)), Fraction(0))


def upper_bound(differing: int, samples: int, slack: Fraction) -> Fraction:
    """Clopper and Pearson: the largest rate at which so few or fewer have probability `slack`, by bisection."""
    low, high = Fraction(0), Fraction(1)
    for _ in range(46):
        rate = (low + high) / 2
        seen = 1 - tail(differing + 1, samples, rate)
        low, high = (rate, high) if seen > slack else (low, rate)
    return high


def literal(worse: int, better: int, samples: int, margin: str, slack: str = "0.01") -> float:
    """The largest probability of as many wins over all rates of differing that the bound leaves, plus the slack."""
    differing, m = worse + better, Fraction(margin)
    if m == 0:
        return float(tail(better, differing, Fraction(1, 2)))  # by symmetry P(Bin(b + c, 1/2) <= b)
    bound = Fraction(1) if differing == samples else upper_bound(differing, samples, Fraction(slack))
    if bound < m:  # under the hypothesis p_b >= m: such rates of differing are none of its own
        return float(slack)
    return min(1.0, float(Fraction(slack) + tail(better, differing, (1 - m / bound) / 2)))


@pytest.mark.parametrize("worse", [0, 1, 2, 7, 20])
@pytest.mark.parametrize("better", [0, 1, 5, 16])
def test_paired_p_value_without_margin_is_sign_test(worse, better):
    found = paired_p_value(worse, better, 50)
    assert found == pytest.approx(literal(worse, better, 50, "0"), rel=1e-12)
    assert found == paired_p_value(worse, better, worse + better)  # samples on which they agree say nothing
    if worse + better:
        exact = binomtest(worse, worse + better, 0.5, alternative="less")
        assert found == pytest.approx(exact.pvalue, rel=1e-12)


@pytest.mark.parametrize(
    ("worse", "better", "samples", "margin"),
    [
        *[(0, 1, 1, "0.1"), (3, 0, 3, "0.2"), (2, 6, 8, "0.3"), (0, 30, 30, "0.5"), (0, 2, 60, "0.6")],
        *[(1, 5, 100, "0.02"), (4, 4, 60, "0.05"), (9, 1, 40, "0.1"), (7, 12, 90, "0.03"), (0, 3, 60, "0.05")],
        *[(5, 5, 100, "0.1"), (2, 3, 100, "0.25"), (12, 9, 45, "0.15"), (6, 0, 20, "0.25")],
    ],
)
def test_paired_p_value_with_margin_is_bound_and_tail(worse, better, samples, margin):
    for slack in ("0.01", "0.001"):
        found = paired_p_value(worse, better, samples, float(margin), float(slack))
        assert found == pytest.approx(literal(worse, better, samples, margin, slack), rel=1e-9)


def test_paired_p_value_without_samples_is_1():
    assert paired_p_value(0, 0, 0) == paired_p_value(0, 0, 0, margin=0.9) == 1.0
    assert paired_p_value(0, 0, 800) == 1.0  # nothing speaks against the old model


@pytest.mark.parametrize("worse", [0, 1, 5])
def test_paired_p_value_few_discordant_samples_exclude_margin(worse):
    """The bound on how often they differ is below the margin: the hypothesis is excluded, whoever won."""
    assert paired_p_value(worse, 0, 2300, margin=0.02) == pytest.approx(0.01)
    assert paired_p_value(worse, worse, 2300, margin=0.02) == pytest.approx(0.01)


@pytest.mark.parametrize("margin", [0.0, 0.02, 0.1, 0.3])
@pytest.mark.parametrize("samples", [20, 100, 300])
def test_paired_p_value_decreases_with_better(samples, margin):
    """More of those that only the old model gets right never help, more of the others never hurt."""
    sizes = range(min(samples, 40) // 2 + 1)
    p = np.array([[paired_p_value(b, c, samples, margin) for c in sizes] for b in sizes])
    assert (np.diff(p, axis=0) >= -1e-12).all()
    assert (np.diff(p, axis=1) <= 1e-12).all()
    assert ((p >= 0) & (p <= 1)).all()


counts = st.tuples(st.integers(0, 60), st.integers(0, 60), st.integers(0, 500))


@given(counts, st.floats(0.001, 0.9), st.floats(0.001, 0.9))
def test_paired_p_value_decreases_with_margin_and_concordant_samples(counts, one, other):
    worse, better, agreeing = counts
    samples, (low, high) = worse + better + agreeing, sorted((one, other))
    p = paired_p_value(worse, better, samples, low)
    assert paired_p_value(worse, better, samples, high) <= p + 1e-12
    assert paired_p_value(worse, better, samples + 10, low) <= p + 1e-12


def outcomes(samples: int) -> np.ndarray:
    """All (b, c, neither), (outcomes, 3)."""
    found = [(b, c, samples - b - c) for b in range(samples + 1) for c in range(samples + 1 - b)]
    return np.array(found)


@cache
def p_values(samples: int, margin: float, level: float) -> np.ndarray:
    return np.array([paired_p_value(b, c, samples, margin, level / 10) for b, c, _ in outcomes(samples).tolist()])


def false_accepts(samples: int, margin: float, level: float, differing: float) -> float:
    """The probability of a p-value of at most the level, where the difference of accuracies is minus the margin."""
    worse, better = (differing + margin) / 2, (differing - margin) / 2
    chances = multinomial.pmf(outcomes(samples), samples, [worse, better, 1 - worse - better])
    return float(chances[p_values(samples, margin, level) <= level].sum())


@pytest.mark.parametrize("margin", MARGINS)
@pytest.mark.parametrize("samples", [1, 5, 12, 30])
def test_paired_p_value_has_level_at_boundary(samples, margin):
    """Exactly: the sum over all outcomes, for rates of differing from the least that allows the margin to 1."""
    rates = [*np.linspace(margin, 1, 15), *(margin + np.array([1e-6, 0.01, 0.02]))]
    for level in LEVELS:
        assert max(false_accepts(samples, margin, level, rate) for rate in rates) <= level + 1e-12


def test_paired_p_value_is_not_too_conservative():
    assert max(false_accepts(30, 0.0, 0.1, rate) for rate in (0.5, 1.0)) > 0.045
    assert max(false_accepts(30, 0.3, 0.1, rate) for rate in (0.5, 1.0)) > 0.03


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((-1, 0, 5), "worse, better: expected .* got -1, 0"),
        ((0, -1, 5), "worse, better: expected"),
        ((3, 3, 5), "worse, better: expected"),
        ((1, 1, 5, -0.1), "margin: .* got -0.1"),
        ((1, 1, 5, 1.0), "margin: .* got 1.0"),
        ((1, 1, 5, math.nan), "margin: .* got nan"),
        ((1, 1, 5, 0.1, 0.0), "nuisance_level: .* got 0.0"),
        ((1, 1, 5, 0.1, 1.0), "nuisance_level: .* got 1.0"),
    ],
)
def test_paired_p_value_invalid_arguments_raise_value_error(arguments, words):
    with pytest.raises(ValueError, match=words):
        paired_p_value(*arguments)


STAKES = [0.005 * (0.9 / 0.005) ** (i / 15) for i in range(16)]


def fortune(gains, margin) -> float:
    """What 16 players have on average, who began with 1 and staked their share sample by sample."""
    ends = []
    for stake in STAKES:
        has = 1.0
        for gain in gains:
            has += stake * has * (gain + margin) / (1 - margin)
        ends.append(has)
    return sum(ends) / len(ends)


@given(st.lists(st.floats(-1, 1), max_size=60), st.floats(0, 0.9))
def test_betting_p_value_matches_loop(gains, margin):
    assert betting_p_value(gains, margin) == pytest.approx(min(1.0, 1 / fortune(gains, margin)), rel=1e-9)


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=30), st.floats(0, 0.8), st.floats(0, 0.8), st.randoms())
def test_betting_p_value_decreases_with_gains_and_margin_and_ignores_order(gains, one, other, random):
    low, high = sorted((one, other))
    p = betting_p_value(gains, low)
    assert 0 < p <= 1
    assert betting_p_value(gains, high) <= p + 1e-12
    assert betting_p_value([min(1.0, gain + 0.1) for gain in gains], low) <= p + 1e-12
    assert betting_p_value(random.sample(gains, len(gains)), low) == pytest.approx(p, rel=1e-9)


@pytest.mark.parametrize("margin", [0.0, 0.1])
@pytest.mark.parametrize("up", [1.0, 0.6, 0.1, 0.02])
@pytest.mark.parametrize("down", [1.0, 0.5])
def test_betting_p_value_has_level_at_boundary(up, down, margin):
    """Exactly: gains of two values whose mean is minus the margin, by the number of each."""
    for samples in (3, 40, 200):
        wins = np.arange(samples + 1)
        p = np.array([betting_p_value([up] * k + [-down] * (samples - k), margin) for k in wins.tolist()])
        chances = binom.pmf(wins, samples, (down - margin) / (up + down))
        for level in LEVELS:
            assert chances[p <= level].sum() <= level + 1e-12


@pytest.mark.parametrize("name", ["uniform", "skewed", "heavy", "mostly zero"])
def test_betting_p_value_has_level_for_other_distributions(name):
    """The laws are those of a finite pool, moved so that its mean is exactly minus the margin."""
    rng, margin, draws = np.random.default_rng(7), 0.05, 2000
    pool = {
        "uniform": rng.uniform(-0.9, 0.9, 5000),
        "skewed": rng.beta(0.3, 3, 5000),
        "heavy": np.clip(rng.standard_t(1.5, 5000) / 20, -0.9, 0.9),
        "mostly zero": rng.choice([0.0, 0.9, -0.3], 5000, p=[0.9, 0.025, 0.075]),
    }[name]
    pool = pool - pool.mean() - margin
    found = [betting_p_value(pool[rng.integers(5000, size=150)], margin) <= 0.1 for _ in range(draws)]
    assert clopper_pearson(sum(found), draws)[0] <= 0.1


def test_betting_p_value_constant_gains():
    assert betting_p_value([1.0] * 40) == pytest.approx(1 / np.mean([(1 + stake) ** 40 for stake in STAKES]))
    assert betting_p_value([1.0] * 100_000) < 1e-300
    for samples in (1, 1000, 200_000):
        assert betting_p_value(np.full(samples, -1.0)) == 1.0
        assert betting_p_value(np.full(samples, -1.0), margin=0.5) == 1.0
    assert betting_p_value([0.0] * 300) == 1.0
    assert betting_p_value([]) == betting_p_value([], margin=0.9) == 1.0


@pytest.mark.parametrize("gains", [[0.1, 1.01], [-1.01], [math.nan], [math.inf], [[0.1], [0.2]], 0.3])
def test_betting_p_value_invalid_gains_raise_value_error(gains):
    with pytest.raises(ValueError, match=r"numbers in \[-1, 1\]"):
        betting_p_value(gains)


@pytest.mark.parametrize("margin", [-0.1, 1.0, math.nan])
def test_betting_p_value_invalid_margin_raises_value_error(margin):
    with pytest.raises(ValueError, match=f"margin: .* got {margin}"):
        betting_p_value([0.1], margin)


@pytest.mark.parametrize("stake", [0.0, 1.0, -0.1, math.nan])
def test_betting_p_value_invalid_stake_raises_value_error(stake):
    with pytest.raises(ValueError, match=f"stake: .* got {stake}"):
        betting_p_value([0.1], 0.0, stake)


def test_betting_p_value_with_stake_is_one_bet():
    gains = [0.3, -0.2, 0.0, 0.9]
    assert betting_p_value(gains, 0.1, 0.4) == pytest.approx(1 / math.prod(1 + 0.4 * (g + 0.1) / 0.9 for g in gains))


def test_betting_stake_is_optimal_for_the_variance():
    payoffs = (np.array([0.2, -0.4, 0.1]) + 0.05) / 0.95
    variance = (0.25 + ((payoffs - payoffs.mean()) ** 2).sum()) / 4
    expected = math.sqrt(2 * math.log(10) / (500 * variance))
    assert betting_stake([0.2, -0.4, 0.1], 0.05, 500, 0.1) == pytest.approx(expected, rel=1e-12)
    assert betting_stake([], 0.0, 500, 0.1) == pytest.approx(math.sqrt(2 * math.log(10) / 125))
    assert betting_stake([0.0] * 10_000, 0.0, 3, 0.1) == 0.9
    assert betting_stake([0.1], 0.0, 0, 0.1) == 0.9


def test_betting_p_value_with_stake_of_other_samples_is_exact_and_more_powerful():
    """400 draws of 400 gains with standard deviation 0.1; the stake comes from 400 others."""
    rng = np.random.default_rng(3)
    for mean, least, most in ((0.0, 0.0, 0.11), (0.015, 0.6, 1.0)):
        draws = np.clip(mean + 0.1 * rng.standard_normal((400, 800)), -1, 1)
        staked = [betting_p_value(d[400:], 0.0, betting_stake(d[:400], 0.0, 400, 0.1)) <= 0.1 for d in draws]
        mixed = [betting_p_value(d[400:]) <= 0.1 for d in draws]
        assert least <= np.mean(staked) <= most
        assert np.mean(staked) >= np.mean(mixed)
