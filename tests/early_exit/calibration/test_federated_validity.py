"""Validity of per-client and pooled calibration."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest

from fedekd.early_exit import (
    ExitScores,
    FederatedValidity,
    SelectiveRiskCalibrator,
    check_federated_validity,
    check_validity,
)
from fedekd.errors import UserError
from fedekd.functional.binomial import clopper_pearson

TARGET_RISK, DELTA = 0.1, 0.1
NAN = math.nan


def client_pool(size: int, seed: int, sure_but_wrong: float = 0.0, exits: int = 3) -> ExitScores:
    """Create scores of one distribution for all clients; an overconfident client has errors at all scores."""
    rng = np.random.default_rng(seed)
    scores = rng.uniform(size=(size, exits)) ** 0.5
    wrong = np.maximum(0.6 * (1 - scores) ** 1.5, sure_but_wrong)
    correct = rng.uniform(size=(size, exits)) > wrong
    return ExitScores.from_arrays(scores, correct, np.where(correct, scores, (1 - scores) / 2))


#: Two clients with informative scores, and a small one with an error rate of 1/4 at any score.
GOOD, OVERCONFIDENT = (0, 1), 2


@cache
def federation() -> list[ExitScores]:
    return [client_pool(3000, 1), client_pool(2400, 2), client_pool(600, 3, sure_but_wrong=0.25)]


@cache
def validity(mode: str) -> FederatedValidity:
    calibrator = SelectiveRiskCalibrator(TARGET_RISK, 1 - DELTA, mode)
    return check_federated_validity(federation(), calibrator, (500, 400, 100), (250, 200, 50), draws=200, seed=5)


def low(broken: int, of: int) -> float:
    return clopper_pearson(broken, of)[0]


def test_ltt_client_policies_violation_rate_is_at_most_delta() -> None:
    found = validity("ltt")
    assert found.draws == 200
    assert all(low(broken, found.draws) <= DELTA for broken in found.client_violations)
    for client in GOOD:  # and exits are open
        assert (~np.isnan(found.client_risks[:, client])).any(axis=1).mean() > 0.9
    assert np.isnan(found.client_risks[:, OVERCONFIDENT]).mean() > 0.9  # closed exits are the only valid choice here


def test_ltt_pooled_policy_is_valid_for_union_but_not_for_overconfident_client() -> None:
    found = validity("ltt")
    assert low(found.union_violations, found.draws) <= DELTA
    assert (~np.isnan(found.union_risks)).any(axis=1).mean() > 0.9
    broken = found.pooled_violations
    assert broken[OVERCONFIDENT] > 0.9 * found.draws
    assert all(low(broken[client], found.draws) <= DELTA for client in GOOD)
    # One policy, so the error rate on the union lies between those of the clients.
    opened = ~np.isnan(found.union_risks) & ~np.isnan(found.pooled_risks).any(axis=1)
    assert opened.mean() > 0.4
    assert (found.pooled_risks.min(axis=1)[opened] <= found.union_risks[opened]).all()
    assert (found.union_risks[opened] <= found.pooled_risks.max(axis=1)[opened]).all()


def test_empirical_client_policies_violate_target() -> None:
    found = validity("empirical")
    assert all(low(broken, found.draws) > DELTA for broken in found.client_violations)
    assert low(found.union_violations, found.draws) > DELTA


@pytest.mark.parametrize("mode", ["ltt", "empirical", "safekd_code"])
def test_single_client_equals_check_validity(mode: str) -> None:
    pool, calibrator = client_pool(900, 4), SelectiveRiskCalibrator(TARGET_RISK, 1 - DELTA, mode)
    single = check_validity(pool, calibrator, 200, 120, draws=8, seed=3)
    found = check_federated_validity([pool], calibrator, [200], [120], draws=8, seed=3)
    assert not np.isnan(single.risks).all()
    for risks in (found.client_risks[:, 0], found.pooled_risks[:, 0], found.union_risks):
        assert risks.shape == (8, 2)
        assert risks.tobytes() == single.risks.tobytes()
    assert found.client_violations == found.pooled_violations == [found.union_violations] == [single.violations]


def risk_by_counting(pool: ExitScores, thresholds: Sequence[float], search_bounds: Sequence[float]) -> list[float]:
    """Count sample by sample: first threshold reached, unless a search bound was reached before."""
    exited, wrong = [0] * len(thresholds), [0] * len(thresholds)
    for scores, correct in zip(pool.scores.tolist(), pool.correct.tolist(), strict=True):
        place = len(thresholds) - 1
        for exit_ in range(len(thresholds) - 1):
            if scores[exit_] >= thresholds[exit_]:
                place = exit_
                break
            if scores[exit_] >= search_bounds[exit_]:
                break
        exited[place] += 1
        wrong[place] += not correct[place]
    return [w / n if n else NAN for w, n in zip(wrong[:-1], exited[:-1], strict=True)]


def picked(pool: ExitScores, places: Sequence[int]) -> list[tuple[list[float], list[bool], list[float]]]:
    assert pool.true_class_probability is not None
    rows = zip(pool.scores.tolist(), pool.correct.tolist(), pool.true_class_probability.tolist(), strict=True)
    known = list(rows)
    return [known[int(place)] for place in places]


@pytest.mark.parametrize("mode", ["ltt", "ltt_joint", "empirical", "safekd_code"])
def test_risks_equal_literal_transcription(mode: str) -> None:
    """Draw, calibrate each client and the pooled samples, and count exits and errors."""
    pools = [client_pool(150, 6), client_pool(90, 7, sure_but_wrong=0.3), client_pool(60, 8)]
    samples, tuning_samples = (90, 50, 40), (70, 45, 30)
    calibrator = SelectiveRiskCalibrator(0.2, 0.7, mode)
    costs = [0.9, 0.95, 1.0]  # not evenly spaced as the default; for ltt_joint
    evaluated_heads = []

    def cost(evaluated: Sequence[bool]) -> list[float]:
        evaluated_heads.append(list(evaluated))
        return costs

    found = check_federated_validity(pools, calibrator, samples, tuning_samples, draws=4, seed=11, cost=cost)

    def policy(calibration: list[Any], tuning: list[Any]) -> tuple[Sequence[float], Sequence[float]]:
        scores, correct, probability = (list(column) for column in zip(*calibration, strict=True))
        of_tuning = [[row[column] for row in tuning] for column in range(2)]
        fitted = calibrator.fit(scores, correct, *of_tuning, probability, costs)
        return fitted.thresholds, fitted.search_bounds

    union = ExitScores(
        np.array([row for pool in pools for row in pool.scores.tolist()]),
        np.array([row for pool in pools for row in pool.correct.tolist()]),
    )
    expected_client, expected_pooled, expected_union = [], [], []
    for draw in range(4):
        rng = np.random.default_rng((11, draw))
        all_calibration, all_tuning, own = [], [], []
        for pool, n, t in zip(pools, samples, tuning_samples, strict=True):
            calibration = picked(pool, rng.integers(len(pool.scores), size=n))
            tuning = picked(pool, rng.integers(len(pool.scores), size=t))
            own.append(risk_by_counting(pool, *policy(calibration, tuning)))
            all_calibration += calibration
            all_tuning += tuning
        shared = policy(all_calibration, all_tuning)
        expected_client.append(own)
        expected_pooled.append([risk_by_counting(pool, *shared) for pool in pools])
        expected_union.append(risk_by_counting(union, *shared))
    assert not np.isnan(expected_union).all()
    np.testing.assert_array_equal(found.client_risks, expected_client)
    np.testing.assert_array_equal(found.pooled_risks, expected_pooled)
    np.testing.assert_array_equal(found.union_risks, expected_union)
    assert evaluated_heads
    assert all(evaluated == [True] * 3 for evaluated in evaluated_heads)


def test_more_draws_keep_earlier_draws() -> None:
    pools, calibrator = [client_pool(300, 9), client_pool(200, 10)], SelectiveRiskCalibrator(0.2, mode="empirical")

    def draw(draws: int, seed: int) -> FederatedValidity:
        return check_federated_validity(pools, calibrator, (60, 40), (30, 20), draws, seed)

    few, many, other = draw(3, 2), draw(7, 2), draw(3, 4)
    for name in ("client_risks", "pooled_risks", "union_risks"):
        np.testing.assert_array_equal(getattr(few, name), getattr(many, name)[:3])
        assert not np.array_equal(getattr(few, name), getattr(other, name), equal_nan=True)
        assert len(np.unique(getattr(many, name).reshape(7, -1), axis=0)) == 7  # all draws differ


def test_violations_count_draws_with_an_exit_above_target() -> None:
    above = math.nextafter(0.1, 1.0)
    # Two clients over four draws, two exits: no exits; exactly the target; slightly above at one exit; at both.
    own = [
        [[NAN, NAN], [0.1, 0.1]],
        [[0.1, NAN], [NAN, above]],
        [[above, NAN], [0.2, 0.3]],
        [[0.0, 0.1], [0.05, 0.11]],
    ]
    pooled = [[[0.5, 0.5], [NAN, NAN]], [[NAN, 0.1], [0.1, NAN]], [[0.0, 0.9], [0.0, 0.0]], [[1.0, NAN], [0.1, 0.1]]]
    together = [[NAN, NAN], [0.1, above], [0.3, 0.3], [0.1, 0.1]]
    found = FederatedValidity(SelectiveRiskCalibrator(0.1, 0.8), np.array(own), np.array(pooled), np.array(together))
    assert found.draws == 4
    assert found.client_violations == [1, 3]
    assert found.pooled_violations == [3, 0]
    assert found.union_violations == 2
    assert all(type(count) is int for count in (*found.client_violations, found.union_violations))  # for JSON


def test_error_rate_equal_to_target_is_no_violation() -> None:
    """In floating point 1 - 0.95 is above 0.05, and 3/60 is not."""
    pools = [
        ExitScores.from_arrays(np.full((of, 2), 0.9), np.arange(of)[:, None] >= np.array([[wrong, 0]]))
        for of, wrong in ((60, 3), (100, 5))
    ]
    calibrator = SelectiveRiskCalibrator(0.05, mode="empirical")
    found = check_federated_validity(pools, calibrator, (60, 100), (5, 5), draws=30)
    for risks in (found.client_risks, found.pooled_risks, found.union_risks):
        assert (risks == 0.05).any()
        assert np.isnan(risks).any()  # where the draw had more errors than the pool
    assert found.client_violations == found.pooled_violations == [0, 0]
    assert found.union_violations == 0


def error_message(values: dict[str, Any]) -> str:
    given: dict[str, Any] = {
        **{"populations": [client_pool(20, 1), client_pool(20, 2)], "calibrator": SelectiveRiskCalibrator(0.1)},
        **{"samples": [9, 9], "tuning_samples": [9, 9], "draws": 2},
    }
    given.update(values)
    with pytest.raises(UserError) as error:
        check_federated_validity(**given)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"populations": [], "samples": [], "tuning_samples": []}, "clients: expected at least 1, got 0"),
        ({"samples": [9]}, "samples and tuning_samples: expected 2 numbers, one per client, got 1 and 2"),
        ({"tuning_samples": [9, 9, 9]}, "samples and tuning_samples: expected 2 numbers, one per client, got 2 and 3"),
        (
            {"populations": [client_pool(20, 1)]},
            "samples and tuning_samples: expected 1 numbers, one per client, got 2 and 2",
        ),
        (
            {"populations": [client_pool(20, 1), client_pool(20, 2, exits=4)]},
            "clients: expected the same number of exits for a pooled policy, got 3 and 4",
        ),
        ({"samples": [9, 0]}, "samples: expected at least 1, got 0"),
        ({"tuning_samples": [-3, 9]}, "tuning_samples: expected at least 1, got -3"),
        ({"draws": 0}, "draws: expected at least 1, got 0"),
    ],
)
def test_invalid_input_raises_one_line_error(values: dict[str, Any], words: str) -> None:
    assert error_message(values).startswith(words)
