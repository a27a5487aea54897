"""What a client's network with exits is worth after the last round, at each exit and within budgets of FLOPs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import torch

from fedekd.early_exit.cost_curves import BUDGETS, Point, budget_points, exit_points
from fedekd.functional import CONFIDENCES
from fedekd.methods import Client
from fedekd.models import MultiExitNetwork, exit_costs
from fedekd.modules import ModelOutput

#: Which confidence lets an image leave.
SCORE = "max_softmax"


@dataclass(frozen=True)
class ExitTradeoff:
    """Accuracy against cost on a client's own test split; costs are shares of the plain network's FLOPs.

    Attributes:
        exits: Cost and accuracy of each exit, if all images leave there.
        budgets: Budget, cost and accuracy where images leave early; thresholds are chosen on the validation split.
    """

    exits: list[Sequence[float]] = field(default_factory=list)
    budgets: list[Sequence[float]] = field(default_factory=list)


def exit_tradeoff(client: Client) -> ExitTradeoff | None:
    """Measure a client's private model; None if it has no exits, or there are no classes. NaN where it has diverged.

    A client that holds the first stages alone pays for no more of the network than they cost: of them costs are shares,
    too, of the whole network.
    """
    network, spec = client.networks["private"], client.spec
    if not isinstance(network, MultiExitNetwork) or spec.task == "regression":
        return None
    judged = client.predict("private", "test")
    shape = spec.in_channels, *spec.image_size
    costs = exit_costs(network, shape)
    held = 1.0
    if spec.depth(client.number) is not None:
        whole = spec.build_model("private", "server")
        assert isinstance(whole, MultiExitNetwork)
        held = costs.full / exit_costs(whole, shape).full
    targets = client.images.targets[client.splits.test.to(client.images.targets.device)]
    correct = torch.stack([logits.argmax(dim=1) == targets for logits in judged.exits], dim=1).cpu().numpy()
    tuning, scores = _scores(client.predict("private", "validation")), _scores(judged)
    points = budget_points(tuning, scores, correct, costs, [budget / held for budget in BUDGETS])
    # The first class is not meant where nothing is finite.
    sound = 1.0 if all(bool(logits.isfinite().all()) for logits in judged.exits) else math.nan
    accuracies = correct.mean(axis=0).tolist() if len(correct) else [math.nan] * network.num_exits
    return ExitTradeoff(
        [[held * point.cost, sound * point.accuracy] for point in exit_points(accuracies, costs)],
        [
            [budget, held * points[budget / held].cost, sound * points[budget / held].accuracy]
            for budget in BUDGETS
            if budget / held in points
        ],
    )


def _scores(prediction: ModelOutput) -> Any:
    return torch.stack([CONFIDENCES[SCORE](logits).double() for logits in prediction.exits], dim=1).cpu().numpy()


def mean_tradeoff(clients: Sequence[ExitTradeoff]) -> dict[str, list[dict[str, float]]]:
    """The mean over clients, as `summary.json` holds it: of an exit or a budget over those clients that have it."""
    by_exit: dict[int, list[Point]] = {}
    by_budget: dict[float, list[Point]] = {}
    for client in clients:
        for number, point in enumerate(client.exits, start=1):
            by_exit.setdefault(number, []).append(Point(*point))
        for budget, *point in client.budgets:
            by_budget.setdefault(budget, []).append(Point(*point))
    return {
        "exits": [{"exit": number, **_mean(points)} for number, points in sorted(by_exit.items())],
        "budgets": [{"budget": budget, **_mean(points)} for budget, points in sorted(by_budget.items())],
    }


def _mean(points: Sequence[Point]) -> dict[str, float]:
    return {
        "cost": fmean(point.cost for point in points),
        "accuracy": fmean(point.accuracy for point in points),
    }
