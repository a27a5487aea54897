"""Tests against slow transcriptions of their definitions."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedekd.benchmark.statistics import MIN_PAIRS, Ranking, holm, paired, rank, welch


def test_welch_is_the_test_of_two_samples() -> None:
    from scipy.stats import ttest_ind

    rng = np.random.default_rng(0)
    ours, theirs = rng.normal(0.3, 1.0, 7), rng.normal(0.0, 2.0, 10)
    wanted = ttest_ind(ours, theirs, equal_var=False).pvalue
    assert welch(list(ours), theirs.mean(), theirs.std(ddof=1), 10) == pytest.approx(wanted, rel=1e-12)


def test_welch_without_spread() -> None:
    assert welch([0.5, 0.5, 0.5], 0.5, 0.0, 10) == 1.0
    assert welch([0.5, 0.5, 0.5], 0.6, 0.0, 10) == 0.0


def literal_wilcoxon(differences: list[float]) -> float:
    """The share of all 2^n signings whose rank sum is as far out as the one seen."""
    order = sorted(range(len(differences)), key=lambda i: abs(differences[i]))
    ranks = {place: position + 1 for position, place in enumerate(order)}
    middle = sum(ranks.values()) / 2
    seen = abs(sum(ranks[i] for i, value in enumerate(differences) if value > 0) - middle)
    signings = list(product((0, 1), repeat=len(differences)))
    far = sum(abs(sum(ranks[i] * sign for i, sign in enumerate(signs)) - middle) >= seen for signs in signings)
    return far / len(signings)


@given(st.lists(st.integers(1, 10_000), min_size=6, max_size=9, unique=True), st.integers(0, 511))
def test_wilcoxon_is_exact(sizes: list[int], signs: int) -> None:
    differences = [size * (1 if signs >> place & 1 else -1) / 1024 for place, size in enumerate(sizes)]
    result = paired(dict(enumerate(differences)), dict.fromkeys(range(len(differences)), 0.0))
    assert result.p == pytest.approx(literal_wilcoxon(differences), rel=1e-9)
    assert result.difference == pytest.approx(sum(differences) / len(differences))


def test_pairs_are_by_seed_and_too_few_make_no_test() -> None:
    first = {seed: float(seed) for seed in range(10)}
    second = {seed: 0.0 for seed in range(4, 20)}
    result = paired(first, second)
    assert (result.pairs, result.difference) == (MIN_PAIRS, 6.5)
    assert result.p == 2 / 2**MIN_PAIRS
    assert paired(first, {0: 1.0}).p is None
    assert math.isnan(paired(first, {99: 1.0}).difference)
    assert paired(first, first).p == 1.0
    assert paired({**first, 3: math.nan}, first).p is None


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_adjusts_step_down(values: list[float]) -> None:
    adjusted = holm(values)
    ordered = sorted(values)
    for value, result in zip(values, adjusted, strict=True):
        # Holm's own words: the largest of (m - j + 1) p_(j) over all p_(j) up to this one.
        m, upto = len(values), [j for j, other in enumerate(ordered) if other <= value]
        assert result == pytest.approx(min(1.0, max((m - j) * ordered[j] for j in upto)))


#: Demsar 2006, Table 5(a): q at 5% for 3 to 10 methods.
Q = {3: 2.343, 4: 2.569, 5: 2.728, 6: 2.850, 7: 2.949, 8: 3.031, 9: 3.102, 10: 3.164}


@pytest.mark.parametrize("methods", Q)
def test_the_critical_difference_is_demsars(methods: int) -> None:
    scores = {str(i): list(np.random.default_rng(i).random(14)) for i in range(methods)}
    wanted = Q[methods] * math.sqrt(methods * (methods + 1) / (6 * 14))
    assert rank(scores, True).critical_difference == pytest.approx(wanted, rel=5e-4)


@given(st.lists(st.tuples(*[st.integers(0, 4)] * 4), min_size=2, max_size=9))
def test_mean_ranks_literally(table: list[tuple[int, ...]]) -> None:
    names = "abcd"
    scores = {name: [line[i] / 4 for line in table] for i, name in enumerate(names)}
    ranking = rank(scores, higher_is_better=True)
    for i, name in enumerate(names):
        # One, and one for each that is better, and half for each other that is as good.
        ranks = [1 + sum(v > line[i] for v in line) + (sum(v == line[i] for v in line) - 1) / 2 for line in table]
        assert ranking.mean_ranks[name] == pytest.approx(sum(ranks) / len(ranks))
    assert list(ranking.mean_ranks.values()) == sorted(ranking.mean_ranks.values())
    assert 0 <= ranking.p <= 1


def test_groups_are_the_largest_and_lower_can_be_better() -> None:
    scores = {name: [base + 0.001 * i for i in range(30)] for name, base in (("a", 0.0), ("b", 1.0), ("c", 2.0))}
    ranking = rank(scores, higher_is_better=False)
    assert dict(ranking.mean_ranks) == {"a": 1.0, "b": 2.0, "c": 3.0}
    assert ranking.alike() == []
    ranks = {"a": 1.0, "b": 1.4, "c": 2.1, "d": 2.2, "e": 4.0}
    assert Ranking(ranks, 9, 0.01, 1.0).alike() == [("a", "b"), ("b", "c", "d")]
    assert Ranking(ranks, 9, 0.01, 3.0).alike() == [("a", "b", "c", "d", "e")]
    assert list(rank(scores, higher_is_better=True).mean_ranks) == ["c", "b", "a"]
    assert rank({name: [0.5] * 4 for name in "abc"}, True).p == 1.0
    with pytest.raises(ValueError, match="3 methods"):
        rank({"a": [1.0, 2.0], "b": [1.0, 2.0]}, True)
