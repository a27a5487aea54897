"""Membership inference against literal transcriptions, and properties of the figures."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm

from experiments.privacy.membership import (
    evaluate_attack,
    lira_scores,
    logit_confidence,
    roc_auc,
    threshold_advantage,
    true_positive_rate,
)

scores = st.lists(st.integers(-5, 5).map(float), min_size=2, max_size=30)


def pairs_won(members: list[float], others: list[float]) -> float:
    """P(member > other) + P(equal) / 2, pair by pair."""
    wins = [1.0 if m > o else 0.5 if m == o else 0.0 for m in members for o in others]
    return sum(wins) / len(wins)


def rates(members: list[float], others: list[float], threshold: float) -> tuple[float, float]:
    return tuple(sum(value > threshold for value in side) / len(side) for side in (members, others))  # type: ignore[return-value]


# ---------------------------------------------------------------- figures


@given(scores, scores)
def test_roc_auc_equals_share_of_pairs(members: list[float], others: list[float]) -> None:
    assert (roc_auc(members, others)) == pytest.approx(pairs_won(members, others), abs=1e-12)
    assert (roc_auc(others, members)) == pytest.approx(1 - pairs_won(members, others), abs=1e-12)


@given(scores, scores, st.floats(0.01, 0.9))
def test_true_positive_rate_is_best_threshold_below_limit(
    members: list[float], others: list[float], limit: float
) -> None:
    value = true_positive_rate(members, others, limit)
    if limit * len(others) < 1 - 1e-9:
        assert math.isnan(value)
        return
    points = [rates(members, others, threshold) for threshold in {*members, *others, -99.0}]
    assert value == max(tpr for tpr, fpr in points if fpr <= limit + 1e-9)


@given(scores, scores, st.integers(-5, 5))
def test_threshold_advantage_counts_scores_at_threshold(
    members: list[float], others: list[float], threshold: int
) -> None:
    tpr, fpr = rates(members, others, threshold - 0.5)
    assert (threshold_advantage(members, others, threshold)) == pytest.approx(tpr - fpr, abs=1e-12)


@given(scores, scores)
def test_figures_do_not_change_under_monotone_maps(members: list[float], others: list[float]) -> None:
    mapped = np.exp(members) * 3 - 7, np.exp(others) * 3 - 7
    assert (roc_auc(*mapped)) == (roc_auc(members, others))
    assert (true_positive_rate(*mapped, 0.5)) == (true_positive_rate(members, others, 0.5))
    assert (threshold_advantage(*mapped, math.exp(0.5) * 3 - 7)) == float(threshold_advantage(members, others, 0.5))


def test_random_scores_have_no_advantage() -> None:
    rng = np.random.default_rng(0)
    result = evaluate_attack(rng.normal(size=5000), np.arange(5000) < 2000, threshold=0.3, resamples=300)
    assert (result.members, result.others) == (2000, 3000)
    assert result.auc == pytest.approx(0.5, abs=0.03)
    assert result.auc_interval[0] < 0.5 < result.auc_interval[1]
    assert result.advantage_interval[0] < 0 < result.advantage_interval[1]
    assert result.tpr_interval[0.01][0] < 0.01 < result.tpr_interval[0.01][1]
    assert result.tpr[0.001] < 0.01


def test_separated_scores_are_found_completely() -> None:
    result = evaluate_attack(np.arange(200.0), np.arange(200) >= 100, threshold=100, resamples=50)
    assert (result.auc, result.advantage, result.tpr[0.01]) == (1.0, 1.0, 1.0)
    assert result.auc_interval == result.advantage_interval == result.tpr_interval[0.01] == (1.0, 1.0)
    assert math.isnan(result.tpr[0.001])  # 100 samples cannot resolve 0.1%
    assert all(map(math.isnan, result.tpr_interval[0.001]))


def test_bootstrap_interval_has_the_width_of_the_formula() -> None:
    """Hanley and McNeil (1982): the variance of the AUC of exponential scores, here AUC 2/3."""
    rng = np.random.default_rng(1)
    members, others = rng.exponential(2.0, 400), rng.exponential(1.0, 300)
    area = 2 / 3
    first, second = area / (2 - area), 2 * area**2 / (1 + area)
    variance = (area * (1 - area) + 399 * (first - area**2) + 299 * (second - area**2)) / (400 * 300)
    scores = np.concatenate([members, others])
    low, high = evaluate_attack(scores, np.arange(700) < 400, resamples=2000).auc_interval
    assert high - low == pytest.approx(2 * 1.96 * math.sqrt(variance), rel=0.1)


def test_bootstrap_draws_all_scores_of_a_sample_together() -> None:
    """Ten attacks with equal scores are worth no more than one."""
    rng = np.random.default_rng(2)
    scores, is_member = rng.normal(size=300), np.arange(300) < 150
    once = evaluate_attack(scores, is_member)
    repeated = evaluate_attack(np.tile(scores, (10, 1)), np.tile(is_member, (10, 1)))
    assert repeated.auc == pytest.approx(once.auc)
    assert repeated.auc_interval == pytest.approx(once.auc_interval)
    assert repeated.members == 1500


def test_evaluate_attack_figures_are_those_of_the_functions() -> None:
    rng = np.random.default_rng(3)
    scores, is_member = rng.normal(size=(4, 250)), rng.random((4, 250)) < 0.4
    result = evaluate_attack(scores, is_member, threshold=0.2, resamples=20)
    sides = scores[is_member], scores[~is_member]
    assert result.auc == roc_auc(*sides)
    assert result.advantage == threshold_advantage(*sides, 0.2)
    assert result.tpr[0.01] == true_positive_rate(*sides, 0.01)
    for value, (low, high) in ((result.auc, result.auc_interval), (result.tpr[0.01], result.tpr_interval[0.01])):
        assert low <= value <= high
        assert low < high


@pytest.mark.parametrize(
    ("scores", "is_member", "message"),
    [
        ([1.0, 2.0, 3.0], [True, True, False], "is_member: expected at least 2 scores on each side, got 2 members"),
        ([1.0, math.nan, 3.0, 4.0], [True, True, False, False], "scores: expected shape .* without NaN"),
        ([1.0, 2.0], [True], "scores: expected shape"),
    ],
)
def test_evaluate_attack_refuses_invalid_scores(scores: list[float], is_member: list[bool], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate_attack(scores, is_member)


def test_true_positive_rate_counts_whole_samples_exactly() -> None:
    """0.29 * 100 is 28.999999999999996 in floating point."""
    assert true_positive_rate([70.5], np.arange(100.0), 0.29) == 1.0
    assert true_positive_rate([70.0], np.arange(100.0), 0.29) == 0.0


# ---------------------------------------------------------------- attacks


def test_logit_confidence_equals_definition() -> None:
    logits = np.random.default_rng(0).normal(0, 3, (4, 6, 5))
    targets = np.array([0, 1, 2, 3, 4, 0])
    values = logit_confidence(logits, targets)
    assert values.shape == (4, 6)
    for model in range(4):
        for index, target in enumerate(targets):
            exponents = [math.exp(value) for value in logits[model, index]]
            probability = exponents[target] / sum(exponents)
            assert values[model, index] == pytest.approx(math.log(probability / (1 - probability)), abs=1e-9)
    assert logit_confidence([[800.0, -800.0]], [0]).tolist() == [1600.0]  # a probability of 1 in float64


def halves(rng: np.random.Generator, models: int, samples: int) -> np.ndarray:
    """Random membership: each sample is in half of the models."""
    return rng.permuted(np.repeat(np.arange(models) < models // 2, samples).reshape(models, samples), axis=0)


def literal_lira(
    observed: list[float], shadow: list[list[float]], is_member: list[list[bool]], online: bool, variance: str
) -> list[float]:
    """Algorithm 1 of the paper, sample by sample."""
    parts: dict[bool, list[tuple[float, float]]] = {}
    for side in (True, False):
        samples = [
            [confidences[i] for confidences, used in zip(shadow, is_member, strict=True) if used[i] is side]
            for i in range(len(observed))
        ]
        means = [sum(values) / len(values) for values in samples]
        squares = [sum((v - m) ** 2 for v in values) for values, m in zip(samples, means, strict=True)]
        if variance == "global":
            variances = [sum(squares) / sum(len(values) - 1 for values in samples)] * len(samples)
        else:
            variances = [square / len(values) for square, values in zip(squares, samples, strict=True)]
        parts[side] = list(zip(means, variances, strict=True))

    def log_density(value: float, mean: float, square: float) -> float:
        return -0.5 * math.log(2 * math.pi * square) - (value - mean) ** 2 / (2 * square)

    if online:
        return [log_density(v, *parts[True][i]) - log_density(v, *parts[False][i]) for i, v in enumerate(observed)]
    # 1 - P[Z > phi] = P[Z <= phi]
    return [math.erfc((m - v) / math.sqrt(2 * s)) / 2 for v, (m, s) in zip(observed, parts[False], strict=True)]


@pytest.mark.parametrize("variance", ["per_sample", "global"])
@pytest.mark.parametrize("online", [True, False])
def test_lira_equals_literal_algorithm(online: bool, variance: str) -> None:
    rng = np.random.default_rng(2)
    shadow, observed = rng.normal(0, 2, (9, 7)), rng.normal(0, 2, 7)
    is_member = halves(rng, 9, 7)
    expected = literal_lira(observed.tolist(), shadow.tolist(), is_member.tolist(), online, variance)
    values = lira_scores(observed, shadow, is_member, online=online, variance=variance)
    np.testing.assert_allclose(values if online else norm.cdf(values), expected, rtol=1e-10)


def test_lira_finds_members_that_a_global_threshold_misses() -> None:
    """Samples differ in difficulty by more than a member gains: only the per-sample attack sees it."""
    rng = np.random.default_rng(3)
    difficulty = rng.normal(0, 10, 600)

    def confidences(member: np.ndarray) -> np.ndarray:
        return difficulty + 2.0 * member + rng.normal(0, 0.5, member.shape)

    is_member = halves(rng, 16, 600)
    target = rng.random(600) < 0.5
    observed, shadow = confidences(target), confidences(is_member)
    for options in ({}, {"variance": "global"}, {"online": False}):
        attack = lira_scores(observed, shadow, is_member, **options)  # type: ignore[arg-type]
        assert (roc_auc(attack[target], attack[~target])) > 0.95
    assert (roc_auc(observed[target], observed[~target])) < 0.65


def test_lira_of_a_model_without_training_finds_nothing() -> None:
    rng = np.random.default_rng(4)
    is_member, target = halves(rng, 16, 2000), rng.random(2000) < 0.5
    attack = lira_scores(rng.normal(size=2000), rng.normal(size=(16, 2000)), is_member)
    assert (roc_auc(attack[target], attack[~target])) == pytest.approx(0.5, abs=0.04)


def test_lira_refuses_samples_without_enough_models() -> None:
    shadow = np.zeros((3, 2))
    with pytest.raises(ValueError, match="at least 2 models with each sample in, got 1"):
        lira_scores([0.0, 0.0], shadow, [[True, True], [False, False], [False, False]])
    with pytest.raises(ValueError, match="at least 1 models with each sample out, got 0"):
        lira_scores([0.0, 0.0], shadow, np.ones((3, 2), bool), variance="global", online=False)
    with pytest.raises(ValueError, match="a sample with at least 2 models out, for the variance"):
        lira_scores([0.0, 0.0], shadow, [[True, True], [True, True], [False, False]], variance="global")
    with pytest.raises(ValueError, match="expected shape"):
        lira_scores([0.0], shadow, np.ones((3, 2), bool))
    with pytest.raises(ValueError, match="variance: expected one of"):
        lira_scores([0.0, 0.0], shadow, np.ones((3, 2), bool), variance="pooled")  # type: ignore[arg-type]
