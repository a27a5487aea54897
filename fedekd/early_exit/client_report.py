"""Statistics of a calibrated client on calibration and test samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from fedekd.early_exit.client_calibration import exit_network, image_costs, split_outputs
from fedekd.early_exit.grouping import Names
from fedekd.early_exit.policy import ExitPolicy, GroupExits
from fedekd.early_exit.policy_metrics import evaluate_policy
from fedekd.early_exit.statement import why_closed
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
        test_risk: Largest error rate of an open exit on all test images, also several of a patient; None if no image
            exits early.
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


def client_exit_report(client: Client, policy: ExitPolicy, groups: Names | None = None) -> ClientExitReport:
    """Evaluate a client's policy on its test split.

    Args:
        client: The client.
        policy: Its policy.
        groups: Value of each of the client's samples in the column of the policy, if its thresholds depend on it.
    """
    costs = image_costs(exit_network(client), client.samples, client.networks.get("proxy"))
    outputs = split_outputs(client, "test")
    if groups is not None:
        outputs = replace(outputs, groups=groups[client.splits.test.cpu().numpy()])
    metrics = evaluate_policy(policy, outputs, costs)
    return ClientExitReport(
        client=client.number,
        model=client.deployed_name,
        exits=policy.num_exits,
        open_exits=sum(policy.open_exits),
        early_share=sum(metrics.exit_shares[:-1]),
        saved=1.0 - metrics.point.cost,
        certified_risk=policy.target_risk if policy.is_certified else None,
        test_risk=None if math.isnan(metrics.worst_risk) else metrics.worst_risk,
        accuracy=metrics.point.accuracy,
        full_accuracy=metrics.full_accuracy,
    )


def group_policies(policy: ExitPolicy) -> dict[str, ExitPolicy]:
    """Return a policy with the counts of each group, for statistics; by name."""
    names = [entry.name for entry in fields(GroupExits) if entry.name != "name"]
    return {
        group.name: replace(
            policy, **{name: getattr(group, name) for name in names}, group_by="", groups=(), shared_thresholds=False
        )
        for group in policy.groups
    }


def exit_statistics(
    policy: ExitPolicy, costs: ExitCosts, group: str = "", evaluated: Sequence[bool] | None = None
) -> list[ExitStatistics]:
    """Summarise a policy exit by exit, the last included.

    Args:
        policy: A policy without groups, or one of `group_policies`.
        costs: Costs of the network.
        group: Name of the group, for the notes. Default: none.
        evaluated: Whether the head of each exit is evaluated, shape (E,). Default: as for this policy.
    """
    shares = costs.shares(policy.evaluated if evaluated is None else evaluated, policy.uses_proxy)
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
                share=policy.exit_counts[index] / max(policy.samples, 1),
                saved=1.0 - shares[index],
                note="" if is_open else why_closed(policy, index, group),
            )
        )
    return rows


def mean_saved(policy: ExitPolicy, costs: ExitCosts) -> float:
    """Mean fraction of the plain network's FLOPs that a calibration sample saves."""
    if policy.needs_group:
        parts = group_policies(policy).values()
        return sum(part.samples * mean_saved(part, costs) for part in parts) / policy.samples
    if not policy.samples:
        return 0.0
    shares = costs.shares(policy.evaluated, policy.uses_proxy)
    return 1.0 - sum(n * share for n, share in zip(policy.exit_counts, shares, strict=True)) / policy.samples
