"""Does a promise hold? Calibrate again and again on fresh draws, and look at the true error rates."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedekd.early_exit.calibration.calibrator import SelectiveRiskCalibrator
from fedekd.early_exit.calibration.exit_scores import ExitScores
from fedekd.early_exit.policy import ExitPolicy
from fedekd.errors import UserError
from fedekd.functional.binomial import clopper_pearson


@dataclass(frozen=True, eq=False)
class Validity:
    """What many calibrations with one rule came to.

    Attributes:
        alpha: The error rate asked for.
        delta: The share of draws that may break it.
        mode: The rule.
        risks: True error rate of each exit before the last, in each draw, (draws, E - 1); NaN where nobody leaves.
        costs: Mean cost of a sample, in each draw, (draws,).
    """

    alpha: float
    delta: float
    mode: str
    risks: npt.NDArray[np.float64]
    costs: npt.NDArray[np.float64]

    @property
    def draws(self) -> int:
        """How many calibrations."""
        return len(self.risks)

    @property
    def violations(self) -> int:
        """Draws in which some exit's true error rate exceeds alpha."""
        return int((self.risks > self.alpha).any(axis=1).sum())

    @property
    def share(self) -> float:
        """Violations over draws."""
        return self.violations / self.draws

    @property
    def interval(self) -> tuple[float, float]:
        """Of 95% (Clopper and Pearson) for the probability of a violation."""
        return clopper_pearson(self.violations, self.draws)

    @property
    def agrees(self) -> bool:
        """Whether the draws agree with a probability of at most delta: the interval begins at or below it."""
        return self.interval[0] <= self.delta


def true_risks(pool: ExitScores, policy: ExitPolicy) -> npt.NDArray[np.float64]:
    """The error rate at each exit before the last if a pool is all there is, (E - 1,); NaN where nobody leaves."""
    exits = policy.assign(pool.scores)
    risks = np.full(policy.num_exits - 1, math.nan)
    for exit_ in range(policy.num_exits - 1):
        leaves = exits == exit_
        if leaves.any():
            risks[exit_] = (~pool.correct[leaves, exit_]).mean()  # not 1 - mean: 1 - 0.95 is above 0.05
    return risks


def check_validity(
    pool: ExitScores,
    calibrator: SelectiveRiskCalibrator,
    samples: int,
    tuning_samples: int,
    draws: int = 500,
    seed: int = 0,
    cost: Callable[[Sequence[bool]], Sequence[float]] | None = None,
) -> Validity:
    """Calibrate on `draws` fresh draws from a pool that stands for the population, so that the true risk is exact.

    Tuning and calibration samples are drawn from the pool WITH replacement: they are then independent draws from
    exactly the law on which the risk is taken. (Splitting the pool, and judging on the rest, ties the two: what the one
    has too much of, the other lacks, and a valid rule seems to fail.)

    Args:
        pool: The population.
        calibrator: The rule.
        samples: Calibration samples of a draw.
        tuning_samples: Tuning samples of a draw.
        draws: How many.
        seed: Each draw has a generator of its own, made from it and the draw's number.
        cost: From which exits' heads are evaluated, (E,), to what leaving at each exit costs, (E,), such as
            `ExitCosts.leaving`; by default 1..E over E.

    Raises:
        UserError: If a number is below 1.
    """
    for name, value in (("samples", samples), ("tuning_samples", tuning_samples), ("draws", draws)):
        if value < 1:
            raise UserError(f"{name} is {value}, and must be at least 1")
    exits = pool.num_exits
    even = tuple((exit_ + 1) / exits for exit_ in range(exits))
    risks, mean_costs = np.empty((draws, exits - 1)), np.empty(draws)
    for draw in range(draws):
        rng = np.random.default_rng((seed, draw))
        calibration, tuning = (pool.take(rng.integers(len(pool), size=n)) for n in (samples, tuning_samples))
        policy = calibrator.fit_scored(calibration, tuning, even if cost is None else cost([True] * exits))
        risks[draw] = true_risks(pool, policy)
        costs = np.asarray(even if cost is None else cost(policy.evaluated))
        mean_costs[draw] = costs[policy.assign(pool.scores)].mean()
    return Validity(calibrator.alpha, calibrator.delta, calibrator.mode, risks, mean_costs)
