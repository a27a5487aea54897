"""What each client of a federation may rely on: its own policy, on its own test split."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fedekd.early_exit.client_calibration import costs_of, exits_of, split_outputs
from fedekd.early_exit.policy import ExitPolicy
from fedekd.early_exit.policy_metrics import evaluate_policy
from fedekd.methods import Client


@dataclass(frozen=True)
class ClientExitReport:
    """One client and its policy.

    Attributes:
        client: Its number.
        model: Which model it keeps: `private`, the federated one, or `local`.
        exits: Of its network, the last included.
        open: Exits before the last at which images may leave.
        leaving: Share of its test images that leave early.
        saved: Share of the plain network's FLOPs that they save, over all test images.
        certified_risk: What the error rate among those who leave is promised to be at most; None without a promise.
        seen_risk: Error rate of the worst of its open exits on test images; None where nobody leaves early.
        accuracy: On its test split, leaving early.
        full_accuracy: On its test split, at the last exit.
    """

    client: int
    model: str
    exits: int
    open: int
    leaving: float
    saved: float
    certified_risk: float | None
    seen_risk: float | None
    accuracy: float
    full_accuracy: float


def client_exit_report(client: Client, policy: ExitPolicy) -> ClientExitReport:
    """What a client's policy comes to on its test split."""
    network = exits_of(client)
    found = evaluate_policy(
        policy, split_outputs(client, "test"), costs_of(network, client.images, client.networks.get("proxy"))
    )
    return ClientExitReport(
        client=client.number,
        model=client.deployed_role,
        exits=policy.num_exits,
        open=sum(threshold < math.inf for threshold in policy.thresholds[:-1]),
        leaving=sum(found.shares[:-1]),
        saved=1.0 - found.point.cost,
        certified_risk=policy.alpha if any(policy.certified) else None,
        seen_risk=None if math.isnan(found.worst_risk) else found.worst_risk,
        accuracy=found.point.accuracy,
        full_accuracy=found.full_accuracy,
    )
