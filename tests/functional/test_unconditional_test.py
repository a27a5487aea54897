"""Exact unconditional test: against the enumeration of all outcomes, and its level over the nuisance parameter."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.stats import beta, binom, multinomial

from fedekd.functional import paired_p_value, unconditional_p_value
from fedekd.functional.unconditional_test import critical_better_counts, outcome_p_value, score_statistic

MARGINS = (0.0, 0.02, 0.3)


def literal_score(worse: int, better: int, samples: int, margin: float) -> float:
    """Tango's statistic with the estimate of p_c as in his paper (1998), equation 7."""
    quadratic = 2 * samples
    linear = -worse - better + (2 * samples - worse + better) * margin
    constant = -better * margin * (1 - margin)
    p_c = (math.sqrt(linear**2 - 4 * quadratic * constant) - linear) / (2 * quadratic)
    variance = samples * (2 * p_c + margin * (1 - margin))
    return (better - worse + samples * margin) / math.sqrt(variance) if variance > 0 else 0.0


def outcomes(samples: int) -> np.ndarray:
    """All (worse, better), shape (outcomes, 2)."""
    return np.array([(b, d - b) for d in range(samples + 1) for b in range(d + 1)])


@cache
def literal_p_values(samples: int, margin: float, nuisance_level: float = 0.001) -> dict[tuple[int, int], float]:
    """P-values by the sum over all outcomes at 800 rates of differing samples."""
    every = outcomes(samples)
    scores = np.array([literal_score(b, c, samples, margin) for b, c in every.tolist()])
    rates = margin + (1 - margin) * np.sin(np.linspace(0, math.pi / 2, 800)) ** 2
    boundary = np.stack([(rates + margin) / 2, (rates - margin) / 2, 1 - rates], axis=1)
    cells = np.column_stack([every, samples - every.sum(axis=1)])
    chances = np.stack([multinomial.pmf(cells, samples, row / row.sum()) for row in boundary])
    plain = {}
    for (b, c), score in zip(every.tolist(), scores, strict=True):
        d = b + c
        low = beta.ppf(nuisance_level / 2, d, samples - d + 1) if d else 0.0
        high = beta.ppf(1 - nuisance_level / 2, d + 1, samples - d) if d < samples else 1.0
        inside = (rates >= low) & (rates <= high)
        tail = chances[:, scores >= score - 1e-9].sum(axis=1)
        plain[b, c] = nuisance_level + max(tail[inside], default=0.0)
    return {(b, c): min(1.0, max(p for (b2, c2), p in plain.items() if b2 <= b and c2 >= c)) for b, c in every.tolist()}


@pytest.mark.parametrize("margin", MARGINS)
@pytest.mark.parametrize("samples", [1, 4, 11])
def test_unconditional_p_value_equals_sum_over_outcomes(samples: int, margin: float) -> None:
    """It may be larger by what a probability may rise between the rates, and by the rates that enclose the interval."""
    for (b, c), expected in literal_p_values(samples, margin).items():
        p = unconditional_p_value(b, c, samples, margin)
        assert expected * (1 - 1e-3) <= p <= min(1.0, expected * 1.06 + 1e-5), (b, c)


@pytest.mark.parametrize("margin", MARGINS)
def test_score_statistic_uses_restricted_maximum_likelihood(margin: float) -> None:
    for samples, b, c in ((30, 3, 8), (30, 0, 4), (30, 9, 0), (200, 12, 12), (7, 3, 4)):

        def loss(p_c: float, b: int = b, c: int = c, n: int = samples) -> float:
            return -(c * math.log(p_c) + b * math.log(p_c + margin) + (n - b - c) * math.log(1 - 2 * p_c - margin))

        p_c = minimize_scalar(
            loss, bounds=(1e-12, (1 - margin) / 2 - 1e-12), method="bounded", options={"xatol": 1e-12}
        ).x
        expected = (c - b + samples * margin) / math.sqrt(samples * (2 * p_c + margin - margin**2))
        score = float(score_statistic(b + c, c, samples, margin))
        assert score == pytest.approx(expected, rel=1e-4, abs=1e-9)
        assert score == pytest.approx(literal_score(b, c, samples, margin), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("margin", [0.0, 0.001, 0.05, 0.3, 0.95])
@pytest.mark.parametrize("samples", [1, 7, 60, 300])
def test_score_statistic_is_monotone_in_the_counts(samples: int, margin: float) -> None:
    differing, better = np.meshgrid(np.arange(samples + 1), np.arange(samples + 1), indexing="ij")
    scores = np.where(better <= differing, score_statistic(differing, better, samples, margin), np.nan)
    assert np.nanmin(scores[1:, 1:] - scores[:-1, :-1]) > 1e-3  # one better sample more
    assert np.nanmin(scores[:-1, :] - scores[1:, :]) > 1e-3  # one worse sample less


@pytest.mark.parametrize(("samples", "margin"), [(12, 0.0), (12, 0.3), (20, 0.05)])
def test_unconditional_p_value_is_monotone_in_the_counts(samples: int, margin: float) -> None:
    p = {(b, c): unconditional_p_value(b, c, samples, margin) for b, c in outcomes(samples).tolist()}
    assert all(p[b, c] <= p[b, c - 1] for b, c in p if c > 0)
    assert all(p[b, c] >= p[b - 1, c] for b, c in p if b > 0)


def level_at(rates: np.ndarray, samples: int, margin: float, critical: np.ndarray, harm: float = 0.0) -> np.ndarray:
    """Probability of rejection at p_b - p_c = margin + harm, as a sum over the worse samples."""
    worse = np.arange(samples + 1)
    every = outcomes(samples)
    accepted = every[every[:, 1] >= critical[every.sum(axis=1)]]
    least = np.array([accepted[accepted[:, 0] == b, 1].min(initial=samples - b + 1) for b in worse.tolist()])
    p_b, p_c = (rates + margin + harm) / 2, (rates - margin - harm) / 2
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.where(p_b < 1, p_c / (1 - p_b), 0.0)[:, None]
    return (binom.pmf(worse, samples, p_b[:, None]) * binom.sf(least - 1, samples - worse, share)).sum(axis=1)


@pytest.mark.parametrize("level", [0.1, 0.05, 0.01])
@pytest.mark.parametrize("margin", [0.0, 0.02])
@pytest.mark.parametrize("samples", [3, 20, 60, pytest.param(300, marks=pytest.mark.slow)])
def test_critical_counts_have_level_over_nuisance_parameter(samples: int, margin: float, level: float) -> None:
    critical = critical_better_counts(samples, margin, level, level / 100)
    rates = margin + (1 - margin) * np.sin(np.linspace(1e-9, math.pi / 2, 400)) ** 2
    worst = level_at(rates, samples, margin, critical).max()
    assert worst <= level
    assert samples < 60 or worst > 0.9 * level  # not trivially valid
    for harm in (0.001, 0.2):  # the boundary is the worst case at every rate
        inside = rates[rates > margin + harm]
        assert (
            level_at(inside, samples, margin, critical, harm) <= level_at(inside, samples, margin, critical) + 1e-12
        ).all()


@pytest.mark.parametrize(("margin", "level"), [(0.0, 0.1), (0.02, 0.1), (0.2, 0.01)])
def test_critical_counts_equal_p_values_at_most_level(margin: float, level: float) -> None:
    for samples in (0, 1, 16):
        critical = critical_better_counts(samples, margin, level, level / 100)
        for b, c in outcomes(samples).tolist():
            accepts = unconditional_p_value(b, c, samples, margin, level / 100) <= level
            assert accepts == (c >= critical[b + c]), (samples, b, c)


counts = st.tuples(st.integers(0, 25), st.integers(0, 25), st.integers(0, 150))


@settings(max_examples=12)
@given(counts, st.floats(0.0, 0.5))
def test_unconditional_p_value_is_at_least_that_of_the_outcome(drawn: tuple[int, int, int], margin: float) -> None:
    worse, better, agreeing = drawn
    samples = worse + better + agreeing
    if samples:
        p = unconditional_p_value(worse, better, samples, margin)
        assert 0 < outcome_p_value(worse, better, samples, margin, 0.001) <= p <= 1


def test_unconditional_p_value_without_discordant_samples() -> None:
    """Without a margin there is no evidence; with one, few differing samples are evidence."""
    assert unconditional_p_value(0, 0, 0) == unconditional_p_value(0, 0, 0, margin=0.5) == 1.0
    assert unconditional_p_value(0, 0, 800) == 1.0
    p = unconditional_p_value(0, 0, 100, margin=0.05)
    assert 0.95**100 <= p - 0.001 <= 1.3 * 0.95**100 < 0.123  # conditional on b + c = 0 it is .123
    assert paired_p_value(0, 0, 100, 0.05) > 0.1


@pytest.mark.parametrize(("samples", "margin"), [(60, 0.02), (300, 0.0)])
def test_critical_counts_are_as_powerful_as_conditional_test(samples: int, margin: float) -> None:
    critical = critical_better_counts(samples, margin, 0.1, 0.001)
    every = outcomes(samples)
    every = every[every.sum(axis=1) <= 30]
    conditional = np.array([paired_p_value(b, c, samples, margin) <= 0.1 for b, c in every.tolist()])
    accepted = every[:, 1] >= critical[every.sum(axis=1)]
    cells = np.column_stack([every, samples - every.sum(axis=1)])
    for rate in (0.02, 0.05):
        for gain in (0.0, 0.01, 0.02):
            chances = multinomial.pmf(cells, samples, [(rate - gain) / 2, (rate + gain) / 2, 1 - rate])
            assert chances[accepted].sum() >= chances[conditional].sum()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: unconditional_p_value(-1, 0, 5), "worse, better: expected .* got -1, 0"),
        (lambda: unconditional_p_value(3, 3, 5), "worse, better: expected"),
        (lambda: unconditional_p_value(1, 1, 5, 1.0), "margin: .* got 1.0"),
        (lambda: unconditional_p_value(1, 1, 5, 0.1, 0.0), "nuisance_level: .* got 0.0"),
        (lambda: critical_better_counts(5, 0.1, 0.001, 0.001), "level: expected at least 0.002 .* got 0.001"),
        (lambda: critical_better_counts(-1, 0.1, 0.1, 0.001), "expected"),
    ],
)
def test_unconditional_test_invalid_arguments_raise_value_error(call: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()  # type: ignore[operator]
