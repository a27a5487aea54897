"""What a network with exits is worth where only so many operations an image may be spent."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fedekd.models import ExitCosts

#: Budgets that are looked at, as shares of the plain network's FLOPs.
BUDGETS = tuple(step / 20 for step in range(1, 21))

#: What is meant to be equal to a budget may lie a rounding error above it.
_ROUNDING = 1e-12

Scores = npt.NDArray[np.float64]


class Point(NamedTuple):
    """A way to run a network.

    Attributes:
        cost: Mean FLOPs of an image over those of the plain network.
        accuracy: Over all images.
    """

    cost: float
    accuracy: float


def exit_points(accuracies: Sequence[float], costs: ExitCosts) -> list[Point]:
    """Every image leaves at the same exit, one point an exit; no head but that one is evaluated.

    Args:
        accuracies: Of each exit over all images, (E,).
        costs: Of the network.
    """
    exits = len(accuracies)
    alone = [costs.leaving([place == exit_ for place in range(exits)])[exit_] for exit_ in range(exits)]
    return [Point(cost / costs.full, accuracy) for cost, accuracy in zip(alone, accuracies, strict=True)]


def budget_points(
    tuning: Scores, scores: Scores, correct: npt.NDArray[np.bool_], costs: ExitCosts, budgets: Sequence[float] = BUDGETS
) -> dict[float, Point]:
    """Accuracy within a budget: an image leaves at the first exit whose score reaches a threshold, the same at all.

    The threshold of a budget is the highest that keeps to it on the tuning images; what it comes to is told of other
    images, and so their cost may lie beside the budget. A network none of whose images leave early costs what the
    plain one does.

    Args:
        tuning: Scores of the images on which thresholds are chosen, (n, E).
        scores: Scores of the images that are judged, (m, E).
        correct: Whether each exit is right about them, (m, E).
        costs: Of the network.
        budgets: Shares of the plain network's FLOPs.

    Returns:
        By budget; without those below the cost of the first exit, and empty without images.
    """
    if not len(tuning) or not len(scores):
        return {}
    leaving = np.asarray(costs.shares([True] * scores.shape[1]))
    # Of a sample the scores of shallower exits count, too: it is gone as soon as one of them reaches the threshold.
    reached = np.maximum.accumulate(np.nan_to_num(tuning[:, :-1], nan=-math.inf), axis=1)
    thresholds = np.unique(reached[reached > -math.inf])
    found = {}
    for budget in budgets:
        if budget >= 1.0:
            found[budget] = Point(1.0, float(correct[:, -1].mean()))
            continue
        # Costs rise with the threshold: the highest that keeps to the budget is found by halving.
        low, high = 0, len(thresholds)
        while low < high:
            middle = (low + high) // 2
            if float(leaving[_first_exits(reached, thresholds[middle])].mean()) <= budget + _ROUNDING:
                low = middle + 1
            else:
                high = middle
        if low:
            exits = _first_exits(scores[:, :-1], thresholds[low - 1])
            right = correct[np.arange(len(scores)), exits]
            found[budget] = Point(float(leaving[exits].mean()), float(right.mean()))
    return found


def _first_exits(scores: Scores, threshold: float) -> npt.NDArray[np.int64]:
    """The first exit whose score reaches a threshold, (n,), from the scores of all exits but the last, (n, E - 1)."""
    passes = scores >= threshold
    exits: npt.NDArray[np.int64] = np.where(passes.any(axis=1), passes.argmax(axis=1), scores.shape[1])
    return exits


def cost_of(accuracy: float, curve: Sequence[Point]) -> float:
    """The least cost at which a curve reaches an accuracy, linear between its points; NaN where it does not.

    Example:
        >>> round(cost_of(0.75, [Point(0.2, 0.5), Point(0.4, 1.0), Point(1.0, 0.9)]), 6)
        0.3
    """
    points = sorted(curve)
    for place, point in enumerate(points):
        if point.accuracy >= accuracy:
            if place == 0:
                return point.cost
            before = points[place - 1]
            share = (accuracy - before.accuracy) / (point.accuracy - before.accuracy)
            return float(before.cost + share * (point.cost - before.cost))
    return math.nan
