"""Level and power of the exact tests, against sums over all outcomes."""

from __future__ import annotations

from itertools import product
from math import comb

import pytest

from experiments.exact_test.__main__ import level_row, neyman_pearson_power, power_bound, power_row
from fedekd.do_no_harm import DoNoHarm


def outcomes(samples: int, differing: float, gain: float) -> dict[tuple[int, int], float]:
    """Return the trinomial probability of each pair of counts, worse and better."""
    worse_rate, better_rate = (differing - gain) / 2, (differing + gain) / 2
    return {
        (worse, better): comb(samples, worse)
        * comb(samples - worse, better)
        * worse_rate**worse
        * better_rate**better
        * (1 - differing) ** (samples - worse - better)
        for worse, better in product(range(samples + 1), repeat=2)
        if worse + better <= samples
    }


def literal_power(samples: int, null: tuple[float, float], alternative: tuple[float, float], level: float) -> float:
    """Most powerful randomised test: outcomes enter by their likelihood ratio until the level is spent."""
    sizes, powers = (outcomes(samples, sum(rates), rates[1] - rates[0]) for rates in (null, alternative))

    def ratio(outcome: tuple[int, int]) -> float:
        return powers[outcome] / sizes[outcome] if sizes[outcome] else float("inf")

    power, left = 0.0, level
    for outcome in sorted(sizes, key=ratio, reverse=True):
        share = min(1.0, left / sizes[outcome]) if sizes[outcome] else 1.0
        power += share * powers[outcome]
        left -= share * sizes[outcome]
    return power


@pytest.mark.parametrize(
    ("samples", "null", "alternative"),
    [(12, (0.15, 0.15), (0.1, 0.2)), (15, (0.125, 0.075), (0.09, 0.11)), (9, (0.1, 0.0), (0.02, 0.08))],
)
def test_neyman_pearson_power_equals_sum_over_sorted_outcomes(
    samples: int, null: tuple[float, float], alternative: tuple[float, float]
) -> None:
    expected = literal_power(samples, null, alternative, 0.1)
    assert neyman_pearson_power(samples, null, alternative, 0.1) == pytest.approx(expected, abs=1e-9)


def test_power_bound_is_the_smallest_over_rates() -> None:
    alternative = (0.06, 0.14)
    powers = [
        literal_power(12, ((rate + 0.05) / 2, (rate - 0.05) / 2), alternative, 0.1) for rate in (0.06, 0.1, 0.2, 0.3)
    ]
    assert power_bound(12, 0.05, 0.2, 0.08, 0.1) <= min(powers) + 1e-9


@pytest.mark.parametrize(("samples", "margin", "gain"), [(40, 0.0, 0.1), (40, 0.02, 0.05)])
def test_power_of_valid_tests_is_below_bound(samples: int, margin: float, gain: float) -> None:
    row = power_row(samples, margin, 0.15, gain)
    assert 0 < row["sign"] <= row["unconditional"] <= row["bound"] + 1e-6


@pytest.mark.parametrize(("margin", "level"), [(0.0, 0.1), (0.02, 0.05)])
def test_level_row_equals_sum_over_accepted_outcomes(margin: float, level: float) -> None:
    row, rule = level_row(14, margin, level), DoNoHarm(confidence=1 - level, margin=margin)
    wrong = sum(
        probability
        for outcome, probability in outcomes(14, row["differing"], -margin).items()
        if rule.p_value(*outcome, 14) <= rule.level
    )
    assert row["worst"] == pytest.approx(wrong, abs=1e-6)
    assert row["worst"] <= level
