"""Validity of per-client and pooled calibration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedekd.early_exit.calibration.calibrator import SelectiveRiskCalibrator
from fedekd.early_exit.calibration.exit_scores import ExitScores
from fedekd.early_exit.calibration.validity import (
    Cost,
    default_cost,
    is_violated,
    require_counts,
    resample,
    true_risks,
)
from fedekd.errors import UserError

Risks = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class FederatedValidity:
    """Results of repeated calibrations of a federation.

    Error rates are NaN where no sample takes an exit.

    Attributes:
        calibrator: The rule, with its target risk and confidence.
        client_risks: Error rates of each client's own policy on its population, shape (draws, K, E - 1).
        pooled_risks: Error rates of the pooled policy on each client's population, shape (draws, K, E - 1).
        union_risks: Error rates of the pooled policy on the union of all populations, shape (draws, E - 1). The
            guarantee of the pooled policy is about this union only.
    """

    calibrator: SelectiveRiskCalibrator
    client_risks: Risks
    pooled_risks: Risks
    union_risks: Risks

    @property
    def draws(self) -> int:
        """Number of calibrations."""
        return len(self.client_risks)

    @property
    def client_violations(self) -> list[int]:
        """Draws per client in which its own policy violates the guarantee."""
        return self._counts(self.client_risks)

    @property
    def pooled_violations(self) -> list[int]:
        """Draws per client in which the pooled policy exceeds the target risk."""
        return self._counts(self.pooled_risks)

    @property
    def union_violations(self) -> int:
        """Draws in which the pooled policy violates its guarantee on the union."""
        [count] = self._counts(self.union_risks[:, None])
        return count

    def _counts(self, risks: Risks) -> list[int]:
        return [int(count) for count in is_violated(risks, self.calibrator.target_risk).sum(axis=0)]


def check_federated_validity(
    populations: Sequence[ExitScores],
    calibrator: SelectiveRiskCalibrator,
    samples: Sequence[int],
    tuning_samples: Sequence[int],
    draws: int = 200,
    seed: int = 0,
    cost: Cost | None = None,
) -> FederatedValidity:
    """Calibrate each client, and all clients pooled, on the same resampled sets.

    As in `check_validity`, samples are drawn with replacement from each client's finite population. The pooled policy
    is calibrated on the concatenated draws of all clients, weighted by their number of samples; its guarantee is about
    the union of the populations if their sizes have the same proportions.

    Args:
        populations: Per client (K of them) all samples of its population, with E exits each.
        calibrator: The rule.
        samples: Per client, calibration samples per draw, at least 1.
        tuning_samples: Per client, tuning samples per draw, at least 1.
        draws: Number of calibrations, at least 1.
        seed: Draw i uses one generator for all clients in order, seeded with (seed, i).
        cost: Cost of a sample at each exit, as in `check_validity`; the same for all clients.

    Raises:
        UserError: There are no clients, their numbers of exits differ, or a number is below 1.
    """
    if not populations:
        raise UserError("clients: expected at least 1, got 0")
    if not len(populations) == len(samples) == len(tuning_samples):
        raise UserError(
            f"samples and tuning_samples: expected {len(populations)} numbers, one per client, got {len(samples)} and"
            f" {len(tuning_samples)}"
        )
    exit_numbers = sorted({population.num_exits for population in populations})
    if len(exit_numbers) > 1:
        numbers = " and ".join(map(str, exit_numbers))
        raise UserError(f"clients: expected the same number of exits for a pooled policy, got {numbers}")
    require_counts(samples=samples, tuning_samples=tuning_samples, draws=[draws])
    [num_exits] = exit_numbers
    costs = (cost or default_cost)([True] * num_exits)
    shape = draws, len(populations), num_exits - 1
    client_risks, pooled_risks, union_risks = np.empty(shape), np.empty(shape), np.empty((draws, num_exits - 1))
    union = ExitScores.concatenate(populations)
    for draw in range(draws):
        rng = np.random.default_rng((seed, draw))
        drawn = [
            resample(population, n, t, rng)
            for population, n, t in zip(populations, samples, tuning_samples, strict=True)
        ]
        calibration, tuning = map(ExitScores.concatenate, zip(*drawn, strict=True))
        pooled_policy = calibrator.fit_scores(calibration, tuning, costs)
        union_risks[draw] = true_risks(union, pooled_policy)
        for client, (population, parts) in enumerate(zip(populations, drawn, strict=True)):
            client_risks[draw, client] = true_risks(population, calibrator.fit_scores(*parts, costs))
            pooled_risks[draw, client] = true_risks(population, pooled_policy)
    return FederatedValidity(calibrator, client_risks, pooled_risks, union_risks)
