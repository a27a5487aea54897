"""Statistical tests, compared with literal transcriptions of their definitions."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import ttest_ind

from experiments.fedekd_paper.statistics import MIN_PAIRS, Ranking, holm, rank, signed_rank, welch


def test_welch_equals_the_test_of_two_samples() -> None:
    rng = np.random.default_rng(0)
    measured, published = rng.normal(0.3, 1.0, 7), rng.normal(0.0, 2.0, 10)
    expected = ttest_ind(measured, published, equal_var=False).pvalue
    assert welch(list(measured), published.mean(), published.std(ddof=1), 10) == pytest.approx(expected, rel=1e-12)


def test_welch_without_spread_compares_means() -> None:
    assert welch([0.5, 0.5, 0.5], 0.5, 0.0, 10) == 1.0
    assert welch([0.5, 0.5, 0.5], 0.6, 0.0, 10) == 0.0


def literal_wilcoxon(differences: list[float]) -> float:
    """Return the share of all 2^n signs whose rank sum is at least as extreme as the observed one."""
    order = sorted(range(len(differences)), key=lambda i: abs(differences[i]))
    ranks = {place: position + 1 for position, place in enumerate(order)}
    middle = sum(ranks.values()) / 2
    seen = abs(sum(ranks[i] for i, value in enumerate(differences) if value > 0) - middle)
    signings = list(product((0, 1), repeat=len(differences)))
    far = sum(abs(sum(ranks[i] * sign for i, sign in enumerate(signs)) - middle) >= seen for signs in signings)
    return far / len(signings)


@given(st.lists(st.integers(1, 10_000), min_size=6, max_size=9, unique=True), st.integers(0, 511))
def test_signed_rank_is_exact(sizes: list[int], signs: int) -> None:
    differences = [size * (1 if signs >> place & 1 else -1) / 1024 for place, size in enumerate(sizes)]
    assert signed_rank(differences) == pytest.approx(literal_wilcoxon(differences), rel=1e-9)


def test_signed_rank_with_too_few_or_diverged_runs_is_nan() -> None:
    values = [float(value) for value in range(1, 1 + MIN_PAIRS)]
    assert signed_rank(values) == 2 / 2**MIN_PAIRS
    assert signed_rank([0.0] * MIN_PAIRS) == 1.0
    assert math.isnan(signed_rank(values[1:]))
    assert math.isnan(signed_rank([*values, math.nan]))


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_equals_its_definition(values: list[float]) -> None:
    adjusted = holm(values)
    assert holm([math.nan, *values])[1:] == adjusted
    ordered = sorted(values)
    for value, result in zip(values, adjusted, strict=True):
        # The largest of (m - j + 1) p_(j) over all p_(j) up to this one.
        m, upto = len(values), [j for j, other in enumerate(ordered) if other <= value]
        assert result == pytest.approx(min(1.0, max((m - j) * ordered[j] for j in upto)))


#: Demsar 2006, Table 5(a): q at 5% for 3 to 10 methods.
Q = {3: 2.343, 4: 2.569, 5: 2.728, 6: 2.850, 7: 2.949, 8: 3.031, 9: 3.102, 10: 3.164}


@pytest.mark.parametrize("methods", Q)
def test_rank_critical_difference_equals_demsars_table(methods: int) -> None:
    scores = {str(i): list(np.random.default_rng(i).random(14)) for i in range(methods)}
    expected = Q[methods] * math.sqrt(methods * (methods + 1) / (6 * 14))
    assert rank(scores, True).critical_difference == pytest.approx(expected, rel=5e-4)


@given(st.lists(st.tuples(*[st.integers(0, 4)] * 4), min_size=2, max_size=9))
def test_rank_mean_ranks_equal_their_definition(table: list[tuple[int, ...]]) -> None:
    names = "abcd"
    scores = {name: [line[i] / 4 for line in table] for i, name in enumerate(names)}
    ranking = rank(scores, higher_is_better=True)
    for i, name in enumerate(names):
        # 1, plus 1 for each better method, plus 1/2 for each equal one.
        ranks = [1 + sum(v > line[i] for v in line) + (sum(v == line[i] for v in line) - 1) / 2 for line in table]
        assert ranking.mean_ranks[name] == pytest.approx(sum(ranks) / len(ranks))
    assert list(ranking.mean_ranks.values()) == sorted(ranking.mean_ranks.values())
    assert 0 <= ranking.p <= 1


def test_ranking_groups_are_maximal_in_both_directions() -> None:
    scores = {name: [base + 0.001 * i for i in range(30)] for name, base in (("a", 0.0), ("b", 1.0), ("c", 2.0))}
    ranking = rank(scores, higher_is_better=False)
    assert dict(ranking.mean_ranks) == {"a": 1.0, "b": 2.0, "c": 3.0}
    assert ranking.groups() == []
    ranks = {"a": 1.0, "b": 1.4, "c": 2.1, "d": 2.2, "e": 4.0}
    assert Ranking(ranks, 9, 0.01, 1.0).groups() == [("a", "b"), ("b", "c", "d")]
    assert Ranking(ranks, 9, 0.01, 3.0).groups() == [("a", "b", "c", "d", "e")]
    assert list(rank(scores, higher_is_better=True).mean_ranks) == ["c", "b", "a"]
    assert rank({name: [0.5] * 4 for name in "abc"}, True).p == 1.0
    with pytest.raises(ValueError, match="3 methods"):
        rank({"a": [1.0, 2.0], "b": [1.0, 2.0]}, True)
