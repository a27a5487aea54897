"""What calibrated exits come to in a whole federation: client by client, and over many draws of calibration sets."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any

from fedekd.early_exit.calibration.calibrator import SelectiveRiskCalibrator
from fedekd.early_exit.calibration.federated_validity import check_federated_validity
from fedekd.early_exit.client_calibration import calibrate_client, costs_of, exits_of, split_outputs
from fedekd.early_exit.client_report import ClientExitReport, client_exit_report
from fedekd.early_exit.scoring import HELD_OUT, ExitOutputs
from fedekd.errors import UserError
from fedekd.methods import Client


@dataclass(frozen=True)
class CoverageOptions:
    """Which rules are tried on the exits of a finished federation.

    Args:
        alphas: Error rates among those who leave, in (0, 1).
        delta: Probability that a promise fails, in (0, 1).
        modes: Rules: ltt, path, crc, released or empirical.
        draws: Calibrations of each rule at each error rate, at least 1.
    """

    alphas: list[float] = field(default_factory=lambda: [0.05])
    delta: float = 0.1
    modes: list[str] = field(default_factory=lambda: ["ltt", "empirical"])
    draws: int = 200

    def __post_init__(self) -> None:
        for name in ("alphas", "modes"):
            if not getattr(self, name):
                raise UserError(f"promises.{name} is empty; at least one is needed")
        try:
            self.calibrators()
        except UserError as error:
            told = re.sub("^(alpha|mode) is", r"\1s holds", str(error))
            raise UserError(f"promises.{told}") from error
        if self.draws < 1:
            raise UserError(f"promises.draws is {self.draws}, and must be at least 1")

    def calibrators(self) -> list[SelectiveRiskCalibrator]:
        """Every rule at every error rate."""
        return [SelectiveRiskCalibrator(alpha, self.delta, mode) for alpha in self.alphas for mode in self.modes]


@dataclass(frozen=True)
class ClientCoverage:
    """One client under one rule.

    Attributes:
        line: Its own policy, from its own calibration split, on its test split.
        own: Draws in which its own policy breaks the promise on its whole pool.
        pooled: Draws in which a policy calibrated on all clients' samples breaks it there.
    """

    line: ClientExitReport
    own: int
    pooled: int


@dataclass(frozen=True)
class CoverageResult:
    """One rule at one error rate, in a federation.

    Attributes:
        alpha: The error rate asked for.
        delta: Probability that a promise may fail.
        mode: The rule.
        draws: How many were made.
        together: Draws in which the pooled policy breaks its promise on the samples of all clients together.
        clients: By number.
    """

    alpha: float
    delta: float
    mode: str
    draws: int
    together: int
    clients: tuple[ClientCoverage, ...]

    @property
    def own_share(self) -> float:
        """Of all clients and draws, those in which a client's own policy breaks its promise."""
        return fmean(client.own for client in self.clients) / self.draws

    @property
    def pooled_share(self) -> float:
        """Of all clients and draws, those in which the pooled policy does on a client's pool."""
        return fmean(client.pooled for client in self.clients) / self.draws

    def as_values(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return asdict(self)

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> CoverageResult:
        """What `as_values` gave."""
        clients = tuple(ClientCoverage(ClientExitReport(**c["line"]), c["own"], c["pooled"]) for c in values["clients"])
        return cls(**{**values, "clients": clients})


def federation_promises(clients: Sequence[Client], options: CoverageOptions, seed: int = 0) -> list[CoverageResult]:
    """Calibrate all clients of a finished federation by every rule at every error rate.

    A client's pool is all that training has not touched, its test split included.

    Args:
        clients: With exits, as many each.
        options: Rules, error rates and draws.
        seed: Of the draws.

    Returns:
        By error rate and rule; nothing if a client's network has diverged, and there is nothing to be calibrated.

    Raises:
        UserError: If there is no client, one has no exits or another number of them, or lacks samples.
    """
    if not clients:
        raise UserError("there are no clients; at least 1 is needed")
    outputs = [{split: split_outputs(client, split) for split in HELD_OUT} for client in clients]
    joined = [ExitOutputs.joined(list(of_client.values())) for of_client in outputs]
    if not all(bool(each.logits.isfinite().all()) for each in joined):
        return []
    pools = [each.scored() for each in joined]
    costs = costs_of(exits_of(clients[0]), clients[0].images)

    found = []
    for calibrator in options.calibrators():
        lines = [client_exit_report(client, calibrate_client(client, calibrator)) for client in clients]
        validity = check_federated_validity(
            pools,
            calibrator,
            [len(of_client["calibration"]) for of_client in outputs],
            [len(of_client["tuning"]) for of_client in outputs],
            options.draws,
            seed,
            costs.shares,
        )
        counts = zip(lines, validity.own_violations, validity.pooled_violations, strict=True)
        found.append(
            CoverageResult(
                calibrator.alpha,
                calibrator.delta,
                calibrator.mode,
                validity.draws,
                validity.together_violations,
                tuple(ClientCoverage(*each) for each in counts),
            )
        )
    return found
