"""Accuracy within a budget of FLOPs, against all thresholds tried one by one, in fractions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedekd.early_exit import BUDGETS, Point, budget_points, cost_of, exit_points
from fedekd.models import ExitCosts

#: Of exits that cost powers of two in all, so that means in floating point are exact.
FULL = 64
EIGHTHS = [step / 8 for step in range(1, 8)]


@st.composite
def costs_of(draw: st.DrawFn, exits: int) -> ExitCosts:
    heads = draw(st.lists(st.integers(0, 3), min_size=exits, max_size=exits))
    stages = draw(st.lists(st.integers(0, 12), min_size=exits - 1, max_size=exits - 1))
    return ExitCosts((*stages, FULL - sum(stages) - heads[-1]), tuple(heads))


@st.composite
def cases(draw: st.DrawFn, values: Sequence[float]) -> dict[str, Any]:
    exits, tuned, judged = draw(st.integers(1, 4)), draw(st.integers(1, 8)), draw(st.integers(1, 8))

    def matrix(element: Any, rows: int) -> Any:
        return np.asarray(draw(st.lists(element, min_size=rows * exits, max_size=rows * exits))).reshape(rows, exits)

    return {
        "tuning": matrix(st.sampled_from(values), tuned),
        "scores": matrix(st.sampled_from(values), judged),
        "correct": matrix(st.booleans(), judged),
        "costs": draw(costs_of(exits)),
    }


def literal_exit(row: Sequence[float], threshold: float) -> int:
    for exit_, score in enumerate(row[:-1]):
        if score >= threshold:
            return exit_
    return len(row) - 1


def literal_cost(rows: Any, threshold: float, costs: ExitCosts) -> Fraction:
    """All heads that an image comes by are evaluated."""
    spent = Fraction(0)
    for row in rows:
        exit_ = literal_exit(row, threshold)
        spent += sum(costs.stages[: exit_ + 1]) + sum(costs.heads[: exit_ + 1])
    return spent / len(rows) / costs.full


def literal_points(tuning: Any, scores: Any, correct: Any, costs: ExitCosts) -> dict[float, Point]:
    tried = [float(score) for row in tuning for score in row[:-1] if not math.isnan(score)]
    found = {}
    for budget in EIGHTHS:
        kept = [each for each in tried if literal_cost(tuning, each, costs) <= Fraction(budget)]
        if kept:
            right = [right[literal_exit(row, max(kept))] for row, right in zip(scores, correct, strict=True)]
            cost = literal_cost(scores, max(kept), costs)
            found[budget] = Point(float(cost), float(Fraction(int(sum(right)), len(scores))))
    return found


@given(cases([0.0, 0.25, 0.5, 0.75, 1.0]))
def test_the_threshold_of_a_budget_is_the_best_of_all_even_among_ties(case: dict[str, Any]) -> None:
    assert budget_points(**case, budgets=EIGHTHS) == literal_points(**case)


@given(cases([0.5, 1.0, math.nan]))
def test_an_exit_without_a_score_lets_nobody_leave(case: dict[str, Any]) -> None:
    assert budget_points(**case, budgets=EIGHTHS) == literal_points(**case)


@given(cases([0.0, 0.125, 0.25, 0.5, 0.625, 1.0]))
def test_the_tuning_images_keep_to_every_budget_and_use_more_of_a_larger_one(case: dict[str, Any]) -> None:
    case = {**case, "scores": case["tuning"], "correct": np.zeros(case["tuning"].shape, dtype=bool)}
    points = budget_points(**case, budgets=EIGHTHS)
    assert all(point.cost <= budget for budget, point in points.items())
    spent = [points[budget].cost for budget in EIGHTHS if budget in points]
    assert spent == sorted(spent)
    dearer = [budget for budget in EIGHTHS if min(points, default=1.0) <= budget]
    assert list(points) == dearer


def by_hand() -> dict[str, Any]:
    """Three exits that cost 20, 50 and, with all heads, 110 of 100."""
    return {
        "tuning": np.asarray([[0.9, 0.0, 0.0], [0.5, 0.8, 0.0], [0.5, 0.6, 0.0], [0.1, 0.2, 0.0]]),
        "scores": np.asarray([[0.9, 0.1, 0.0], [0.3, 0.85, 0.0], [0.85, 0.9, 0.0]]),
        "correct": np.asarray([[False, False, True], [False, True, True], [True, True, False]]),
        "costs": ExitCosts((15, 25, 50), (5, 5, 10)),
    }


def test_by_hand() -> None:
    points = budget_points(**by_hand(), budgets=[0.1, 0.2, 0.3, 0.75, 0.8, 1.0, 2.0])
    # On the tuning images 0.1 costs .2, 0.2 .275, 0.6 .575, 0.8 .725 and 0.9 .875.
    assert list(points) == [0.2, 0.3, 0.75, 0.8, 1.0, 2.0]
    assert points[0.2] == pytest.approx((0.2, 1 / 3))
    assert points[0.3] == points[0.2]
    assert points[0.75] == points[0.8] == pytest.approx((0.3, 2 / 3))
    assert points[1.0] == points[2.0] == (1.0, 2 / 3)


def test_nothing_is_promised_of_no_images() -> None:
    case = by_hand()
    none = np.empty((0, 3))
    assert budget_points(**{**case, "tuning": none}) == {}
    assert budget_points(**{**case, "scores": none, "correct": none.astype(bool)}) == {}


def test_a_single_exit_has_the_plain_network_alone() -> None:
    one = np.asarray([[0.2], [0.9]])
    assert budget_points(one, one, one > 0.5, ExitCosts((7,), (3,))) == {1.0: Point(1.0, 0.5)}


def test_the_scores_of_the_last_exit_decide_nothing() -> None:
    case = by_hand()
    other = {**case, "tuning": case["tuning"] + [0, 0, 0.95], "scores": case["scores"] + [0, 0, math.nan]}
    assert budget_points(**other) == budget_points(**case)


def test_a_budget_that_is_met_to_the_flop_is_kept() -> None:
    """A third of 3 x 0.1 is more than 0.1 in floating point."""
    ones = np.ones((3, 2))
    points = budget_points(ones, ones, ones > 0, ExitCosts((9, 80), (1, 11)), [0.1])
    assert points == {0.1: pytest.approx((0.1, 1.0))}


def test_budgets_are_twentieths_up_to_all() -> None:
    assert len(BUDGETS) == 20
    assert [round(100 * budget) for budget in BUDGETS] == list(range(5, 101, 5))
    assert BUDGETS[-1] == 1.0


def test_points_of_single_exits_pay_no_other_head() -> None:
    assert exit_points([0.5, 0.75, 0.8], by_hand()["costs"]) == [(0.2, 0.5), (0.45, 0.75), (1.0, 0.8)]


CURVES = st.lists(st.tuples(st.integers(0, 20), st.integers(0, 8)), min_size=1, max_size=6, unique_by=lambda p: p[0])


@given(CURVES, st.integers(0, 9), st.floats(0, 1))
def test_the_cost_of_an_accuracy_is_where_the_curve_first_reaches_it(
    drawn: list[tuple[int, int]], wanted: int, before: float
) -> None:
    curve = [Point(cost / 20, accuracy / 8) for cost, accuracy in drawn]
    costs, accuracies = zip(*sorted(curve), strict=True)
    found = cost_of(wanted / 8, curve)
    if max(accuracies) < wanted / 8:
        assert math.isnan(found)
        return
    assert np.interp(found, costs, accuracies) >= wanted / 8 - 1e-9
    assert found >= costs[0]
    cheaper = costs[0] + before * (found - costs[0])
    if found - cheaper > 1e-9:
        assert np.interp(cheaper, costs, accuracies) < wanted / 8


@pytest.mark.parametrize(
    ("accuracy", "curve", "cost"),
    [
        (0.5, [(0.2, 0.5)], 0.2),
        (0.1, [(0.2, 0.5), (0.1, 0.4)], 0.1),
        (0.6, [(1.0, 0.9), (0.2, 0.5), (0.6, 0.4)], 0.6 + 0.4 * 0.2 / 0.5),
        (0.7, [(0.2, 0.5), (0.2, 0.9), (0.6, 0.9)], 0.2),
        (0.91, [(0.2, 0.5), (1.0, 0.9)], math.nan),
        (0.5, [], math.nan),
        (math.nan, [(0.2, 0.5)], math.nan),
        (0.5, [(0.2, math.nan), (0.4, math.nan)], math.nan),
    ],
)
def test_cost_of_by_hand(accuracy: float, curve: list[tuple[float, float]], cost: float) -> None:
    assert cost_of(accuracy, [Point(*point) for point in curve]) == pytest.approx(cost, nan_ok=True)
