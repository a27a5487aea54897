"""Empirical check of a guarantee by repeated calibration on resampled sets."""

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

#: (which exits' heads are evaluated, (E,)) -> cost of a sample at each exit, (E,); such as `ExitCosts.shares`.
Cost = Callable[[Sequence[bool]], Sequence[float]]


@dataclass(frozen=True, eq=False)
class Validity:
    """Results of repeated calibrations with one rule.

    Attributes:
        calibrator: The rule, with its target risk and confidence.
        risks: True error rate of each exit before the last in each draw, shape (draws, E - 1); NaN if no sample of the
            population takes the exit.
        costs: Mean cost per sample in each draw, shape (draws,).
    """

    calibrator: SelectiveRiskCalibrator
    risks: npt.NDArray[np.float64]
    costs: npt.NDArray[np.float64]

    @property
    def draws(self) -> int:
        """Number of calibrations."""
        return len(self.risks)

    @property
    def violations(self) -> int:
        """Draws in which the true error rate of some exit exceeds the target risk."""
        return int(is_violated(self.risks, self.calibrator.target_risk).sum())

    @property
    def violation_rate(self) -> float:
        """Violations divided by draws."""
        return self.violations / self.draws

    @property
    def interval(self) -> tuple[float, float]:
        """95% Clopper-Pearson interval of the probability of a violation."""
        return clopper_pearson(self.violations, self.draws)

    @property
    def is_consistent(self) -> bool:
        """True if the interval contains or lies below the allowed failure probability."""
        return self.interval[0] <= self.calibrator.failure_probability


def is_violated(risks: npt.NDArray[np.float64], target_risk: float) -> npt.NDArray[np.bool_]:
    """Test along the last axis whether some error rate exceeds the target."""
    violated: npt.NDArray[np.bool_] = np.any(risks > target_risk, axis=-1)
    return violated


def true_risks(population: ExitScores, policy: ExitPolicy) -> npt.NDArray[np.float64]:
    """Compute the error rate of each exit before the last on a whole population.

    Args:
        population: All samples of the population.
        policy: Policy with as many exits.

    Returns:
        Error rates, shape (E - 1,); NaN for an exit that no sample takes.
    """
    exits = policy.assign(population.scores)
    risks = np.full(policy.num_exits - 1, math.nan)
    for exit_ in range(policy.num_exits - 1):
        mask = exits == exit_
        if mask.any():
            risks[exit_] = (~population.correct[mask, exit_]).mean()  # not 1 - mean: 1 - 0.95 > 0.05
    return risks


def check_validity(
    population: ExitScores,
    calibrator: SelectiveRiskCalibrator,
    samples: int,
    tuning_samples: int,
    draws: int = 500,
    seed: int = 0,
    cost: Cost | None = None,
) -> Validity:
    """Calibrate on resampled sets of a finite population.

    The true error rates of a finite population are exact. Tuning and calibration samples are drawn WITH replacement:
    they are independent draws of exactly the distribution on which the risk is computed. Splitting the population and
    evaluating on the remainder would correlate both parts negatively, and a valid rule would appear to fail.

    Args:
        population: All samples of the population.
        calibrator: The rule.
        samples: Calibration samples per draw, at least 1.
        tuning_samples: Tuning samples per draw, at least 1.
        draws: Number of calibrations, at least 1.
        seed: Draw i uses the generator seeded with (seed, i).
        cost: Cost of a sample at each exit (default: (e + 1) / E at exit e).

    Raises:
        UserError: A number is below 1.
    """
    require_counts(samples=[samples], tuning_samples=[tuning_samples], draws=[draws])
    cost = cost or default_cost
    fit_cost = cost([True] * population.num_exits)
    risks, mean_costs = np.empty((draws, population.num_exits - 1)), np.empty(draws)
    for draw in range(draws):
        policy = calibrator.fit_scores(*resample(population, samples, tuning_samples, rng=(seed, draw)), fit_cost)
        risks[draw] = true_risks(population, policy)
        mean_costs[draw] = np.asarray(cost(policy.evaluated))[policy.assign(population.scores)].mean()
    return Validity(calibrator, risks, mean_costs)


def require_counts(**counts: Sequence[int]) -> None:
    """Validate that all numbers are at least 1.

    Raises:
        UserError: A number is below 1.
    """
    for name, values in counts.items():
        if min(values) < 1:
            raise UserError(f"{name}: expected at least 1, got {min(values)}")


def default_cost(evaluated: Sequence[bool]) -> tuple[float, ...]:
    """Cost (e + 1) / E at exit e."""
    return tuple((exit_ + 1) / len(evaluated) for exit_ in range(len(evaluated)))


def resample(
    population: ExitScores, samples: int, tuning_samples: int, rng: np.random.Generator | tuple[int, int]
) -> tuple[ExitScores, ExitScores]:
    """Draw calibration and tuning samples with replacement.

    Args:
        population: Samples to draw from.
        samples: Number of calibration samples.
        tuning_samples: Number of tuning samples.
        rng: A generator or its seed.
    """
    rng = np.random.default_rng(rng)
    calibration, tuning = (population.take(rng.integers(len(population), size=n)) for n in (samples, tuning_samples))
    return calibration, tuning
