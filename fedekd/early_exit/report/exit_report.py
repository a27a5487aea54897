"""All that can be told of a finished run whose network has exits."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fedekd.early_exit.calibration.calibrator import MODES, SelectiveRiskCalibrator
from fedekd.early_exit.calibration.exit_scores import ExitScores
from fedekd.early_exit.calibration.validity import Validity, check_validity
from fedekd.early_exit.client_calibration import costs_of, exits_of, fit_policy, require_untouched, split_outputs
from fedekd.early_exit.cost_curves import Point, exit_points
from fedekd.early_exit.latency import BATCH_SIZES, Latency, measure_latency
from fedekd.early_exit.policy import ExitPolicy
from fedekd.early_exit.policy_metrics import PolicyMetrics, accuracy_cost_curve, area, evaluate_policy
from fedekd.early_exit.robustness import Corrupted, Labelled, under_corruption
from fedekd.early_exit.scoring import HELD_OUT, ExitOutputs, prepared
from fedekd.errors import UserError
from fedekd.methods import Client
from fedekd.metrics import ReliabilityBin, expected_calibration_error, reliability
from fedekd.models import ExitCosts, MultiExitNetwork

#: Error rates that are calibrated for.
ALPHAS = (0.01, 0.02, 0.05, 0.1)


@dataclass(frozen=True)
class ReportOptions:
    """What a report takes time for.

    Attributes:
        alphas: Error rates that are calibrated for.
        alpha: The one of them under corruption.
        delta: Probability that a promise fails.
        draws: Of calibration sets, for each rule and error rate.
        corrupted: Images of each kind that are corrupted; 0 leaves corruptions out.
        batches: Batches of each size whose time is taken; 0 leaves latency out.
    """

    alphas: tuple[float, ...] = ALPHAS
    alpha: float = 0.05
    delta: float = 0.1
    draws: int = 200
    corrupted: int = 2000
    batches: int = 20


@dataclass(frozen=True, eq=False)
class Trained:
    """A finished run's network, and what it says of its client's images.

    Attributes:
        name: What to call it: the run's method.
        network: E exits.
        costs: Of one image.
        splits: By split, the outputs for images that training has not touched.
    """

    name: str
    network: MultiExitNetwork
    costs: ExitCosts
    splits: Mapping[str, ExitOutputs]

    @property
    def test(self) -> ExitOutputs:
        """The outputs for the test split."""
        return self.splits["test"]

    def calibrated(self, alpha: float, delta: float) -> ExitPolicy:
        """Its policy by `ltt`, as `calibrate` makes it."""
        tuning, calibration = self.splits["tuning"], self.splits["calibration"]
        return fit_policy(SelectiveRiskCalibrator(alpha, delta), self.network, self.costs, tuning, calibration)

    @property
    def held_out(self) -> ExitOutputs:
        """For all images that training has not touched."""
        return ExitOutputs.joined(list(self.splits.values()))


@dataclass(frozen=True, eq=False)
class PolicyLine:
    """One policy, on the test split.

    Attributes:
        policy: The policy.
        outcome: What it comes to.
        latency: Measured, if it was.
    """

    policy: ExitPolicy
    evaluate_policy: PolicyMetrics
    latency: Sequence[Latency]


@dataclass(frozen=True, eq=False)
class ExitReliability:
    """How far an exit is as sure as it is right, on the test split.

    Attributes:
        exit: Its number, from 1.
        error: Expected calibration error over all images.
        leaving_error: And over those who leave there; NaN if nobody does.
        bins: Over all images.
    """

    exit: int
    error: float
    leaving_error: float
    bins: Sequence[ReliabilityBin]


@dataclass(frozen=True, eq=False)
class ExitReport:
    """What is told of a run, beside others.

    Attributes:
        dataset: The data set.
        client: Whose network.
        runs: The run itself first, then those it is compared with.
        points: By run: one point an exit.
        curves: By run: accuracy against cost.
        areas: By run: the area under it.
        policies: Of the run itself.
        validity: Of each rule at each error rate.
        reliabilities: Of each exit, with those who leave under the policy for `options.alpha`.
        corrupted: Under corruption.
        options: What was asked for.
        provenance: Where it comes from.
    """

    dataset: str
    client: int
    runs: Sequence[Trained]
    points: Sequence[Sequence[Point]]
    curves: Sequence[Sequence[Point]]
    areas: Sequence[float]
    policies: Sequence[PolicyLine]
    validity: Sequence[Validity]
    reliabilities: Sequence[ExitReliability]
    corrupted: Sequence[Corrupted]
    options: ReportOptions
    provenance: Mapping[str, Any] = field(default_factory=dict)


def load_trained(client: Client, name: str) -> Trained:
    """A client's network, and its outputs for every split that training has not touched."""
    network = exits_of(client)
    if network.num_exits == 1:
        raise UserError(f"the network of client {client.number} has one exit alone, and nobody can leave it early")
    splits = {split: split_outputs(client, split) for split in HELD_OUT}
    return Trained(name, network, costs_of(network, client.images), splits)


def make_exit_report(
    clients: Mapping[str, Client],
    options: ReportOptions | None = None,
    provenance: Mapping[str, Any] | None = None,
    advance: Callable[[str], None] = lambda step: None,
) -> ExitReport:
    """Work everything out.

    Args:
        clients: By name; the first is what the report is about, the others are compared with it.
        options: What to take time for.
        provenance: Where it comes from, as values for the page.
        advance: Called before each step with what comes next.

    Raises:
        UserError: If a network has not two exits, or the first one's method has learned from validation samples.
    """
    options = options or ReportOptions()
    names = list(clients)
    client = clients[names[0]]
    require_untouched(client)
    advance("outputs of all exits")
    runs = [load_trained(each, name) for name, each in clients.items()]
    own = runs[0]
    curves = [accuracy_cost_curve(run.test, run.costs) for run in runs]
    policies = []
    for alpha in options.alphas:
        advance(f"policy for alpha {alpha:g}")
        policies.append(_policy_line(client, own, alpha, options))
    advance("reliability")
    reliabilities = _reliabilities(own, options)
    return ExitReport(
        dataset=client.images.name,
        client=client.number,
        runs=runs,
        points=[exit_points(run.test.accuracies, run.costs) for run in runs],
        curves=curves,
        areas=[area(curve) for curve in curves],
        policies=policies,
        validity=_validity(own, options, advance),
        reliabilities=reliabilities,
        corrupted=_corrupted(client, own, options, advance) if options.corrupted else [],
        options=options,
        provenance=dict(provenance or {}),
    )


def _policy_line(client: Client, run: Trained, alpha: float, options: ReportOptions) -> PolicyLine:
    policy = run.calibrated(alpha, options.delta)
    latency: Sequence[Latency] = []
    if options.batches:
        # In a random order: splits are sorted by place in the data set, and so perhaps by class.
        test = client.splits.test
        order = torch.randperm(len(test), generator=torch.Generator().manual_seed(client.spec.seed))
        chosen = test[order[: options.batches * max(BATCH_SIZES)]].to(client.images.pixels.device)
        images = prepared(run.network, client.images.pixels[chosen])
        latency = measure_latency(run.network, policy, images, batches=options.batches)
    return PolicyLine(policy, evaluate_policy(policy, run.test, run.costs), latency)


def _validity(run: Trained, options: ReportOptions, advance: Callable[[str], None]) -> list[Validity]:
    pool: ExitScores = run.held_out.scored()
    samples, tuning = len(run.splits["calibration"]), len(run.splits["tuning"])

    found = []
    for alpha in options.alphas:
        for mode in MODES:
            advance(f"{options.draws} draws of {mode} at alpha {alpha:g}")
            calibrator = SelectiveRiskCalibrator(alpha, options.delta, mode)
            found.append(check_validity(pool, calibrator, samples, tuning, options.draws, cost=run.costs.shares))
    return found


def _reliabilities(run: Trained, options: ReportOptions) -> list[ExitReliability]:
    policy = run.calibrated(options.alpha, options.delta)
    scored = run.test.scored()
    exits = policy.assign(scored.scores)
    found = []
    for place in range(policy.num_exits):
        # Softmax probabilities may exceed 1 by round-off.
        confidence = torch.from_numpy(scored.scores[:, place]).clamp(0.0, 1.0)
        correct, leaves = torch.from_numpy(scored.correct[:, place]), torch.from_numpy(exits == place)
        found.append(
            ExitReliability(
                place + 1,
                expected_calibration_error(confidence, correct),
                expected_calibration_error(confidence[leaves], correct[leaves]) if leaves.any() else math.nan,
                reliability(confidence, correct),
            )
        )
    return found


def _corrupted(client: Client, run: Trained, options: ReportOptions, advance: Callable[[str], None]) -> list[Corrupted]:
    policy = run.calibrated(options.alpha, options.delta)
    splits = client.splits

    def labelled(indices: torch.Tensor) -> Labelled:
        # Spread over the split, which is sorted by place in the data set, and so perhaps by class.
        wanted = min(len(indices), options.corrupted)
        chosen = indices[torch.linspace(0, len(indices) - 1, wanted, dtype=torch.float64).round().long()]
        return Labelled(client.images.pixels[chosen], client.images.labels[chosen])

    found = []
    for line in under_corruption(
        run.network,
        policy,
        run.costs,
        labelled(splits.tuning),
        labelled(splits.calibration),
        labelled(splits.test),
    ):
        found.append(line)
        advance(f"{line.corruption}, level {line.level}")
    return found
