"""Accuracy of a network with exits as a function of its cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.integrate import trapezoid

from fedekd.early_exit.inference import exit_index
from fedekd.early_exit.scoring import ExitOutputs
from fedekd.models import ExitCosts

#: Default budgets, as fractions of the plain network's FLOPs.
BUDGETS = tuple(step / 20 for step in range(1, 21))

#: Tolerance for a cost that equals the budget up to round-off.
_ROUNDING = 1e-12

#: Number of thresholds of `accuracy_cost_curve`.
_THRESHOLDS = 101

Scores = npt.NDArray[np.float64]


class Point(NamedTuple):
    """Cost and accuracy of one way to run a network.

    Attributes:
        cost: Mean FLOPs per image divided by those of the plain network.
        accuracy: Accuracy over all images.
    """

    cost: float
    accuracy: float


def exit_points(accuracies: Sequence[float], costs: ExitCosts) -> list[Point]:
    """Compute the point of each exit if all images take it.

    No other head is evaluated.

    Args:
        accuracies: Accuracy of each exit over all images, shape (E,).
        costs: Costs of the network.
    """
    exits = range(len(accuracies))
    flops = [costs.flops_at_exits([other == exit_ for other in exits])[exit_] for exit_ in exits]
    return [Point(cost / costs.full, accuracy) for cost, accuracy in zip(flops, accuracies, strict=True)]


def budget_points(
    tuning: Scores, scores: Scores, correct: npt.NDArray[np.bool_], costs: ExitCosts, budgets: Sequence[float] = BUDGETS
) -> dict[float, Point]:
    """Compute the accuracy within FLOP budgets, with one threshold for all exits.

    For each budget the highest threshold whose mean cost on the tuning images is at most the budget is selected and
    evaluated on other images, whose cost may therefore deviate from the budget. Without early exits the cost is that of
    the plain network.

    Args:
        tuning: Scores of the images on which thresholds are selected, shape (n, E).
        scores: Scores of the evaluated images, shape (m, E).
        correct: Whether the prediction of each exit is correct, shape (m, E).
        costs: Costs of the network.
        budgets: Fractions of the plain network's FLOPs.

    Returns:
        Points by budget, without budgets below the cost of the first exit; empty without images.
    """
    if not len(tuning) or not len(scores):
        return {}
    exit_costs = np.asarray(costs.shares([True] * scores.shape[1]))
    # Running maximum over exits: a sample exits as soon as one of its scores reaches the threshold.
    reached = np.maximum.accumulate(np.nan_to_num(tuning[:, :-1], nan=-math.inf), axis=1)
    thresholds = np.unique(reached[reached > -math.inf])
    points = {}
    for budget in budgets:
        if budget >= 1.0:
            points[budget] = Point(1.0, float(correct[:, -1].mean()))
            continue
        # Binary search: the cost increases with the threshold.
        low, high = 0, len(thresholds)
        while low < high:
            middle = (low + high) // 2
            if float(exit_costs[_first_exits(reached, thresholds[middle])].mean()) <= budget + _ROUNDING:
                low = middle + 1
            else:
                high = middle
        if low:
            points[budget] = _point(_first_exits(scores[:, :-1], thresholds[low - 1]), correct, exit_costs)
    return points


def _first_exits(scores: Scores, threshold: float) -> npt.NDArray[np.int64]:
    """First exit whose score reaches the threshold, from scores of early exits."""
    passes = scores >= threshold
    exits: npt.NDArray[np.int64] = np.where(passes.any(axis=1), passes.argmax(axis=1), scores.shape[1])
    return exits


def _point(exits: npt.NDArray[np.int64], correct: npt.NDArray[np.bool_], exit_costs: Scores) -> Point:
    return Point(float(exit_costs[exits].mean()), float(correct[np.arange(len(exits)), exits].mean()))


def accuracy_cost_curve(outputs: ExitOutputs, costs: ExitCosts, score: str = "max_softmax") -> list[Point]:
    """Compute points for one threshold at all exits.

    Thresholds range from the lowest score to one above all scores.

    Args:
        outputs: Outputs of all exits.
        costs: Costs of the network.
        score: A key of `fedekd.functional.SCORES`.

    Returns:
        Points in order of cost.
    """
    scores = outputs.to_scores(score)
    exit_costs = np.asarray(costs.shares([True] * outputs.num_exits))
    # Quantiles, because scores are dense near 1.
    thresholds = np.unique(np.quantile(scores.scores[:, :-1], np.linspace(0.0, 1.0, _THRESHOLDS)))
    points = []
    for threshold in (*thresholds, math.inf):
        vector = (*(threshold,) * (outputs.num_exits - 1), -math.inf)
        points.append(_point(exit_index(scores.scores, vector, vector), scores.correct, exit_costs))
    return sorted(points)


def area(curve: Sequence[Point]) -> float:
    """Compute the area under accuracy against cost, divided by the range of costs.

    This is the mean over all budgets in the range of the best accuracy within the budget, linear between points.

    Args:
        curve: At least 1 point, in order of cost.

    Example:
        >>> area([Point(0.0, 0.5), Point(0.5, 0.75), Point(1.0, 0.75)])
        0.6875
    """
    cost = np.asarray([point.cost for point in curve])
    best = np.maximum.accumulate([point.accuracy for point in curve])
    if cost[-1] == cost[0]:
        return float(best[-1])
    return float(trapezoid(best, cost) / (cost[-1] - cost[0]))


def cost_of(accuracy: float, curve: Sequence[Point]) -> float:
    """Compute the lowest cost at which a curve reaches an accuracy.

    The curve is linear between points.

    Args:
        accuracy: The accuracy to reach.
        curve: Points in any order.

    Returns:
        The cost; NaN if the curve does not reach the accuracy.

    Example:
        >>> round(cost_of(0.75, [Point(0.2, 0.5), Point(0.4, 1.0), Point(1.0, 0.9)]), 6)
        0.3
    """
    points = sorted(curve)
    for index, point in enumerate(points):
        if point.accuracy >= accuracy:
            if index == 0:
                return point.cost
            before = points[index - 1]
            fraction = (accuracy - before.accuracy) / (point.accuracy - before.accuracy)
            return float(before.cost + fraction * (point.cost - before.cost))
    return math.nan
