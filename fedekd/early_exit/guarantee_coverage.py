"""Empirical coverage of the exit guarantees in a finished federation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from fedekd.early_exit.calibration.calibrator import SelectiveRiskCalibrator
from fedekd.early_exit.calibration.federated_validity import check_federated_validity
from fedekd.early_exit.client_calibration import calibrate_client, exit_network, image_costs, split_outputs
from fedekd.early_exit.client_report import ClientExitReport, client_exit_report
from fedekd.early_exit.scoring import HELD_OUT, ExitOutputs
from fedekd.errors import UserError
from fedekd.functional import all_finite
from fedekd.methods import Client


@dataclass(frozen=True)
class CoverageOptions:
    """Calibration rules to evaluate on the clients of a finished federation.

    Args:
        target_risks: Maximum error rates among the samples that take an exit, in (0, 1).
        confidence: Probability that the guarantee of all exits holds, in (0, 1).
        modes: Rules: ltt, ltt_joint, crc, safekd_code or empirical.
        draws: Calibrations per rule and target risk, at least 1.
    """

    target_risks: list[float] = field(default_factory=lambda: [0.05])
    confidence: float = 0.9
    modes: list[str] = field(default_factory=lambda: ["ltt", "empirical"])
    draws: int = 200

    def __post_init__(self) -> None:
        for name in ("target_risks", "modes"):
            if not getattr(self, name):
                raise UserError(f"coverage.{name}: expected at least 1 entry, got an empty list")
        try:
            self.calibrators()
        except UserError as error:
            name, _, rest = str(error).partition(":")
            plural = name if name == "confidence" else f"{name}s"
            raise UserError(f"coverage.{plural}:{rest}") from error
        if self.draws < 1:
            raise UserError(f"coverage.draws: expected at least 1, got {self.draws}")

    def calibrators(self) -> list[SelectiveRiskCalibrator]:
        """Create the calibrator of each target risk and rule."""
        return [
            SelectiveRiskCalibrator(risk, self.confidence, mode) for risk in self.target_risks for mode in self.modes
        ]


@dataclass(frozen=True)
class ClientCoverage:
    """One client under one rule.

    Attributes:
        report: Results on the client's test split of its own policy, calibrated on its calibration split.
        violations: Draws in which its own policy exceeds the target risk on its population.
        pooled_violations: Draws in which the pooled policy exceeds the target risk on the client's population.
    """

    report: ClientExitReport
    violations: int
    pooled_violations: int


@dataclass(frozen=True)
class CoverageResult:
    """One rule at one target risk in one federation.

    Attributes:
        target_risk: Maximum error rate of each exit.
        confidence: Probability with which the guarantee holds.
        mode: Calibration rule.
        draws: Number of calibrations.
        union_violations: Draws in which the pooled policy exceeds the target risk on the union of all populations.
        clients: Results per client, in order.
    """

    target_risk: float
    confidence: float
    mode: str
    draws: int
    union_violations: int
    clients: tuple[ClientCoverage, ...]

    def as_values(self) -> dict[str, Any]:
        """Convert to values that JSON can represent."""
        return asdict(self)


def federation_coverage(clients: Sequence[Client], options: CoverageOptions, seed: int = 0) -> list[CoverageResult]:
    """Calibrate all clients of a finished federation and count violations.

    The population of a client is all its samples that training does not use, its test split included; with groups such
    as patients, one sample of each group, because samples of a group are not independent.

    Args:
        clients: Clients whose networks have the same number of exits.
        options: Rules, target risks and number of draws.
        seed: Seed of the draws.

    Returns:
        Results by target risk and rule; empty if the outputs of a network are not finite.

    Raises:
        UserError: There are no clients, or a client has no exits, another number of exits, or too few samples.
    """
    if not clients:
        raise UserError("clients: expected at least 1, got 0")
    outputs = [{split: split_outputs(client, split, independent=True) for split in HELD_OUT} for client in clients]
    joined = [ExitOutputs.concatenate(list(splits.values())) for splits in outputs]
    if not all_finite(part.logits for part in joined):
        return []
    populations = [part.to_scores() for part in joined]
    costs = image_costs(exit_network(clients[0]), clients[0].samples)

    results = []
    for calibrator in options.calibrators():
        reports = [client_exit_report(client, calibrate_client(client, calibrator)) for client in clients]
        validity = check_federated_validity(
            populations,
            calibrator,
            [len(splits["calibration"]) for splits in outputs],
            [len(splits["tuning"]) for splits in outputs],
            options.draws,
            seed,
            costs.shares,
        )
        counts = zip(reports, validity.client_violations, validity.pooled_violations, strict=True)
        results.append(
            CoverageResult(
                calibrator.target_risk,
                calibrator.confidence,
                calibrator.mode,
                validity.draws,
                validity.union_violations,
                tuple(ClientCoverage(*values) for values in counts),
            )
        )
    return results
