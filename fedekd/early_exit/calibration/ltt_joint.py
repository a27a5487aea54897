"""Testing whole vectors of thresholds, in an order fixed on tuning samples.

One test for all exits at once: the p-value of "some exit's error rate exceeds alpha" is the largest of the exits'
p-values (intersection-union test), so nothing is split between exits, and a sequence of vectors costs delta once, up to
the first that fails. All vectors passed before hold with probability 1 - delta, and the cheapest of them is taken.
"""

from __future__ import annotations

import math

import numpy as np

from fedekd.early_exit.calibration.exit_scores import ExitScores
from fedekd.early_exit.calibration.risk_curve import RiskCurve, expected_p_value, risk_curve, samples_needed
from fedekd.early_exit.calibration.types import CalibrationTarget, SelectedThresholds
from fedekd.early_exit.policy import exit_index
from fedekd.functional.binomial import error_p_value

#: Vectors tried, from cautious to bold.
VECTORS = 40
#: How bold: the share of errors seen in tuning at each exit, as multiples of alpha.
_FROM, _TO = 0.05, 1.0

Thresholds = tuple[float, ...]


def ltt_joint(calibration: ExitScores, tuning: ExitScores, setting: CalibrationTarget) -> SelectedThresholds:
    """The rule `path`: P(every R_e <= alpha) >= 1 - delta, for independent calibration samples of one law."""
    ratio = len(calibration) / len(tuning)
    vectors, needed = candidates(tuning, ratio, setting)
    passed = []
    for vector in vectors[_most_promising(tuning, vectors, ratio, setting) :]:
        if _p_value(calibration, vector, 1.0, setting.alpha) > setting.delta:
            break
        passed.append(vector)
    closed = (math.inf,) * (calibration.num_exits - 1)
    best = min(passed, key=lambda vector: _mean_cost(calibration, vector, setting), default=closed)
    return SelectedThresholds(best, best, tuple(None if best[e] < math.inf else needed[e] for e in range(len(best))))


def candidates(
    tuning: ExitScores, ratio: float, setting: CalibrationTarget
) -> tuple[list[Thresholds], tuple[int | None, ...]]:
    """At most `VECTORS` vectors, each bolder than the one before, and about how many samples open each exit.

    A vector lets as many leave at each exit, in order, as keep the errors seen there below a multiple of alpha; an exit
    that would then not be expected to pass its test is closed.
    """
    early = tuning.num_exits - 1
    vectors: list[Thresholds] = []
    first_walks: dict[int, RiskCurve] = {}
    for share in np.linspace(_FROM, _TO, VECTORS):
        thresholds: list[float] = []
        alive = np.ones(len(tuning), dtype=bool)
        for exit_ in range(early):
            threshold = math.inf
            if alive.any():
                walk = risk_curve(tuning.scores[alive, exit_], tuning.correct[alive, exit_])
                first_walks.setdefault(exit_, walk)
                fits = np.flatnonzero(walk.risk <= share * setting.alpha)
                if len(fits) and expected_p_value(walk.at(fits[-1]), setting.alpha, ratio) <= setting.delta:
                    threshold = float(walk.thresholds[fits[-1]])
            thresholds.append(threshold)
            alive &= tuning.scores[:, exit_] < threshold
        if tuple(thresholds) not in vectors and min(thresholds, default=math.inf) < math.inf:
            vectors.append(tuple(thresholds))
    needed = tuple(
        samples_needed(first_walks[exit_], setting.alpha, setting.delta, len(tuning)) if exit_ in first_walks else None
        for exit_ in range(early)
    )
    return vectors, needed


def _most_promising(tuning: ExitScores, vectors: list[Thresholds], ratio: float, setting: CalibrationTarget) -> int:
    """Where to begin: the vector that the tuning samples make surest, the boldest of equal ones."""
    p = [_p_value(tuning, vector, ratio, setting.alpha) for vector in vectors]
    return max((place for place in range(len(p)) if p[place] == min(p)), default=0)


def _p_value(samples: ExitScores, vector: Thresholds, ratio: float, alpha: float) -> float:
    """Of "some open exit's error rate exceeds alpha"."""
    exits = _exits(samples, vector)
    worst = 0.0
    for exit_, threshold in enumerate(vector):
        if threshold < math.inf:
            leaves = exits == exit_
            wrong = (leaves & ~samples.correct[:, exit_]).sum()
            worst = max(worst, float(error_p_value(wrong * ratio, leaves.sum() * ratio, alpha)))
    return worst


def _mean_cost(samples: ExitScores, vector: Thresholds, setting: CalibrationTarget) -> float:
    return float(setting.cost[_exits(samples, vector)].mean())


def _exits(samples: ExitScores, vector: Thresholds) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    thresholds = (*vector, -math.inf)
    return exit_index(samples.scores, thresholds, thresholds)
