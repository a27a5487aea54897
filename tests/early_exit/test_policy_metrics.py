"""Accuracy against cost, against plain loops over samples."""

from __future__ import annotations

import math

import pytest
import torch

from fedekd.early_exit import ExitPolicy, Point, exit_points
from fedekd.early_exit.cost_curves import accuracy_cost_curve, area
from fedekd.early_exit.policy_metrics import evaluate_policy
from fedekd.early_exit.scoring import ExitOutputs
from fedekd.models import ExitCosts

COSTS = ExitCosts(stages=(10, 40, 48), heads=(1, 2, 2))


@pytest.fixture
def outputs() -> ExitOutputs:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(4, (200,), generator=generator)
    logits = torch.randn(200, 3, 4, generator=generator)
    # Deeper exits are more accurate.
    logits.scatter_add_(
        2, labels[:, None, None].expand(-1, 3, 1), torch.tensor([0.5, 1.5, 3.0])[None, :, None].expand(200, -1, -1)
    )
    return ExitOutputs(logits, labels)


def test_exit_points_cost_stages_and_one_head(outputs: ExitOutputs) -> None:
    points = exit_points(outputs.accuracies, COSTS)
    assert [point.cost for point in points] == [11 / 100, 52 / 100, 1.0]
    for exit_, point in enumerate(points):
        right = [outputs.logits[i, exit_].argmax() == outputs.labels[i] for i in range(200)]
        assert point.accuracy == sum(map(int, right)) / 200


@pytest.mark.parametrize("thresholds", [(0.5, 0.7), (0.5, math.inf), (math.inf, 0.6), (math.inf, math.inf), (0.0, 0.0)])
def test_evaluate_policy_equals_loop_over_images(outputs: ExitOutputs, thresholds: tuple[float, float]) -> None:
    vector = (*thresholds, -math.inf)
    policy = ExitPolicy(vector, vector, (True, True, False), 0.1, 0.9, "ltt")
    metrics = evaluate_policy(policy, outputs, COSTS)
    leaving = COSTS.flops_at_exits([threshold < math.inf for threshold in vector])
    cost, right, wrong = 0.0, 0, {0: [0, 0], 1: [0, 0], 2: [0, 0]}
    for logits, label in zip(outputs.logits, outputs.labels, strict=True):
        exit_ = next(e for e in range(3) if float(logits[e].softmax(0).max()) >= vector[e])
        is_right = bool(logits[exit_].argmax() == label)
        cost, right = cost + leaving[exit_] / COSTS.full, right + is_right
        wrong[exit_][0] += not is_right
        wrong[exit_][1] += 1
    assert metrics.point.cost == pytest.approx(cost / 200, abs=1e-12)
    assert metrics.point.accuracy == pytest.approx(right / 200, abs=1e-12)
    for exit_, (errors, samples) in wrong.items():
        assert metrics.exit_shares[exit_] == samples / 200
        assert metrics.risks[exit_] == pytest.approx(errors / samples if samples else math.nan, nan_ok=True)
    early = [errors / samples for errors, samples in (wrong[0], wrong[1]) if samples]
    assert metrics.worst_risk == pytest.approx(max(early) if early else math.nan, nan_ok=True)


def test_accuracy_cost_curve_spans_first_to_last_exit(outputs: ExitOutputs) -> None:
    curve = accuracy_cost_curve(outputs, COSTS)
    leaving = COSTS.flops_at_exits([True, True, True])
    assert curve == sorted(curve)
    assert curve[0] == pytest.approx((leaving[0] / 100, outputs.accuracies[0]))
    assert curve[-1] == pytest.approx((leaving[-1] / 100, outputs.accuracies[-1]))


def test_area_is_mean_accuracy_over_budgets() -> None:
    assert area([Point(0.1, 0.6), Point(1.0, 0.6)]) == pytest.approx(0.6)
    # A point that is dominated by a cheaper one does not lower the area.
    assert area([Point(0.0, 0.8), Point(0.5, 0.4), Point(1.0, 0.8)]) == pytest.approx(0.8)
    assert area([Point(0.5, 0.7)]) == 0.7
    assert area([Point(0.0, 0.0), Point(1.0, 1.0)]) == pytest.approx(0.5)
