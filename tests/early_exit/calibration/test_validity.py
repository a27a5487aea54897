"""Promises hold: over many draws from populations whose error rates are known exactly."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest

from fedekd.early_exit import ExitPolicy, ExitScores, SelectiveRiskCalibrator, check_validity, true_risks
from fedekd.errors import UserError
from fedekd.functional.binomial import clopper_pearson

ALPHAS = (0.01, 0.05, 0.1)
DELTA = 0.1


def pool_of(scores, correct, probability=None) -> ExitScores:
    return ExitScores.checked(np.stack(scores, 1), np.stack(correct, 1), probability)


def easy_first(alpha: float) -> ExitScores:
    """Four exits, each better than the one before; the score knows most of what makes a sample hard."""
    rng = np.random.default_rng(1)
    hard = rng.uniform(size=6000)
    scores, correct, probability = [], [], []
    for skill in (0.55, 0.7, 0.8, 0.9):
        chance = 1 / (1 + np.exp(-9 * (skill - hard)))
        score = 1 / (1 + np.exp(-9 * (skill - hard) + rng.normal(scale=0.7, size=6000)))
        right = rng.uniform(size=6000) < chance
        scores.append(score)
        correct.append(right)
        probability.append(np.where(right, score, (1 - score) / 2))
    return pool_of(scores, correct, np.stack(probability, 1))


def worse_deeper(alpha: float) -> ExitScores:
    """What the first exit keeps is what the second, surer than it should be, gets wrong."""
    rng = np.random.default_rng(2)
    hard = rng.uniform(size=5000)
    first = 1 - hard + rng.normal(scale=0.05, size=5000)
    second = 1 - 0.3 * hard + rng.normal(scale=0.05, size=5000)
    right = [hard < rng.uniform(0.4, 0.9, 5000), hard < rng.uniform(0.2, 0.7, 5000), hard < 0.95]
    return pool_of([first, second, second], right)


def overconfident(alpha: float) -> ExitScores:
    """The surest are wrong more often than the others: the risk falls before it rises."""
    rng = np.random.default_rng(3)
    score = rng.uniform(size=(5000, 3)) ** 0.2
    wrong = np.where(score > 0.98, 1.5 * alpha, np.where(score > 0.8, 0.6 * alpha, 4 * alpha))
    return ExitScores.checked(score, rng.uniform(size=(5000, 3)) > wrong)


def boundary(alpha: float) -> ExitScores:
    """At every threshold of every exit a little more than alpha is wrong: whatever opens breaks its promise."""
    size, exits = 4000, 3
    rng = np.random.default_rng(4)
    scores, correct = [], []
    for _ in range(exits):
        rank = rng.permutation(size)
        scores.append(1 - rank / size)
        correct.append(np.floor((rank + 1) * 1.02 * alpha + 1 - 1e-9) == np.floor(rank * 1.02 * alpha + 1 - 1e-9))
    return pool_of(scores, correct)


def tied(alpha: float) -> ExitScores:
    """Three values of the score, the middle one just above alpha when it joins the first."""
    rng = np.random.default_rng(5)
    score = rng.choice([0.5, 0.7, 0.9], size=(5000, 3), p=[0.3, 0.4, 0.3])
    wrong = np.select([score == 0.9, score == 0.7], [0.3 * alpha, 1.7 * alpha], 4 * alpha)
    return ExitScores.checked(score, rng.uniform(size=(5000, 3)) > wrong)


POOLS = {build.__name__: build for build in (easy_first, worse_deeper, overconfident, boundary, tied)}


@cache
def validity(pool: str, mode: str, alpha: float, draws: int, samples: int = 800, tuning: int = 400):
    # The pool's own error rates, not the ones it was drawn from, are what is exact.
    return check_validity(
        POOLS[pool](alpha), SelectiveRiskCalibrator(alpha, DELTA, mode), samples, tuning, draws, seed=7
    )


@pytest.mark.parametrize("alpha", [0.05, 0.1])
@pytest.mark.parametrize("pool", POOLS)
def test_fixed_sequences_on_survivors_keep_their_promise(pool, alpha):
    found = validity(pool, "ltt", alpha, draws=200)
    assert found.interval[0] <= DELTA
    assert found.share <= DELTA  # so it is in these draws, with room to spare at the boundary
    assert found.agrees


@pytest.mark.parametrize("pool", POOLS)
def test_tested_paths_keep_their_promise(pool):
    assert validity(pool, "path", 0.05, draws=60).interval[0] <= DELTA


@pytest.mark.parametrize("pool", ["easy_first", "worse_deeper", "tied"])
def test_the_promise_is_not_kept_by_opening_nothing(pool):
    for mode, draws in (("ltt", 200), ("path", 60)):
        found = validity(pool, mode, 0.05, draws)
        assert (~np.isnan(found.risks)).mean() > 0.15
        assert found.costs.mean() < 0.95


@pytest.mark.parametrize("pool", POOLS)
def test_plug_in_thresholds_break_it(pool):
    found = validity(pool, "empirical", 0.05, draws=60)
    assert found.interval[0] > DELTA
    assert not found.agrees


def test_the_released_rule_breaks_it():
    found = validity("easy_first", "released", 0.05, draws=60)
    assert found.interval[0] > 0.9


def test_testing_every_exit_on_all_samples_would_break_it():
    """What survivors are for: even with the true error rates at hand."""
    alpha = 0.05
    pool = easy_first(alpha)
    thresholds = []
    for exit_ in range(3):
        falling = np.sort(pool.scores[:, exit_])[::-1]
        wrong = np.cumsum(~pool.correct[np.argsort(-pool.scores[:, exit_]), exit_])
        fits = np.flatnonzero(wrong <= 0.9 * alpha * np.arange(1, len(pool) + 1))
        thresholds.append(float(falling[fits[-1]]))
    thresholds = (*thresholds, -math.inf)
    policy = ExitPolicy(thresholds, thresholds, (False,) * 4, alpha, DELTA, "by hand")
    risks = true_risks(pool, policy)
    assert risks[0] <= alpha < risks[1:].min()
    assert risks[1:].max() > 2 * alpha


@pytest.mark.slow
@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("mode", ["ltt", "path"])
@pytest.mark.parametrize("pool", POOLS)
def test_promises_hold_over_500_draws(pool, mode, alpha):
    assert validity(pool, mode, alpha, draws=500).interval[0] <= DELTA


@pytest.mark.slow
@pytest.mark.parametrize(("samples", "tuning"), [(40, 4000), (150, 20), (4000, 30), (4000, 4000)])
def test_the_sizes_of_the_samples_do_not_matter(samples, tuning):
    """At the boundary a violation is as likely as it can be, and delta still bounds it."""
    found = validity("boundary", "ltt", 0.1, 1000, samples, tuning)
    assert found.interval[0] <= DELTA


def test_true_risks_are_those_of_whoever_leaves():
    scores = np.array([[0.9, 0.9], [0.8, 0.1], [0.45, 0.9], [0.1, 0.9], [0.9, 0.2]])
    correct = np.array([[True, False], [False, True], [False, False], [False, True], [True, True]])
    pool = ExitScores.checked(scores, correct)
    by_hand = {0.5: 1 / 3, 0.85: 0.0, 0.0: 3 / 5, 2.0: math.nan}
    for threshold, risk in by_hand.items():
        bounds = (threshold, -math.inf)
        [found] = true_risks(pool, ExitPolicy(bounds, bounds, (True, False), 0.1, 0.1, "ltt"))
        assert found == pytest.approx(risk, nan_ok=True)


@pytest.mark.parametrize(("wrong", "of", "alpha"), [(5, 100, 0.05), (1, 100, 0.01), (3, 60, 0.05)])
def test_an_error_rate_of_exactly_alpha_is_no_violation(wrong, of, alpha):
    pool = ExitScores.checked(np.ones((of, 2)), np.repeat(np.arange(of)[:, None] >= wrong, 2, axis=1))
    bounds = (0.5, -math.inf)
    [risk] = true_risks(pool, ExitPolicy(bounds, bounds, (True, False), alpha, 0.1, "ltt"))
    assert not risk > alpha


def test_bands_keep_their_samples_out_of_the_exits_between():
    pool = ExitScores.checked(
        np.array([[0.9, 0.1, 0.1], [0.6, 0.9, 0.1], [0.1, 0.9, 0.1]]),
        np.array([[True, True, True], [True, False, True], [False, True, True]]),
    )
    policy = ExitPolicy((0.8, 0.8, -math.inf), (0.5, 0.8, -math.inf), (True, True, False), 0.1, 0.1, "ltt")
    assert true_risks(pool, policy).tolist() == [0.0, 0.0]


def test_draws_are_their_own_and_what_they_cost_is_the_pool_s():
    pool = easy_first(0.1)
    calibrator = SelectiveRiskCalibrator(0.1, 0.1)
    asked = []

    def cost(evaluated):
        asked.append(tuple(evaluated))
        return (1.0, 2.0, 4.0, 8.0)

    one = check_validity(pool, calibrator, 800, 400, draws=6, seed=3, cost=cost)
    two = check_validity(pool, calibrator, 800, 400, draws=9, seed=3)
    np.testing.assert_array_equal(one.risks, two.risks[:6])
    assert (one.draws, one.alpha, one.delta, one.mode) == (6, 0.1, 0.1, "ltt")
    assert len(np.unique(one.costs)) == 6
    assert ((one.costs >= 1) & (one.costs <= 8)).all()
    assert asked[::2] == [(True,) * 4] * 6  # for the rule
    assert len(set(asked[1::2])) > 1  # for what it chose
    assert ((two.costs >= 0.25) & (two.costs <= 1)).all()
    assert one.interval == clopper_pearson(one.violations, 6)
    assert one.share == one.violations / 6


@pytest.mark.parametrize("name", ["samples", "tuning_samples", "draws"])
def test_numbers_below_one_are_told(name):
    numbers = {"samples": 9, "tuning_samples": 9, "draws": 9, name: 0}
    with pytest.raises(UserError, match=f"{name} is 0, and must be at least 1"):
        check_validity(tied(0.1), SelectiveRiskCalibrator(0.1), **numbers)
