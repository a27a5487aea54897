r"""Fixed-sequence testing of whole threshold vectors.

Guarantee: as in `ltt` (population, target, confidence and assumptions). One test covers all exits: the p-value of "the
error rate of some exit exceeds $\alpha$" is the largest p-value of the exits (intersection-union test), so $\delta$ is
not divided between exits, and a sequence of vectors costs $\delta$ once, up to the first that fails. All vectors that
passed hold at once with probability $1 - \delta$; the cheapest of them is selected.

References: Angelopoulos et al., arXiv 2110.01052 (fixed-sequence testing); Berger, Technometrics 24 (1982)
(intersection-union test).
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from fedekd.early_exit.calibration.exit_scores import ExitScores
from fedekd.early_exit.calibration.risk_curve import RiskCurve, expected_p_value, required_samples, risk_curve
from fedekd.early_exit.calibration.types import CalibrationTarget, SelectedThresholds
from fedekd.early_exit.inference import exit_index
from fedekd.functional.binomial import error_p_value

#: Maximum number of vectors, from cautious to bold.
VECTORS = 40
#: Range of the error rate aimed at on the tuning samples, as multiples of the target risk.
_FROM, _TO = 0.05, 1.0

Thresholds = tuple[float, ...]


def ltt_joint(calibration: ExitScores, tuning: ExitScores, target: CalibrationTarget) -> SelectedThresholds:
    """Rule `ltt_joint`: fixed-sequence tests of whole threshold vectors.

    Guarantees P(all R_e <= target_risk) >= confidence for independent, identically distributed samples.

    Args:
        calibration: Samples on which the vectors are tested.
        tuning: Independent samples on which the sequence of vectors is fixed.
        target: Target risk, failure probability and cost of each exit.

    Returns:
        Thresholds and sample-size estimates; search bounds equal the thresholds.
    """
    ratio = len(calibration) / len(tuning)
    vectors, estimates = candidate_vectors(tuning, ratio, target)
    passed = []
    for vector in vectors[_start(tuning, vectors, ratio, target) :]:
        if _p_value(calibration, vector, 1.0, target.target_risk) > target.failure_probability:
            break
        passed.append(vector)
    closed = (math.inf,) * (calibration.num_exits - 1)
    best = min(passed, key=lambda vector: float(target.cost[_exits(calibration, vector)].mean()), default=closed)
    is_open = [threshold < math.inf for threshold in best]
    return SelectedThresholds(best, best, tuple(None if o else n for o, n in zip(is_open, estimates, strict=True)))


def candidate_vectors(
    tuning: ExitScores, ratio: float, target: CalibrationTarget
) -> tuple[list[Thresholds], tuple[int | None, ...]]:
    """Generate at most `VECTORS` vectors, each bolder than the previous one.

    Exit by exit, a vector takes the lowest threshold whose error rate on the tuning samples is at most a multiple of
    the target risk; an exit that is not expected to pass its test with that threshold is closed.

    Args:
        tuning: Tuning samples.
        ratio: Number of calibration samples per tuning sample.
        target: Target risk and failure probability.

    Returns:
        The vectors, and per exit the estimated number of calibration samples that opens it.
    """
    early_exits = tuning.num_exits - 1
    vectors: list[Thresholds] = []
    first_curves: dict[int, RiskCurve] = {}
    for share in np.linspace(_FROM, _TO, VECTORS):
        thresholds: list[float] = []
        alive = np.ones(len(tuning), dtype=bool)
        for exit_ in range(early_exits):
            threshold = math.inf
            if alive.any():
                curve = risk_curve(tuning.scores[alive, exit_], tuning.correct[alive, exit_])
                first_curves.setdefault(exit_, curve)
                fits = np.flatnonzero(curve.risk <= share * target.target_risk)
                # One threshold only: the p-values of the whole curve are not needed.
                lowest = curve.take(fits[-1:])
                if len(fits) and expected_p_value(lowest, target.target_risk, ratio) <= target.failure_probability:
                    threshold = float(lowest.thresholds[0])
            thresholds.append(threshold)
            alive &= tuning.scores[:, exit_] < threshold
        if tuple(thresholds) not in vectors and min(thresholds, default=math.inf) < math.inf:
            vectors.append(tuple(thresholds))
    estimates = tuple(
        required_samples(first_curves[exit_], target.target_risk, target.failure_probability, len(tuning))
        if exit_ in first_curves
        else None
        for exit_ in range(early_exits)
    )
    return vectors, estimates


def _start(tuning: ExitScores, vectors: list[Thresholds], ratio: float, target: CalibrationTarget) -> int:
    """Index of the vector with the lowest expected p-value, the boldest of ties."""
    p = [_p_value(tuning, vector, ratio, target.target_risk) for vector in vectors]
    return max((index for index in range(len(p)) if p[index] == min(p)), default=0)


def _p_value(samples: ExitScores, vector: Thresholds, ratio: float, target_risk: float) -> float:
    """P-value of "the error rate of some open exit exceeds the target risk"."""
    exits = _exits(samples, vector)
    largest = 0.0
    for exit_, threshold in enumerate(vector):
        if threshold < math.inf:
            exits_here = exits == exit_
            errors = (exits_here & ~samples.correct[:, exit_]).sum()
            largest = max(largest, float(error_p_value(errors * ratio, exits_here.sum() * ratio, target_risk)))
    return largest


def _exits(samples: ExitScores, vector: Thresholds) -> npt.NDArray[np.int64]:
    thresholds = (*vector, -math.inf)
    return exit_index(samples.scores, thresholds, thresholds)
