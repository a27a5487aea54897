"""Guarantees over many draws from populations whose error rates are known exactly."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest

from fedekd.early_exit import ExitPolicy, ExitScores, SelectiveRiskCalibrator, check_validity, true_risks
from fedekd.errors import UserError
from fedekd.functional.binomial import clopper_pearson

TARGET_RISKS = (0.01, 0.05, 0.1)
DELTA = 0.1


def pool_of(scores, correct, probability=None) -> ExitScores:
    return ExitScores.from_arrays(np.stack(scores, 1), np.stack(correct, 1), probability)


def easy_first(target_risk: float) -> ExitScores:
    """Four exits of increasing accuracy; the score is strongly correlated with the difficulty of a sample."""
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


def worse_deeper(target_risk: float) -> ExitScores:
    """The second exit is overconfident on the samples that pass the first."""
    rng = np.random.default_rng(2)
    hard = rng.uniform(size=5000)
    first = 1 - hard + rng.normal(scale=0.05, size=5000)
    second = 1 - 0.3 * hard + rng.normal(scale=0.05, size=5000)
    right = [hard < rng.uniform(0.4, 0.9, 5000), hard < rng.uniform(0.2, 0.7, 5000), hard < 0.95]
    return pool_of([first, second, second], right)


def overconfident(target_risk: float) -> ExitScores:
    """The highest scores have more errors than lower ones: the risk is not monotone in the threshold."""
    rng = np.random.default_rng(3)
    score = rng.uniform(size=(5000, 3)) ** 0.2
    wrong = np.where(score > 0.98, 1.5 * target_risk, np.where(score > 0.8, 0.6 * target_risk, 4 * target_risk))
    return ExitScores.from_arrays(score, rng.uniform(size=(5000, 3)) > wrong)


def boundary(target_risk: float) -> ExitScores:
    """At every threshold the error rate is slightly above the target: any open exit is a violation."""
    size, exits = 4000, 3
    rng = np.random.default_rng(4)
    scores, correct = [], []
    for _ in range(exits):
        rank = rng.permutation(size)
        scores.append(1 - rank / size)
        correct.append(
            np.floor((rank + 1) * 1.02 * target_risk + 1 - 1e-9) == np.floor(rank * 1.02 * target_risk + 1 - 1e-9)
        )
    return pool_of(scores, correct)


def tied(target_risk: float) -> ExitScores:
    """Three distinct scores; adding the middle one puts the error rate just above the target."""
    rng = np.random.default_rng(5)
    score = rng.choice([0.5, 0.7, 0.9], size=(5000, 3), p=[0.3, 0.4, 0.3])
    wrong = np.select([score == 0.9, score == 0.7], [0.3 * target_risk, 1.7 * target_risk], 4 * target_risk)
    return ExitScores.from_arrays(score, rng.uniform(size=(5000, 3)) > wrong)


POOLS = {build.__name__: build for build in (easy_first, worse_deeper, overconfident, boundary, tied)}


@cache
def validity(pool: str, mode: str, target_risk: float, draws: int, samples: int = 800, tuning: int = 400):
    # The error rates of the finite population are exact, not those of the distribution it was drawn from.
    return check_validity(
        POOLS[pool](target_risk), SelectiveRiskCalibrator(target_risk, 1 - DELTA, mode), samples, tuning, draws, seed=7
    )


@pytest.mark.parametrize("target_risk", [0.05, 0.1])
@pytest.mark.parametrize("pool", POOLS)
def test_ltt_violation_rate_is_at_most_delta(pool, target_risk):
    found = validity(pool, "ltt", target_risk, draws=200)
    assert found.interval[0] <= DELTA
    assert found.violation_rate <= DELTA  # in these draws even the point estimate
    assert found.is_consistent


@pytest.mark.parametrize("pool", POOLS)
def test_ltt_joint_violation_rate_is_at_most_delta(pool):
    assert validity(pool, "ltt_joint", 0.05, draws=60).interval[0] <= DELTA


@pytest.mark.parametrize("pool", ["easy_first", "worse_deeper", "tied"])
def test_guaranteed_rules_open_exits(pool):
    for mode, draws in (("ltt", 200), ("ltt_joint", 60)):
        found = validity(pool, mode, 0.05, draws)
        assert (~np.isnan(found.risks)).mean() > 0.15
        assert found.costs.mean() < 0.95


@pytest.mark.parametrize("pool", POOLS)
def test_empirical_violates_target(pool):
    found = validity(pool, "empirical", 0.05, draws=60)
    assert found.interval[0] > DELTA
    assert not found.is_consistent


def test_safekd_code_violates_target():
    found = validity("easy_first", "safekd_code", 0.05, draws=60)
    assert found.interval[0] > 0.9


def test_thresholds_from_all_samples_violate_target():
    """Without restriction to survivors even thresholds from true error rates violate the target."""
    target_risk = 0.05
    pool = easy_first(target_risk)
    thresholds = []
    for exit_ in range(3):
        falling = np.sort(pool.scores[:, exit_])[::-1]
        wrong = np.cumsum(~pool.correct[np.argsort(-pool.scores[:, exit_]), exit_])
        fits = np.flatnonzero(wrong <= 0.9 * target_risk * np.arange(1, len(pool) + 1))
        thresholds.append(float(falling[fits[-1]]))
    thresholds = (*thresholds, -math.inf)
    policy = ExitPolicy(thresholds, thresholds, (False,) * 4, target_risk, 1 - DELTA, "by hand")
    risks = true_risks(pool, policy)
    assert risks[0] <= target_risk < risks[1:].min()
    assert risks[1:].max() > 2 * target_risk


@pytest.mark.slow
@pytest.mark.parametrize("target_risk", TARGET_RISKS)
@pytest.mark.parametrize("mode", ["ltt", "ltt_joint"])
@pytest.mark.parametrize("pool", POOLS)
def test_guaranteed_rules_violation_rate_over_500_draws(pool, mode, target_risk):
    assert validity(pool, mode, target_risk, draws=500).interval[0] <= DELTA


@pytest.mark.slow
@pytest.mark.parametrize(("samples", "tuning"), [(40, 4000), (150, 20), (4000, 30), (4000, 4000)])
def test_ltt_violation_rate_holds_for_any_sample_size(samples, tuning):
    """At the boundary the violation probability is largest, and delta still bounds it."""
    found = validity("boundary", "ltt", 0.1, 1000, samples, tuning)
    assert found.interval[0] <= DELTA


def test_true_risks_equal_manual_computation():
    scores = np.array([[0.9, 0.9], [0.8, 0.1], [0.45, 0.9], [0.1, 0.9], [0.9, 0.2]])
    correct = np.array([[True, False], [False, True], [False, False], [False, True], [True, True]])
    pool = ExitScores.from_arrays(scores, correct)
    by_hand = {0.5: 1 / 3, 0.85: 0.0, 0.0: 3 / 5, 2.0: math.nan}
    for threshold, risk in by_hand.items():
        bounds = (threshold, -math.inf)
        [found] = true_risks(pool, ExitPolicy(bounds, bounds, (True, False), 0.1, 0.9, "ltt"))
        assert found == pytest.approx(risk, nan_ok=True)


@pytest.mark.parametrize(("wrong", "of", "target_risk"), [(5, 100, 0.05), (1, 100, 0.01), (3, 60, 0.05)])
def test_true_risks_exact_target_is_no_violation(wrong, of, target_risk):
    pool = ExitScores.from_arrays(np.ones((of, 2)), np.repeat(np.arange(of)[:, None] >= wrong, 2, axis=1))
    bounds = (0.5, -math.inf)
    [risk] = true_risks(pool, ExitPolicy(bounds, bounds, (True, False), target_risk, 0.9, "ltt"))
    assert not risk > target_risk


def test_true_risks_samples_above_search_bound_take_last_exit():
    pool = ExitScores.from_arrays(
        np.array([[0.9, 0.1, 0.1], [0.6, 0.9, 0.1], [0.1, 0.9, 0.1]]),
        np.array([[True, True, True], [True, False, True], [False, True, True]]),
    )
    policy = ExitPolicy((0.8, 0.8, -math.inf), (0.5, 0.8, -math.inf), (True, True, False), 0.1, 0.9, "ltt")
    assert true_risks(pool, policy).tolist() == [0.0, 0.0]


def test_check_validity_draws_are_reproducible_and_costs_are_of_the_population():
    pool = easy_first(0.1)
    calibrator = SelectiveRiskCalibrator(0.1, 0.9)
    evaluated_heads = []

    def cost(evaluated):
        evaluated_heads.append(tuple(evaluated))
        return (1.0, 2.0, 4.0, 8.0)

    one = check_validity(pool, calibrator, 800, 400, draws=6, seed=3, cost=cost)
    two = check_validity(pool, calibrator, 800, 400, draws=9, seed=3)
    np.testing.assert_array_equal(one.risks, two.risks[:6])
    assert (one.draws, one.calibrator) == (6, calibrator)
    assert len(np.unique(one.costs)) == 6
    assert ((one.costs >= 1) & (one.costs <= 8)).all()
    assert evaluated_heads[0] == (True,) * 4  # costs for the rule
    assert len(evaluated_heads) == 7
    assert len(set(evaluated_heads[1:])) > 1  # costs of the selected policies
    assert ((two.costs >= 0.25) & (two.costs <= 1)).all()
    assert one.interval == clopper_pearson(one.violations, 6)
    assert one.violation_rate == one.violations / 6


@pytest.mark.parametrize("name", ["samples", "tuning_samples", "draws"])
def test_check_validity_number_below_one_raises(name):
    numbers = {"samples": 9, "tuning_samples": 9, "draws": 9, name: 0}
    with pytest.raises(UserError, match=f"{name}: expected at least 1, got 0"):
        check_validity(tied(0.1), SelectiveRiskCalibrator(0.1), **numbers)
