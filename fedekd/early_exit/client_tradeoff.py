"""Accuracy against cost of a client's network after the last round."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import fmean

import numpy as np
import numpy.typing as npt
import torch

from fedekd.early_exit.cost_curves import BUDGETS, budget_points, exit_points
from fedekd.functional import CONFIDENCES, all_finite
from fedekd.methods import Client
from fedekd.models import MultiExitNetwork, exit_costs
from fedekd.modules import ModelOutput

#: Confidence score that is compared with the thresholds.
SCORE = "max_softmax"


@dataclass(frozen=True)
class ExitTradeoff:
    """Accuracy against cost on one client's test split.

    Costs are fractions of the plain network's FLOPs.

    Attributes:
        exits: Cost and accuracy of each exit if all images take it.
        budgets: Budget, cost and accuracy with early exits; thresholds are selected on the validation split.
    """

    exits: list[Sequence[float]] = field(default_factory=list)
    budgets: list[Sequence[float]] = field(default_factory=list)


def exit_tradeoff(client: Client) -> ExitTradeoff | None:
    """Evaluate the exits of the network that a client serves.

    For a client that holds only the first stages, costs are fractions of the whole network's FLOPs as well.

    Args:
        client: A trained client.

    Returns:
        The tradeoff; None for a network without exits or for regression; NaN accuracies if outputs are not finite.
    """
    role, spec = client.served_role, client.spec
    network = client.network(role)
    if not isinstance(network, MultiExitNetwork) or spec.task == "regression":
        return None
    test_output = client.predict(role, "test")
    shape = spec.input_shape
    costs = exit_costs(network, shape)
    held_share = 1.0
    if spec.depth(client.number) is not None:
        whole = spec.build_model("private", "server")
        assert isinstance(whole, MultiExitNetwork)
        held_share = costs.full / exit_costs(whole, shape).full
    targets = client.samples.targets[client.splits.test.to(client.samples.targets.device)]
    correct = torch.stack([logits.argmax(dim=1) == targets for logits in test_output.exits], dim=1).cpu().numpy()
    tuning_scores, test_scores = _scores(client.predict(role, "validation")), _scores(test_output)
    points = budget_points(tuning_scores, test_scores, correct, costs, [budget / held_share for budget in BUDGETS])
    # argmax of NaN is class 0, which is not a prediction.
    factor = 1.0 if all_finite(test_output.exits) else math.nan
    accuracies = correct.mean(axis=0).tolist() if len(correct) else [math.nan] * network.num_exits
    budgets = ((budget, points[budget / held_share]) for budget in BUDGETS if budget / held_share in points)
    return ExitTradeoff(
        [[held_share * point.cost, factor * point.accuracy] for point in exit_points(accuracies, costs)],
        [[budget, held_share * point.cost, factor * point.accuracy] for budget, point in budgets],
    )


def _scores(output: ModelOutput) -> npt.NDArray[np.float64]:
    scores = torch.stack([CONFIDENCES[SCORE](logits).double() for logits in output.exits], dim=1).cpu().numpy()
    return np.asarray(scores, dtype=np.float64)


def mean_tradeoff(clients: Sequence[ExitTradeoff]) -> dict[str, list[dict[str, float]]]:
    """Average each exit and budget over the clients that have it."""
    exits = ((number, point) for client in clients for number, point in enumerate(client.exits, start=1))
    budgets = ((budget, point) for client in clients for budget, *point in client.budgets)
    return {
        "exits": [{"exit": number, **mean} for number, mean in _means(exits)],
        "budgets": [{"budget": budget, **mean} for budget, mean in _means(budgets)],
    }


def _means(points: Iterable[tuple[float, Sequence[float]]]) -> list[tuple[float, dict[str, float]]]:
    """Mean cost and accuracy by key, in order of the keys."""
    groups: dict[float, list[Sequence[float]]] = {}
    for key, point in points:
        groups.setdefault(key, []).append(point)
    return [
        (key, {"cost": fmean(cost for cost, _ in group), "accuracy": fmean(accuracy for _, accuracy in group)})
        for key, group in sorted(groups.items())
    ]
