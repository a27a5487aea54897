"""Computation of an early-exit report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from fedekd.early_exit.calibration.calibrator import MODES, SelectiveRiskCalibrator
from fedekd.early_exit.calibration.validity import Validity, check_validity
from fedekd.early_exit.client_calibration import (
    exit_network,
    fit_policy,
    image_costs,
    independent_indices,
    require_unused_validation,
    split_outputs,
)
from fedekd.early_exit.cost_curves import Point, accuracy_cost_curve, area, exit_points
from fedekd.early_exit.latency import BATCH_SIZES, Latency, measure_latency
from fedekd.early_exit.policy import ExitPolicy
from fedekd.early_exit.policy_metrics import PolicyMetrics, evaluate_policy
from fedekd.early_exit.reliability import ExitReliability, exit_reliabilities
from fedekd.early_exit.robustness import CorruptionResult, LabelledImages, evaluate_corruptions
from fedekd.early_exit.scoring import HELD_OUT, ExitOutputs, network_input
from fedekd.errors import UserError
from fedekd.methods import Client
from fedekd.models import ExitCosts, MultiExitNetwork


@dataclass(frozen=True)
class ReportOptions:
    """Extent of a report.

    Args:
        target_risks: Target risks to calibrate for, in (0, 1).
        target_risk: Target risk of the reliability and corruption sections, in (0, 1).
        confidence: Confidence of the guarantees, in (0, 1).
        draws: Resampled calibration sets per rule and target risk, at least 1.
        corrupted: Maximum number of images per corrupted set; 0, or a table, omits the corruption section.
        batches: Batches per batch size for latency; 0 omits latency.
    """

    target_risks: tuple[float, ...] = (0.01, 0.02, 0.05, 0.1)
    target_risk: float = 0.05
    confidence: float = 0.9
    draws: int = 200
    corrupted: int = 2000
    batches: int = 20

    def __post_init__(self) -> None:
        if self.draws < 1:
            raise UserError(f"--draws: expected at least 1, got {self.draws}")


@dataclass(frozen=True, eq=False)
class EvaluatedNetwork:
    """A trained network and its outputs on the held-out images of its client.

    Attributes:
        name: Display name, such as the method of the run.
        network: Network with E exits.
        costs: Costs per image.
        splits: Outputs by split, for all splits that training does not use.
        curve: Accuracy against cost with one threshold for all exits.
        independent: As `splits`, with one sample of each group such as a patient; None if samples have no groups.
    """

    name: str
    network: MultiExitNetwork
    costs: ExitCosts
    splits: Mapping[str, ExitOutputs]
    curve: Sequence[Point]
    independent: Mapping[str, ExitOutputs] | None = None

    @classmethod
    def from_client(cls, client: Client, name: str) -> EvaluatedNetwork:
        """Evaluate a client's network on all splits that training does not use.

        Raises:
            UserError: The network has fewer than 2 exits.
        """
        network = exit_network(client)
        if network.num_exits == 1:
            raise UserError(f"{client.splits.label}: expected a network with at least 2 exits, got one with 1 exit")
        splits = {split: split_outputs(client, split) for split in HELD_OUT}
        costs = image_costs(network, client.samples)
        independent = None
        if client.samples.group is not None:
            independent = {split: split_outputs(client, split, independent=True) for split in HELD_OUT}
        return cls(name, network, costs, splits, accuracy_cost_curve(splits["test"], costs), independent)

    @property
    def units(self) -> Mapping[str, ExitOutputs]:
        """Outputs by split for independent samples."""
        return self.splits if self.independent is None else self.independent

    @property
    def test(self) -> ExitOutputs:
        """Outputs for the test split."""
        return self.splits["test"]

    @property
    def held_out(self) -> ExitOutputs:
        """Outputs for all independent images that training does not use."""
        return ExitOutputs.concatenate(list(self.units.values()))

    @property
    def points(self) -> list[Point]:
        """Cost and accuracy of each exit if all test images take it."""
        return exit_points(self.test.accuracies, self.costs)

    @property
    def area(self) -> float:
        """Area under accuracy against cost, divided by the range of costs."""
        return area(self.curve)

    def calibrate(self, target_risk: float, confidence: float) -> ExitPolicy:
        """Calibrate with the rule `ltt`, as the command `calibrate` does."""
        calibrator = SelectiveRiskCalibrator(target_risk, confidence)
        policy = fit_policy(calibrator, self.network, self.costs, self.splits["tuning"], self.units["calibration"])
        return policy if self.independent is None else replace(policy, unit="group")


@dataclass(frozen=True, eq=False)
class PolicyResult:
    """One policy on the test split.

    Attributes:
        policy: The policy.
        metrics: Its cost, accuracy and error rates.
        latency: Measured latency; empty if it was not measured.
    """

    policy: ExitPolicy
    metrics: PolicyMetrics
    latency: Sequence[Latency]


@dataclass(frozen=True, eq=False)
class ExitReport:
    """Contents of an early-exit report.

    Attributes:
        dataset: Name of the data set.
        client: Client in words, such as `client 0` or `site 'cleveland'`.
        networks: The network of the report first, then the networks it is compared with.
        policies: Calibrated policies of the first network.
        validity: Results of repeated calibrations, by target risk and rule.
        reliabilities: Reliability of each exit under the policy for `options.target_risk`.
        corruptions: Results under image corruptions.
        options: Extent of the report.
        provenance: Origin of the report, by name.
    """

    dataset: str
    client: str
    networks: Sequence[EvaluatedNetwork]
    policies: Sequence[PolicyResult]
    validity: Sequence[Validity]
    reliabilities: Sequence[ExitReliability]
    corruptions: Sequence[CorruptionResult]
    options: ReportOptions
    provenance: Mapping[str, Any] = field(default_factory=dict)


def make_exit_report(
    clients: Mapping[str, Client],
    options: ReportOptions | None = None,
    provenance: Mapping[str, Any] | None = None,
    on_step: Callable[[str], None] = lambda step: None,
) -> ExitReport:
    """Compute a report.

    Args:
        clients: Clients with equal images by display name; the report is about the first, the others are compared.
        options: Extent of the report.
        provenance: Origin of the report, as values for the page.
        on_step: Called with a description before each step.

    Raises:
        UserError: A network has fewer than 2 exits, a client has other images, or the method of the first client trains
            on validation samples.
    """
    options = options or ReportOptions()
    client = next(iter(clients.values()))
    digest = client.splits.digest(client.samples)
    if not all(other.splits.digest(other.samples) == digest for other in clients.values()):
        raise UserError(f"report: expected runs whose {client.splits.label} has the same images, got different images")
    require_unused_validation(client)
    on_step("outputs of all exits")
    networks = [EvaluatedNetwork.from_client(each, name) for name, each in clients.items()]
    network = networks[0]
    policies = []
    for target_risk in options.target_risks:
        on_step(f"policy for target risk {target_risk:g}")
        policies.append(_policy_result(client, network, target_risk, options))
    on_step("reliability")
    has_corruptions = options.corrupted and client.samples.inputs.ndim == 4  # of images
    return ExitReport(
        dataset=client.samples.name,
        client=client.splits.label,
        networks=networks,
        policies=policies,
        reliabilities=_reliabilities(network, options),
        validity=_validity(network, options, on_step),
        corruptions=corruption_results(client, network, options, on_step) if has_corruptions else [],
        options=options,
        provenance=dict(provenance or {}),
    )


def _policy_result(
    client: Client, network: EvaluatedNetwork, target_risk: float, options: ReportOptions
) -> PolicyResult:
    policy = network.calibrate(target_risk, options.confidence)
    latency = policy_latency(client, network, policy, options.batches) if options.batches else []
    return PolicyResult(policy, evaluate_policy(policy, network.test, network.costs), latency)


def policy_latency(client: Client, network: EvaluatedNetwork, policy: ExitPolicy, batches: int) -> list[Latency]:
    """Measure the latency of a policy on test images of a client.

    Args:
        client: Client whose images are used.
        network: The calibrated network.
        policy: Its policy.
        batches: Batches per batch size, at least 2.
    """
    # Shuffled, because splits are sorted by index in the data set and hence possibly by class.
    test = client.splits.test
    order = torch.randperm(len(test), generator=torch.Generator().manual_seed(client.spec.seed))
    indices = test[order[: batches * max(BATCH_SIZES)]].to(client.samples.inputs.device)
    images = network_input(network.network, client.samples.inputs[indices])
    return measure_latency(network.network, policy, images, batches=batches)


def _validity(network: EvaluatedNetwork, options: ReportOptions, on_step: Callable[[str], None]) -> list[Validity]:
    population = network.held_out.to_scores()
    samples, tuning = len(network.units["calibration"]), len(network.units["tuning"])
    results = []
    for target_risk in options.target_risks:
        for mode in MODES:
            on_step(f"{options.draws} draws of {mode} at target risk {target_risk:g}")
            calibrator = SelectiveRiskCalibrator(target_risk, options.confidence, mode)
            cost = network.costs.shares
            results.append(check_validity(population, calibrator, samples, tuning, options.draws, cost=cost))
    return results


def _reliabilities(network: EvaluatedNetwork, options: ReportOptions) -> list[ExitReliability]:
    policy = network.calibrate(options.target_risk, options.confidence)
    return exit_reliabilities(policy, network.splits["tuning"], network.test)


def corruption_results(
    client: Client, network: EvaluatedNetwork, options: ReportOptions, on_step: Callable[[str], None]
) -> list[CorruptionResult]:
    """Evaluate the policy for `options.target_risk` under image corruptions.

    Args:
        client: Client whose images are corrupted.
        network: The network to calibrate.
        options: Extent of the report.
        on_step: Called with a description after each corruption and severity.
    """

    def spread(indices: torch.Tensor) -> LabelledImages:
        # Evenly spaced over the split, which is sorted by index in the data set and hence possibly by class.
        count = min(len(indices), options.corrupted)
        chosen = indices[torch.linspace(0, len(indices) - 1, count, dtype=torch.float64).round().long()]
        return LabelledImages(client.samples.inputs[chosen], client.samples.labels[chosen])

    policy = network.calibrate(options.target_risk, options.confidence)
    splits = client.splits
    parts = map(spread, (splits.tuning, independent_indices(client, "calibration"), splits.test))
    results = []
    for result in evaluate_corruptions(network.network, policy, network.costs, *parts):
        results.append(result)
        on_step(f"{result.corruption}, severity {result.severity}")
    return results
