"""Accuracy against cost: what a network with exits gives for so many operations an image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.integrate import trapezoid

from fedekd.early_exit.cost_curves import Point
from fedekd.early_exit.policy import ExitPolicy, exit_index
from fedekd.early_exit.scoring import ExitOutputs
from fedekd.models import ExitCosts

#: Points of the curve.
_POINTS = 101


@dataclass(frozen=True)
class PolicyMetrics:
    """What a policy comes to on images that it was not calibrated on.

    Attributes:
        point: Its cost and accuracy.
        shares: Of the images that leave at each exit, (E,).
        risks: Error rate of those who leave at each exit, (E,); NaN where nobody does.
        full_accuracy: Of the last exit over all images.
    """

    point: Point
    shares: tuple[float, ...]
    risks: tuple[float, ...]
    full_accuracy: float

    @property
    def worst_risk(self) -> float:
        """Of the exits before the last; NaN if nobody leaves early."""
        early = [risk for risk in self.risks[:-1] if not math.isnan(risk)]
        return max(early, default=math.nan)


def accuracy_cost_curve(outputs: ExitOutputs, costs: ExitCosts, score: str = "max_softmax") -> list[Point]:
    """Images leave at the first exit whose score reaches a threshold, the same at all exits, from none to 1 above all.

    Returns:
        Points by rising cost.
    """
    scored = outputs.scored(score)
    leaving = np.asarray(costs.shares([True] * outputs.num_exits))
    rows = np.arange(len(outputs))
    # As many thresholds where scores crowd, near 1, as anywhere else.
    thresholds = np.unique(np.quantile(scored.scores[:, :-1], np.linspace(0.0, 1.0, _POINTS)))
    points = []
    for threshold in (*thresholds, math.inf):
        vector = (*(threshold,) * (outputs.num_exits - 1), -math.inf)
        exits = exit_index(scored.scores, vector, vector)
        points.append(Point(float(leaving[exits].mean()), float(scored.correct[rows, exits].mean())))
    return sorted(points)


def area(curve: Sequence[Point]) -> float:
    """Area under accuracy against cost, over the range of costs: the mean accuracy over all budgets in it.

    At a budget the best accuracy of any cheaper point counts.

    Example:
        >>> area([Point(0.0, 0.5), Point(0.5, 0.75), Point(1.0, 0.75)])
        0.6875
    """
    cost = np.asarray([point.cost for point in curve])
    best = np.maximum.accumulate([point.accuracy for point in curve])
    if cost[-1] == cost[0]:
        return float(best[-1])
    return float(trapezoid(best, cost) / (cost[-1] - cost[0]))


def evaluate_policy(policy: ExitPolicy, outputs: ExitOutputs, costs: ExitCosts) -> PolicyMetrics:
    """What a policy comes to on these images."""
    scored = outputs.scored(policy.score, policy.gamma)
    exits = policy.assign(scored.scores)
    right = scored.correct[np.arange(len(outputs)), exits]
    leaving = np.asarray(costs.shares(policy.evaluated, policy.uses_proxy))
    places = range(policy.num_exits)
    return PolicyMetrics(
        Point(float(leaving[exits].mean()), float(right.mean())),
        tuple(float((exits == place).mean()) for place in places),
        tuple(float((~right[exits == place]).mean()) if (exits == place).any() else math.nan for place in places),
        outputs.accuracies[-1],
    )
