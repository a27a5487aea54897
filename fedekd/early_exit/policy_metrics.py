"""Cost, accuracy and error rates of a policy on unseen images."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedekd.early_exit.cost_curves import Point
from fedekd.early_exit.policy import ExitPolicy
from fedekd.early_exit.scoring import ExitOutputs
from fedekd.models import ExitCosts


@dataclass(frozen=True)
class PolicyMetrics:
    """Results of a policy.

    Attributes:
        point: Mean cost and accuracy.
        exit_shares: Fraction of images that take each exit, shape (E,).
        risks: Error rate among the images that take each exit, shape (E,); NaN if no image does.
        full_accuracy: Accuracy of the last exit over all images.
    """

    point: Point
    exit_shares: tuple[float, ...]
    risks: tuple[float, ...]
    full_accuracy: float

    @property
    def worst_risk(self) -> float:
        """Largest error rate of the exits before the last; NaN if no image exits early."""
        return max((risk for risk in self.risks[:-1] if not math.isnan(risk)), default=math.nan)


def evaluate_policy(policy: ExitPolicy, outputs: ExitOutputs, costs: ExitCosts) -> PolicyMetrics:
    """Evaluate a policy on the outputs of all exits.

    Args:
        policy: Policy with E exits.
        outputs: Outputs of all exits for n images, with their groups if the policy needs them.
        costs: Costs of the network.
    """
    scores = outputs.to_scores(policy.score, policy.gamma)
    groups = None if policy.grouping is None else policy.grouping.index(outputs)
    exits = policy.assign(scores.scores, groups)
    correct = scores.correct[np.arange(len(outputs)), exits]
    masks = [exits == exit_ for exit_ in range(policy.num_exits)]
    return PolicyMetrics(
        Point(_mean_cost(policy, exits, groups, costs), float(correct.mean())),
        tuple(float(mask.mean()) for mask in masks),
        tuple(float((~correct[mask]).mean()) if mask.any() else math.nan for mask in masks),
        outputs.accuracies[-1],
    )


def _mean_cost(
    policy: ExitPolicy, exits: npt.NDArray[np.int64], groups: npt.NDArray[np.int64] | None, costs: ExitCosts
) -> float:
    """Return the mean cost of samples; evaluated heads may depend on the group."""
    numbers = np.full(len(exits), -1) if groups is None or not policy.needs_group else groups[:, 0]
    result = np.empty(len(exits))
    for number in np.unique(numbers):
        part = policy if number < 0 else policy.for_group(policy.groups[number].name)
        mask = numbers == number
        result[mask] = np.asarray(costs.shares(part.evaluated, policy.uses_proxy))[exits[mask]]
    return float(result.mean())
