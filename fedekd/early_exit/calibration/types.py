"""What every rule of calibration gives; `calibrator.MODES` is the table of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedekd.early_exit.calibration.exit_scores import ExitScores


@dataclass(frozen=True)
class SelectedThresholds:
    """The thresholds of the E - 1 exits before the last.

    Attributes:
        thresholds: inf closes an exit.
        bands: At most the thresholds; the thresholds themselves where a rule has no bands.
        needed: For a closed exit about how many calibration samples would open it, if that can be told.
    """

    thresholds: tuple[float, ...]
    search_bounds: tuple[float, ...]
    needed: tuple[int | None, ...]

    @classmethod
    def plain(cls, thresholds: list[float]) -> SelectedThresholds:
        """Without bands, and without a forecast."""
        return cls(tuple(thresholds), tuple(thresholds), (None,) * len(thresholds))


@dataclass(frozen=True)
class CalibrationTarget:
    """What a rule is asked for.

    Attributes:
        alpha: The error rate to hold at each exit.
        delta: With probability 1 - delta.
        cost: What leaving at each of the E exits costs, in any unit.
    """

    alpha: float
    delta: float
    cost: npt.NDArray[np.float64]


#: (calibration samples, tuning samples, setting) -> thresholds.
CalibrationRule = Callable[[ExitScores, ExitScores, CalibrationTarget], SelectedThresholds]
