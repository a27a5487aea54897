"""Whose promise is it? A policy of each client's own beside one that is calibrated on everybody's samples together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedekd.early_exit.calibration.calibrator import SelectiveRiskCalibrator
from fedekd.early_exit.calibration.exit_scores import ExitScores
from fedekd.early_exit.calibration.validity import true_risks
from fedekd.errors import UserError

Risks = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class FederatedValidity:
    """What many calibrations of a federation came to; error rates are true ones, NaN where nobody leaves.

    Attributes:
        alpha: The error rate asked for.
        delta: The share of draws that may break it.
        mode: The rule.
        own: Of each client's own policy on its own pool, (draws, K, E - 1).
        pooled: Of the policy that all clients share, on each client's pool, (draws, K, E - 1).
        together: Of the shared policy on all pools together, which is what it promises something of, (draws, E - 1).
    """

    alpha: float
    delta: float
    mode: str
    own: Risks
    pooled: Risks
    together: Risks

    @property
    def draws(self) -> int:
        """How many calibrations."""
        return len(self.own)

    @property
    def own_violations(self) -> list[int]:
        """Of each client, draws in which some exit's error rate is above alpha under its own policy."""
        return [int(count) for count in self._violations(self.own).sum(axis=0)]

    @property
    def pooled_violations(self) -> list[int]:
        """The same under the shared policy."""
        return [int(count) for count in self._violations(self.pooled).sum(axis=0)]

    @property
    def together_violations(self) -> int:
        """Draws in which the shared policy breaks its promise on all pools together."""
        return int(self._violations(self.together).sum())

    def _violations(self, risks: Risks) -> npt.NDArray[np.bool_]:
        broken: npt.NDArray[np.bool_] = np.any(risks > self.alpha, axis=-1)
        return broken


def check_federated_validity(
    pools: Sequence[ExitScores],
    calibrator: SelectiveRiskCalibrator,
    samples: Sequence[int],
    tuning_samples: Sequence[int],
    draws: int = 200,
    seed: int = 0,
    cost: Callable[[Sequence[bool]], Sequence[float]] | None = None,
) -> FederatedValidity:
    """Calibrate each client, and all of them together, on the same fresh draws from the clients' pools.

    As in `check_validity`, samples are drawn with replacement and a pool is its client's whole population. The shared
    policy is calibrated on the clients' draws put together, each client's by its number of samples; pools that are of
    sizes in the same proportions are then the population it promises something of.

    Args:
        pools: Of K clients, with E exits each.
        calibrator: The rule.
        samples: Calibration samples of a draw, of each client.
        tuning_samples: Tuning samples of a draw, of each client.
        draws: How many.
        seed: Each draw has a generator of its own, made from it and the draw's number; clients take turns.
        cost: As `check_validity` has it; of all clients alike.

    Raises:
        UserError: If there is no client, their exits differ in number, or a number is below 1.
    """
    if not pools:
        raise UserError("there are no clients; at least 1 is needed")
    if not len(pools) == len(samples) == len(tuning_samples):
        raise UserError(
            f"{len(pools)} clients have {len(samples)} numbers of samples and {len(tuning_samples)} of tuning samples;"
            " each client needs one of both"
        )
    exits = {pool.num_exits for pool in pools}
    if len(exits) > 1:
        told = " or ".join(map(str, sorted(exits)))
        raise UserError(f"the clients have {told} exits; a shared policy needs as many of each")
    for name, values in (("samples", samples), ("tuning_samples", tuning_samples), ("draws", [draws])):
        if min(values) < 1:
            raise UserError(f"{name} is {min(values)}, and must be at least 1")
    [num_exits] = exits
    shape = draws, len(pools), num_exits - 1
    own, pooled, together = np.empty(shape), np.empty(shape), np.empty((draws, num_exits - 1))
    everybody = _concatenated(pools)
    evenly = tuple((exit_ + 1) / num_exits for exit_ in range(num_exits))
    costs = evenly if cost is None else cost([True] * num_exits)
    for draw in range(draws):
        rng = np.random.default_rng((seed, draw))
        drawn = [
            (pool.take(rng.integers(len(pool), size=n)), pool.take(rng.integers(len(pool), size=t)))
            for pool, n, t in zip(pools, samples, tuning_samples, strict=True)
        ]
        calibration, tuning = map(_concatenated, zip(*drawn, strict=True))
        shared = calibrator.fit_scored(calibration, tuning, costs)
        together[draw] = true_risks(everybody, shared)
        for client, (pool, parts) in enumerate(zip(pools, drawn, strict=True)):
            own[draw, client] = true_risks(pool, calibrator.fit_scored(*parts, costs))
            pooled[draw, client] = true_risks(pool, shared)
    return FederatedValidity(calibrator.alpha, calibrator.delta, calibrator.mode, own, pooled, together)


def _concatenated(parts: Sequence[ExitScores]) -> ExitScores:
    probabilities = [part.true_class_probability for part in parts if part.true_class_probability is not None]
    return ExitScores(
        np.concatenate([part.scores for part in parts]),
        np.concatenate([part.correct for part in parts]),
        np.concatenate(probabilities) if len(probabilities) == len(parts) else None,
    )
