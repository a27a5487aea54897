"""Calibration baselines without a finite-sample guarantee."""

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

#: Minimum number of samples per exit for conformal risk control.
MIN_EXIT_SAMPLES = 60


def conformal_risk_control(
    calibration: ExitScores, tuning: ExitScores, target: CalibrationTarget
) -> SelectedThresholds:
    r"""Rule `crc`: conformal risk control, as named in the SAFE-KD abstract.

    Lowers the threshold while $(k + 1) / (m + 1) \le \alpha$ among at least 60 survivors. It bounds the error rate in
    expectation over calibration sets, not with high probability, and only approximately: the loss of the samples that
    exit is not monotone in the threshold, as the theorem requires.

    Reference:
        Angelopoulos et al., "Conformal Risk Control", arXiv 2208.02814 (the choice of
        $\hat\lambda$).
    """

    def lowest(curve: RiskCurve) -> float:
        fits = (curve.errors + 1) / (curve.samples + 1) <= target.target_risk
        is_enough = curve.samples >= MIN_EXIT_SAMPLES
        # The search stops at the first failure among thresholds with enough samples.
        failures = np.flatnonzero(is_enough & ~fits)
        passed = np.flatnonzero((is_enough & fits)[: failures[0] if len(failures) else None])
        return float(curve.thresholds[passed[-1]]) if len(passed) else math.inf

    return _on_survivors(calibration, lowest)


def empirical(calibration: ExitScores, tuning: ExitScores, target: CalibrationTarget) -> SelectedThresholds:
    """Rule `empirical` (plug-in): lowest threshold that reaches the target risk.

    Error rates are those of the calibration samples. No guarantee: the lowest of many thresholds is selected on the
    same samples (selection bias).
    """

    def lowest(curve: RiskCurve) -> float:
        fits = np.flatnonzero(curve.risk <= target.target_risk)
        return float(curve.thresholds[fits[-1]]) if len(fits) else math.inf

    return _on_survivors(calibration, lowest)


def safekd_code(calibration: ExitScores, tuning: ExitScores, target: CalibrationTarget) -> SelectedThresholds:
    r"""Rule `safekd_code`: conformal quantiles, as in SAFE-KD's public code.

    A sample exits if its score is at least $1 - \hat q_e$, where $\hat q_e$ is the conformal quantile of $1 - p_y$ at
    exit e over all calibration samples. The probability of the true class thus reaches the threshold with probability
    $1 - \alpha$, which does not bound the error rate among the samples whose confidence reaches it.

    Raises:
        UserError: `true_class_probability` is None.

    Reference:
        SAFE-KD, arXiv 2602.03043, as implemented in its public code.
    """
    if calibration.true_class_probability is None:
        raise UserError("true_class_probability: expected probabilities for mode 'safekd_code', got None")
    thresholds = []
    for exit_ in range(calibration.num_exits - 1):
        nonconformity = torch.from_numpy(1.0 - calibration.true_class_probability[:, exit_])
        thresholds.append(1.0 - conformal_quantile(nonconformity, target.target_risk))
    # With too few samples the quantile is infinite, and all samples would exit.
    return SelectedThresholds.without_tests([math.inf if value == -math.inf else value for value in thresholds])


def _on_survivors(calibration: ExitScores, lowest: Callable[[RiskCurve], float]) -> SelectedThresholds:
    """Select each exit's threshold on the samples that did not exit earlier."""
    thresholds = []
    alive = np.ones(len(calibration), dtype=bool)
    for exit_ in range(calibration.num_exits - 1):
        curve = risk_curve(calibration.scores[alive, exit_], calibration.correct[alive, exit_])
        thresholds.append(lowest(curve) if alive.any() else math.inf)
        alive &= calibration.scores[:, exit_] < thresholds[-1]
    return SelectedThresholds.without_tests(thresholds)
