"""Inputs and outputs of calibration rules; `calibrator.MODES` lists the rules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedekd.early_exit.calibration.exit_scores import ExitScores


@dataclass(frozen=True)
class SelectedThresholds:
    """Thresholds of the E - 1 exits before the last.

    With one search per group there is one entry per exit and group, in the order of exits and within an exit of groups.

    Attributes:
        thresholds: Lowest score at which a sample exits; inf closes the exit.
        search_bounds: Lowest threshold that was tested, at most the threshold; equal to it for a rule without tests.
        required_samples: For a closed exit the estimated least number of calibration samples; None if the exit
            is open or the number cannot be estimated.
    """

    thresholds: tuple[float, ...]
    search_bounds: tuple[float, ...]
    required_samples: tuple[int | None, ...]

    @classmethod
    def without_tests(cls, thresholds: list[float]) -> SelectedThresholds:
        """Thresholds of a rule that neither tests nor estimates a sample size."""
        return cls(tuple(thresholds), tuple(thresholds), (None,) * len(thresholds))


@dataclass(frozen=True)
class CalibrationTarget:
    """The guarantee that a rule aims at.

    Attributes:
        target_risk: Maximum error rate among the samples that take an exit, in (0, 1).
        failure_probability: Probability, in (0, 1), that the error rate of some exit exceeds the target.
        cost: Cost of a sample at each exit, shape (E,), in any unit.
        groups: Number of groups whose error rates are bounded, at least 1.
        shared: True for one threshold per exit, at which the error rate of each group is bounded; False for one
            threshold per exit and group.
    """

    target_risk: float
    failure_probability: float
    cost: npt.NDArray[np.float64]
    groups: int = 1
    shared: bool = False

    @property
    def searches(self) -> list[list[int]]:
        """Groups whose error rates are tested together, per search for a threshold."""
        numbers = list(range(self.groups))
        return [numbers] if self.shared else [[number] for number in numbers]


#: (calibration samples, tuning samples, target) -> thresholds.
CalibrationRule = Callable[[ExitScores, ExitScores, CalibrationTarget], SelectedThresholds]
