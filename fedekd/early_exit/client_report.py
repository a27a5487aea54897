"""Statistics of a calibrated client on calibration and test samples."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fedekd.early_exit.calibration.calibrator import MODES
from fedekd.early_exit.client_calibration import exit_network, image_costs, split_outputs
from fedekd.early_exit.policy import ExitPolicy
from fedekd.early_exit.policy_metrics import evaluate_policy
from fedekd.methods import Client
from fedekd.models import ExitCosts


@dataclass(frozen=True)
class ExitStatistics:
    """One exit on the calibration samples.

    Attributes:
        exit: Number of the exit, from 1.
        threshold: Lowest score at which samples exit; None for a closed exit and for the last.
        samples: Calibration samples that exit here.
        errors: Errors among them.
        certified_risk: Guaranteed maximum error rate; None without a guarantee.
        share: Fraction of all calibration samples that exit here.
        saved: Fraction of the plain network's FLOPs that a sample saves by exiting here.
        note: Why the exit is closed; empty for an open exit.
    """

    exit: int
    threshold: float | None
    samples: int
    errors: int
    certified_risk: float | None
    share: float
    saved: float
    note: str


@dataclass(frozen=True)
class ClientExitReport:
    """One client's policy on its test split.

    Attributes:
        client: Client index.
        model: Deployed model: `private` (federated) or `local`.
        exits: Number of exits, the last included.
        open_exits: Number of open exits before the last.
        early_share: Fraction of test images that exit before the last exit.
        saved: Fraction of the plain network's FLOPs saved, over all test images.
        certified_risk: Guaranteed maximum error rate at each open exit; None without a guarantee.
        test_risk: Largest error rate of an open exit on test images; None if no image exits early.
        accuracy: Test accuracy with early exits.
        full_accuracy: Test accuracy of the last exit.
    """

    client: int
    model: str
    exits: int
    open_exits: int
    early_share: float
    saved: float
    certified_risk: float | None
    test_risk: float | None
    accuracy: float
    full_accuracy: float


def client_exit_report(client: Client, policy: ExitPolicy) -> ClientExitReport:
    """Evaluate a client's policy on its test split."""
    costs = image_costs(exit_network(client), client.samples, client.networks.get("proxy"))
    metrics = evaluate_policy(policy, split_outputs(client, "test"), costs)
    return ClientExitReport(
        client=client.number,
        model=client.deployed_role,
        exits=policy.num_exits,
        open_exits=sum(threshold < math.inf for threshold in policy.thresholds[:-1]),
        early_share=sum(metrics.exit_shares[:-1]),
        saved=1.0 - metrics.point.cost,
        certified_risk=policy.target_risk if any(policy.certified) else None,
        test_risk=None if math.isnan(metrics.worst_risk) else metrics.worst_risk,
        accuracy=metrics.point.accuracy,
        full_accuracy=metrics.full_accuracy,
    )


def exit_statistics(policy: ExitPolicy, costs: ExitCosts) -> list[ExitStatistics]:
    """Summarise a policy exit by exit, the last included."""
    shares = costs.shares(policy.evaluated, policy.uses_proxy)
    rows = []
    for index, threshold in enumerate(policy.thresholds):
        is_last, is_open = index == policy.num_exits - 1, threshold < math.inf
        rows.append(
            ExitStatistics(
                exit=index + 1,
                threshold=threshold if is_open and not is_last else None,
                samples=policy.exit_counts[index],
                errors=policy.error_counts[index],
                certified_risk=policy.target_risk if policy.certified[index] else None,
                share=policy.exit_counts[index] / policy.samples,
                saved=1.0 - shares[index],
                note="" if is_open else _why_closed(policy, index),
            )
        )
    return rows


def mean_saved(policy: ExitPolicy, costs: ExitCosts) -> float:
    """Mean fraction of the plain network's FLOPs that a calibration sample saves."""
    shares = costs.shares(policy.evaluated, policy.uses_proxy)
    return 1.0 - sum(n * share for n, share in zip(policy.exit_counts, shares, strict=True)) / policy.samples


def _why_closed(policy: ExitPolicy, index: int) -> str:
    estimate = policy.required_samples[index]
    if estimate is not None and estimate > policy.samples:
        return f"closed: about {estimate} calibration samples would open it, there are {policy.samples}"
    if policy.mode == "ltt_joint" and any(policy.certified):
        return "closed: closed in the cheapest certified threshold vector"
    if policy.search_bounds[index] < math.inf or estimate is not None:
        return "closed: the first test failed on the calibration samples"
    if MODES[policy.mode].has_guarantee:
        return (
            f"closed: no threshold reaches error rate {policy.target_risk:g} on the tuning samples, or no sample"
            " reaches this exit"
        )
    return "closed: no threshold fulfils the rule"
