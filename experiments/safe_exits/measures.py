"""Measures of a network with exits: rows of the result files."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from experiments.hospital_runs import Row
from fedekd.early_exit import ExitPolicy
from fedekd.early_exit.policy_metrics import PolicyMetrics, evaluate_policy
from fedekd.early_exit.reliability import exit_reliabilities
from fedekd.early_exit.report.exit_report import EvaluatedNetwork, ReportOptions, corruption_results, policy_latency
from fedekd.early_exit.scoring import ExitOutputs
from fedekd.methods import Client
from fedekd.models import ExitCosts

#: Target risks of the calibrated policies, among which the largest saving is selected.
TARGET_RISKS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3)

#: Largest losses of accuracy for the saving, and their names in the columns.
LOSSES = {"0.0": 0.0, "0.5": 0.005}

#: Files of the results. The rows of `networks` are stored last, and mark a network as measured.
FILES = ("exits", "policies", "corruptions", "networks")

#: Tolerance for a loss of accuracy that equals the limit up to round-off.
_ROUNDING = 1e-12


@dataclass(frozen=True)
class Extent:
    """Extent of the measurement.

    Attributes:
        confidence: Confidence of the guarantees.
        target_risk: Target risk of the policy for exiting images and corruptions.
        corrupted: Largest number of images per corrupted set; 0 leaves corruptions out.
        batches: Batches per batch size for latency; 0 leaves latency out.
    """

    confidence: float = 0.9
    target_risk: float = 0.05
    corrupted: int = 1000
    batches: int = 20


def largest_saving(
    policies: Sequence[ExitPolicy], held_out: ExitOutputs, costs: ExitCosts, loss: float
) -> ExitPolicy | None:
    """Return the policy with the lowest cost within a loss of accuracy.

    Args:
        policies: Calibrated policies.
        held_out: Outputs on which accuracy and cost are compared; not those of the test split.
        costs: Costs of the network.
        loss: Largest accuracy of the last exit minus accuracy of the policy.

    Returns:
        The policy; None if all images take the last exit, or no policy has a lower cost than the plain network.
    """
    results = [(evaluate_policy(policy, held_out, costs), policy) for policy in policies]
    allowed = [(m.point.cost, policy) for m, policy in results if _loss(m) <= loss + _ROUNDING and m.point.cost < 1.0]
    return min(allowed, key=lambda pair: pair[0], default=(1.0, None))[1]


def rows_of(
    client: Client, name: str, extent: Extent, on_step: Callable[[str], None] = lambda step: None
) -> dict[str, list[Row]]:
    """Return the rows of a client's network by file.

    The columns that name the run are not part of them.

    Args:
        client: Trained client whose private model has exits.
        name: Name of the network in messages.
        extent: Extent of the measurement.
        on_step: Called with a description after each corruption and severity.
    """
    network = EvaluatedNetwork.from_client(client, name)
    policies = [network.calibrate(risk, extent.confidence) for risk in TARGET_RISKS]
    options = ReportOptions(target_risk=extent.target_risk, confidence=extent.confidence, corrupted=extent.corrupted)
    corruptions = corruption_results(client, network, options, on_step) if extent.corrupted else []
    return {
        "exits": _exits(network, extent),
        "policies": [
            {"target_risk": policy.target_risk, **_outcome(evaluate_policy(policy, network.test, network.costs))}
            for policy in policies
        ],
        "corruptions": [
            {
                "corruption": result.corruption,
                "severity": result.severity,
                **_outcome(result.original),
                "excess_risk": result.original.worst_risk - extent.target_risk,
                **{f"recalibrated_{key}": value for key, value in _outcome(result.recalibrated).items()},
            }
            for result in corruptions
        ],
        "networks": [_network(client, network, policies, extent)],
    }


def _exits(network: EvaluatedNetwork, extent: Extent) -> list[Row]:
    policy = network.calibrate(extent.target_risk, extent.confidence)
    shares = evaluate_policy(policy, network.test, network.costs).exit_shares
    lines = exit_reliabilities(policy, network.splits["tuning"], network.test)
    return [
        {
            "exit": line.exit,
            "cost": point.cost,
            "accuracy": point.accuracy,
            "temperature": line.temperature,
            "ece": line.error,
            "scaled_ece": line.scaled_error,
            "share": share,
            "exiting_ece": line.exiting_error,
            "scaled_exiting_ece": line.scaled_exiting_error,
        }
        for point, line, share in zip(network.points, lines, shares, strict=True)
    ]


def _network(client: Client, network: EvaluatedNetwork, policies: Sequence[ExitPolicy], extent: Extent) -> Row:
    held_out = ExitOutputs.concatenate([network.splits["tuning"], network.splits["calibration"]])
    row: Row = {
        "train_samples": len(client.splits.train),
        "calibration_samples": len(network.splits["calibration"]),
        "test_samples": len(network.test),
        "flops": network.costs.full,
        "area": network.area,
    }
    policy: ExitPolicy | None = None
    for name, loss in LOSSES.items():
        policy = largest_saving(policies, held_out, network.costs, loss)
        metrics = None if policy is None else evaluate_policy(policy, network.test, network.costs)
        row |= {
            f"target_risk_{name}": math.nan if policy is None else policy.target_risk,
            f"saved_{name}": 0.0 if metrics is None else 1.0 - metrics.point.cost,
            f"change_{name}": 0.0 if metrics is None else -_loss(metrics),
        }
    if policy is not None and extent.batches:  # that of the largest loss
        for latency in policy_latency(client, network, policy, extent.batches):
            row |= {f"time_{latency.batch_size}": latency.ratio, f"time_error_{latency.batch_size}": latency.error}
    return row


def _loss(metrics: PolicyMetrics) -> float:
    """Return the accuracy of the last exit minus that of the policy."""
    return metrics.full_accuracy - metrics.point.accuracy


def _outcome(metrics: PolicyMetrics) -> Row:
    return {
        "accuracy": metrics.point.accuracy,
        "full_accuracy": metrics.full_accuracy,
        "saved": 1.0 - metrics.point.cost,
        "worst_risk": metrics.worst_risk,
    }
