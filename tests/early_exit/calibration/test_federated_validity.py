"""Whose promise holds in a federation: each client's own, and that of a policy which all share."""

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

ALPHA, DELTA = 0.1, 0.1
NAN = math.nan


def client_pool(size: int, seed: int, sure_but_wrong: float = 0.0, exits: int = 3) -> ExitScores:
    """Scores of one law for every client; of the surest a share is wrong where the client is overconfident."""
    rng = np.random.default_rng(seed)
    scores = rng.uniform(size=(size, exits)) ** 0.5
    wrong = np.maximum(0.6 * (1 - scores) ** 1.5, sure_but_wrong)
    correct = rng.uniform(size=(size, exits)) > wrong
    return ExitScores.checked(scores, correct, np.where(correct, scores, (1 - scores) / 2))


#: Two clients that may trust their scores, and a small one that may not: 1 in 4 is wrong however sure it is.
GOOD, OVERCONFIDENT = (0, 1), 2


@cache
def federation() -> list[ExitScores]:
    return [client_pool(3000, 1), client_pool(2400, 2), client_pool(600, 3, sure_but_wrong=0.25)]


@cache
def validity(mode: str) -> FederatedValidity:
    calibrator = SelectiveRiskCalibrator(ALPHA, DELTA, mode)
    return check_federated_validity(federation(), calibrator, (500, 400, 100), (250, 200, 50), draws=200, seed=5)


def low(broken: int, of: int) -> float:
    return clopper_pearson(broken, of)[0]


def test_each_clients_own_promise_holds() -> None:
    found = validity("ltt")
    assert found.draws == 200
    assert (found.alpha, found.delta, found.mode) == (ALPHA, DELTA, "ltt")
    assert all(low(broken, found.draws) <= DELTA for broken in found.own_violations)
    for client in GOOD:  # and not because nobody leaves
        assert (~np.isnan(found.own[:, client])).any(axis=1).mean() > 0.9
    assert np.isnan(found.own[:, OVERCONFIDENT]).mean() > 0.9  # for whom that is the only way to keep it


def test_a_shared_promise_holds_for_all_together_and_fails_the_overconfident_client() -> None:
    found = validity("ltt")
    assert low(found.together_violations, found.draws) <= DELTA
    assert (~np.isnan(found.together)).any(axis=1).mean() > 0.9
    broken = found.pooled_violations
    assert broken[OVERCONFIDENT] > 0.9 * found.draws
    assert all(low(broken[client], found.draws) <= DELTA for client in GOOD)
    # One policy, so the error rate of all is between those of its clients.
    opened = ~np.isnan(found.together) & ~np.isnan(found.pooled).any(axis=1)
    assert opened.mean() > 0.4
    assert (found.pooled.min(axis=1)[opened] <= found.together[opened]).all()
    assert (found.together[opened] <= found.pooled.max(axis=1)[opened]).all()


def test_plug_in_thresholds_break_even_their_own_promise() -> None:
    found = validity("empirical")
    assert all(low(broken, found.draws) > DELTA for broken in found.own_violations)
    assert low(found.together_violations, found.draws) > DELTA


@pytest.mark.parametrize("mode", ["ltt", "empirical", "released"])
def test_a_single_client_is_its_federation(mode: str) -> None:
    pool, calibrator = client_pool(900, 4), SelectiveRiskCalibrator(ALPHA, DELTA, mode)
    alone = check_validity(pool, calibrator, 200, 120, draws=8, seed=3)
    found = check_federated_validity([pool], calibrator, [200], [120], draws=8, seed=3)
    assert not np.isnan(alone.risks).all()
    for risks in (found.own[:, 0], found.pooled[:, 0], found.together):
        assert risks.shape == (8, 2)
        assert risks.tobytes() == alone.risks.tobytes()
    assert found.own_violations == found.pooled_violations == [found.together_violations] == [alone.violations]


def risk_by_counting(pool: ExitScores, thresholds: Sequence[float], search_bounds: Sequence[float]) -> list[float]:
    """Sample by sample: it leaves at the first threshold it reaches, unless it was in a band before."""
    leave, wrong = [0] * len(thresholds), [0] * len(thresholds)
    for scores, correct in zip(pool.scores.tolist(), pool.correct.tolist(), strict=True):
        place = len(thresholds) - 1
        for exit_ in range(len(thresholds) - 1):
            if scores[exit_] >= thresholds[exit_]:
                place = exit_
                break
            if scores[exit_] >= search_bounds[exit_]:
                break
        leave[place] += 1
        wrong[place] += not correct[place]
    return [w / n if n else NAN for w, n in zip(wrong[:-1], leave[:-1], strict=True)]


def picked(pool: ExitScores, places: Sequence[int]) -> list[tuple[list[float], list[bool], list[float]]]:
    assert pool.true_class_probability is not None
    rows = zip(pool.scores.tolist(), pool.correct.tolist(), pool.true_class_probability.tolist(), strict=True)
    known = list(rows)
    return [known[int(place)] for place in places]


@pytest.mark.parametrize("mode", ["ltt", "path", "empirical", "released"])
def test_it_is_what_one_would_do_by_hand(mode: str) -> None:
    """Literally: draw, calibrate each and all of them, and count who leaves and is wrong."""
    pools = [client_pool(150, 6), client_pool(90, 7, sure_but_wrong=0.3), client_pool(60, 8)]
    samples, tuning_samples = (90, 50, 40), (70, 45, 30)
    calibrator = SelectiveRiskCalibrator(0.2, 0.3, mode)
    costs = [0.9, 0.95, 1.0]  # not evenly spaced, as is the default; for `path`
    asked = []

    def cost(evaluated: Sequence[bool]) -> list[float]:
        asked.append(list(evaluated))
        return costs

    found = check_federated_validity(pools, calibrator, samples, tuning_samples, draws=4, seed=11, cost=cost)

    def policy(calibration: list[Any], tuning: list[Any]) -> tuple[Sequence[float], Sequence[float]]:
        scores, correct, probability = (list(column) for column in zip(*calibration, strict=True))
        of_tuning = [[row[column] for row in tuning] for column in range(2)]
        fitted = calibrator.fit(scores, correct, *of_tuning, probability, costs)
        return fitted.thresholds, fitted.search_bounds

    everybody = ExitScores(
        np.array([row for pool in pools for row in pool.scores.tolist()]),
        np.array([row for pool in pools for row in pool.correct.tolist()]),
    )
    expected_own, expected_pooled, expected_together = [], [], []
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
        expected_own.append(own)
        expected_pooled.append([risk_by_counting(pool, *shared) for pool in pools])
        expected_together.append(risk_by_counting(everybody, *shared))
    assert not np.isnan(expected_together).all()
    np.testing.assert_array_equal(found.own, expected_own)
    np.testing.assert_array_equal(found.pooled, expected_pooled)
    np.testing.assert_array_equal(found.together, expected_together)
    assert asked
    assert all(evaluated == [True] * 3 for evaluated in asked)


def test_more_draws_leave_the_earlier_ones_alone() -> None:
    pools, calibrator = [client_pool(300, 9), client_pool(200, 10)], SelectiveRiskCalibrator(0.2, mode="empirical")

    def draw(draws: int, seed: int) -> FederatedValidity:
        return check_federated_validity(pools, calibrator, (60, 40), (30, 20), draws, seed)

    few, many, other = draw(3, 2), draw(7, 2), draw(3, 4)
    for name in ("own", "pooled", "together"):
        np.testing.assert_array_equal(getattr(few, name), getattr(many, name)[:3])
        assert not np.array_equal(getattr(few, name), getattr(other, name), equal_nan=True)
        assert len(np.unique(getattr(many, name).reshape(7, -1), axis=0)) == 7  # no draw is another again


def test_violations_are_draws_in_which_some_exit_is_above_alpha() -> None:
    above = math.nextafter(0.1, 1.0)
    # Two clients over four draws, two exits: nobody leaves; exactly alpha; a hair more at one exit; at both.
    own = [
        [[NAN, NAN], [0.1, 0.1]],
        [[0.1, NAN], [NAN, above]],
        [[above, NAN], [0.2, 0.3]],
        [[0.0, 0.1], [0.05, 0.11]],
    ]
    pooled = [[[0.5, 0.5], [NAN, NAN]], [[NAN, 0.1], [0.1, NAN]], [[0.0, 0.9], [0.0, 0.0]], [[1.0, NAN], [0.1, 0.1]]]
    together = [[NAN, NAN], [0.1, above], [0.3, 0.3], [0.1, 0.1]]
    found = FederatedValidity(0.1, 0.2, "ltt", np.array(own), np.array(pooled), np.array(together))
    assert found.draws == 4
    assert found.own_violations == [1, 3]
    assert found.pooled_violations == [3, 0]
    assert found.together_violations == 2
    assert all(type(count) is int for count in (*found.own_violations, found.together_violations))  # for JSON


def test_an_error_rate_of_exactly_alpha_keeps_the_promise() -> None:
    """Of 60 and of 100 samples that all leave, 1 in 20 is wrong: 1 - 0.95 is above 0.05, and 3/60 is not."""
    pools = [
        ExitScores.checked(np.full((of, 2), 0.9), np.arange(of)[:, None] >= np.array([[wrong, 0]]))
        for of, wrong in ((60, 3), (100, 5))
    ]
    calibrator = SelectiveRiskCalibrator(0.05, mode="empirical")
    found = check_federated_validity(pools, calibrator, (60, 100), (5, 5), draws=30)
    for risks in (found.own, found.pooled, found.together):
        assert (risks == 0.05).any()
        assert np.isnan(risks).any()  # where the draw had more errors than the pool
    assert found.own_violations == found.pooled_violations == [0, 0]
    assert found.together_violations == 0


def told(values: dict[str, Any]) -> str:
    given: dict[str, Any] = {
        **{"pools": [client_pool(20, 1), client_pool(20, 2)], "calibrator": SelectiveRiskCalibrator(0.1)},
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
        ({"pools": [], "samples": [], "tuning_samples": []}, "there are no clients; at least 1 is needed"),
        ({"samples": [9]}, "2 clients have 1 numbers of samples and 2 of tuning samples"),
        ({"tuning_samples": [9, 9, 9]}, "2 clients have 2 numbers of samples and 3 of tuning samples"),
        ({"pools": [client_pool(20, 1)]}, "1 clients have 2 numbers of samples and 2 of tuning samples"),
        ({"pools": [client_pool(20, 1), client_pool(20, 2, exits=4)]}, "the clients have 3 or 4 exits"),
        ({"samples": [9, 0]}, "samples is 0, and must be at least 1"),
        ({"tuning_samples": [-3, 9]}, "tuning_samples is -3, and must be at least 1"),
        ({"draws": 0}, "draws is 0, and must be at least 1"),
    ],
)
def test_bad_input_is_told_in_one_line(values: dict[str, Any], words: str) -> None:
    assert told(values).startswith(words)
