"""Rules that promise less than they seem to, to be held against `ltt` and `path`."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch

from fedekd.early_exit.calibration.exit_scores import ExitScores
from fedekd.early_exit.calibration.risk_curve import RiskCurve, risk_curve
from fedekd.early_exit.calibration.types import CalibrationTarget, SelectedThresholds
from fedekd.errors import UserError
from fedekd.functional import conformal_quantile

#: Fewest samples that may leave at an exit under conformal risk control.
LEAST_LEAVING = 60


def conformal_risk_control(
    calibration: ExitScores, tuning: ExitScores, setting: CalibrationTarget
) -> SelectedThresholds:
    """The rule `crc`: walk down while (k + 1) / (m + 1) <= alpha among the survivors, with at least 60 who leave.

    Conformal risk control (Angelopoulos et al., arXiv 2208.02814) as the SAFE-KD abstract names it. It holds the error
    rate in expectation over calibration sets, not with high probability, and that only approximately: the loss of those
    who leave is not monotone in the threshold, as its theorem asks.
    """

    def lowest(walk: RiskCurve) -> float:
        fits = (walk.errors + 1) / (walk.samples + 1) <= setting.alpha
        enough = walk.samples >= LEAST_LEAVING
        # "While": the walk ends where it first fails, once enough have left.
        failed = np.flatnonzero(enough & ~fits)
        walked = np.flatnonzero((enough & fits)[: failed[0] if len(failed) else None])
        return float(walk.thresholds[walked[-1]]) if len(walked) else math.inf

    return _by_survivors(calibration, lowest)


def empirical(calibration: ExitScores, tuning: ExitScores, setting: CalibrationTarget) -> SelectedThresholds:
    """The rule `empirical`: the lowest threshold at which no more than alpha of the calibration samples are wrong.

    What is done without thinking about it. Promises nothing: the lowest of many thresholds was chosen by luck, too.
    """

    def lowest(walk: RiskCurve) -> float:
        fits = np.flatnonzero(walk.risk <= setting.alpha)
        return float(walk.thresholds[fits[-1]]) if len(fits) else math.inf

    return _by_survivors(calibration, lowest)


def released(calibration: ExitScores, tuning: ExitScores, setting: CalibrationTarget) -> SelectedThresholds:
    r"""The rule `released`, of SAFE-KD's public code: leave where the score is at least $1 - \hat q_e$.

    $\hat q_e$ is the conformal quantile of $1 - p_y$ at exit e over all calibration samples. So the true class's
    probability reaches the threshold with probability $1 - \alpha$, which says nothing of how many of those whose
    confidence reaches it are wrong.

    Raises:
        UserError: If the true class's probabilities are not given.
    """
    if calibration.true_class_probability is None:
        raise UserError("mode 'released' needs true_class_probability: the probability each exit gives the true class")
    thresholds = []
    for exit_ in range(calibration.num_exits - 1):
        nonconformity = torch.from_numpy(1.0 - calibration.true_class_probability[:, exit_])
        thresholds.append(1.0 - conformal_quantile(nonconformity, setting.alpha))
    # An infinite quantile, of too few samples, would let everybody leave.
    return SelectedThresholds.plain([math.inf if threshold == -math.inf else threshold for threshold in thresholds])


def _by_survivors(calibration: ExitScores, lowest: Callable[[RiskCurve], float]) -> SelectedThresholds:
    """Each exit's threshold from the samples that have not left before it."""
    thresholds = []
    alive = np.ones(len(calibration), dtype=bool)
    for exit_ in range(calibration.num_exits - 1):
        walk = risk_curve(calibration.scores[alive, exit_], calibration.correct[alive, exit_])
        thresholds.append(lowest(walk) if alive.any() else math.inf)
        alive &= calibration.scores[:, exit_] < thresholds[-1]
    return SelectedThresholds.plain(thresholds)
