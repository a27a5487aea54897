"""Accuracy within a budget of FLOPs, against all thresholds candidates one by one, in fractions."""

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

#: A power of two, so that means in floating point are exact.
FULL = 64
EIGHTHS = [step / 8 for step in range(1, 8)]


@st.composite
def image_costs(draw: st.DrawFn, exits: int) -> ExitCosts:
    heads = draw(st.lists(st.integers(0, 3), min_size=exits, max_size=exits))
    stages = draw(st.lists(st.integers(0, 12), min_size=exits - 1, max_size=exits - 1))
    return ExitCosts((*stages, FULL - sum(stages) - heads[-1]), tuple(heads))


@st.composite
def cases(draw: st.DrawFn, values: Sequence[float]) -> dict[str, Any]:
    exits, tuned, tested = draw(st.integers(1, 4)), draw(st.integers(1, 8)), draw(st.integers(1, 8))

    def matrix(element: Any, rows: int) -> Any:
        return np.asarray(draw(st.lists(element, min_size=rows * exits, max_size=rows * exits))).reshape(rows, exits)

    return {
        "tuning": matrix(st.sampled_from(values), tuned),
        "scores": matrix(st.sampled_from(values), tested),
        "correct": matrix(st.booleans(), tested),
        "costs": draw(image_costs(exits)),
    }


def literal_exit(row: Sequence[float], threshold: float) -> int:
    for exit_, score in enumerate(row[:-1]):
        if score >= threshold:
            return exit_
    return len(row) - 1


def literal_cost(rows: Any, threshold: float, costs: ExitCosts) -> Fraction:
    """All heads up to the exit are evaluated."""
    spent = Fraction(0)
    for row in rows:
        exit_ = literal_exit(row, threshold)
        spent += sum(costs.stages[: exit_ + 1]) + sum(costs.heads[: exit_ + 1])
    return spent / len(rows) / costs.full


def literal_points(tuning: Any, scores: Any, correct: Any, costs: ExitCosts) -> dict[float, Point]:
    candidates = [float(score) for row in tuning for score in row[:-1] if not math.isnan(score)]
    points = {}
    for budget in EIGHTHS:
        feasible = [each for each in candidates if literal_cost(tuning, each, costs) <= Fraction(budget)]
        if feasible:
            right = [right[literal_exit(row, max(feasible))] for row, right in zip(scores, correct, strict=True)]
            cost = literal_cost(scores, max(feasible), costs)
            points[budget] = Point(float(cost), float(Fraction(int(sum(right)), len(scores))))
    return points


@given(cases([0.0, 0.25, 0.5, 0.75, 1.0]))
def test_budget_points_equal_exhaustive_search(case: dict[str, Any]) -> None:
    assert budget_points(**case, budgets=EIGHTHS) == literal_points(**case)


@given(cases([0.5, 1.0, math.nan]))
def test_budget_points_nan_score_never_exits(case: dict[str, Any]) -> None:
    assert budget_points(**case, budgets=EIGHTHS) == literal_points(**case)


@given(cases([0.0, 0.125, 0.25, 0.5, 0.625, 1.0]))
def test_budget_points_tuning_cost_is_within_budget_and_monotone(case: dict[str, Any]) -> None:
    case = {**case, "scores": case["tuning"], "correct": np.zeros(case["tuning"].shape, dtype=bool)}
    points = budget_points(**case, budgets=EIGHTHS)
    assert all(point.cost <= budget for budget, point in points.items())
    spent = [points[budget].cost for budget in EIGHTHS if budget in points]
    assert spent == sorted(spent)
    feasible_budgets = [budget for budget in EIGHTHS if min(points, default=1.0) <= budget]
    assert list(points) == feasible_budgets


def by_hand() -> dict[str, Any]:
    """Three exits that cost 20, 50 and, with all heads, 110 of 100."""
    return {
        "tuning": np.asarray([[0.9, 0.0, 0.0], [0.5, 0.8, 0.0], [0.5, 0.6, 0.0], [0.1, 0.2, 0.0]]),
        "scores": np.asarray([[0.9, 0.1, 0.0], [0.3, 0.85, 0.0], [0.85, 0.9, 0.0]]),
        "correct": np.asarray([[False, False, True], [False, True, True], [True, True, False]]),
        "costs": ExitCosts((15, 25, 50), (5, 5, 10)),
    }


def test_budget_points_by_hand() -> None:
    points = budget_points(**by_hand(), budgets=[0.1, 0.2, 0.3, 0.75, 0.8, 1.0, 2.0])
    # On the tuning images 0.1 costs .2, 0.2 .275, 0.6 .575, 0.8 .725 and 0.9 .875.
    assert list(points) == [0.2, 0.3, 0.75, 0.8, 1.0, 2.0]
    assert points[0.2] == pytest.approx((0.2, 1 / 3))
    assert points[0.3] == points[0.2]
    assert points[0.75] == points[0.8] == pytest.approx((0.3, 2 / 3))
    assert points[1.0] == points[2.0] == (1.0, 2 / 3)


def test_budget_points_without_images_are_empty() -> None:
    case = by_hand()
    none = np.empty((0, 3))
    assert budget_points(**{**case, "tuning": none}) == {}
    assert budget_points(**{**case, "scores": none, "correct": none.astype(bool)}) == {}


def test_budget_points_single_exit_is_plain_network() -> None:
    one = np.asarray([[0.2], [0.9]])
    assert budget_points(one, one, one > 0.5, ExitCosts((7,), (3,))) == {1.0: Point(1.0, 0.5)}


def test_budget_points_ignore_scores_of_last_exit() -> None:
    case = by_hand()
    other = {**case, "tuning": case["tuning"] + [0, 0, 0.95], "scores": case["scores"] + [0, 0, math.nan]}
    assert budget_points(**other) == budget_points(**case)


def test_budget_points_cost_equal_to_budget_is_accepted() -> None:
    """A third of 3 x 0.1 is more than 0.1 in floating point."""
    ones = np.ones((3, 2))
    points = budget_points(ones, ones, ones > 0, ExitCosts((9, 80), (1, 11)), [0.1])
    assert points == {0.1: pytest.approx((0.1, 1.0))}


def test_budgets_are_multiples_of_5_percent() -> None:
    assert len(BUDGETS) == 20
    assert [round(100 * budget) for budget in BUDGETS] == list(range(5, 101, 5))
    assert BUDGETS[-1] == 1.0


def test_exit_points_cost_no_other_head() -> None:
    assert exit_points([0.5, 0.75, 0.8], by_hand()["costs"]) == [(0.2, 0.5), (0.45, 0.75), (1.0, 0.8)]


CURVES = st.lists(st.tuples(st.integers(0, 20), st.integers(0, 8)), min_size=1, max_size=6, unique_by=lambda p: p[0])


@given(CURVES, st.integers(0, 9), st.floats(0, 1))
def test_cost_of_is_first_crossing_of_the_curve(drawn: list[tuple[int, int]], target: int, before: float) -> None:
    curve = [Point(cost / 20, accuracy / 8) for cost, accuracy in drawn]
    costs, accuracies = zip(*sorted(curve), strict=True)
    points = cost_of(target / 8, curve)
    if max(accuracies) < target / 8:
        assert math.isnan(points)
        return
    assert np.interp(points, costs, accuracies) >= target / 8 - 1e-9
    assert points >= costs[0]
    cheaper = costs[0] + before * (points - costs[0])
    if points - cheaper > 1e-9:
        assert np.interp(cheaper, costs, accuracies) < target / 8


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
