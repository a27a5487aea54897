"""Thresholds for a network's exits, such that few of those who leave early are wrong."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch

import fedekd
from fedekd.early_exit.calibration.baselines import conformal_risk_control, empirical, released
from fedekd.early_exit.calibration.exit_scores import ExitScores
from fedekd.early_exit.calibration.ltt import survivor_fixed_sequence
from fedekd.early_exit.calibration.ltt_joint import ltt_joint
from fedekd.early_exit.calibration.types import CalibrationRule, CalibrationTarget, SelectedThresholds
from fedekd.early_exit.policy import ExitPolicy
from fedekd.errors import UserError, nearest


class _Mode(NamedTuple):
    rule: CalibrationRule
    promises: bool


#: By name: the rule, and whether P(every R_e <= alpha) >= 1 - delta. A new rule is one function and one row.
MODES: dict[str, _Mode] = {
    "ltt": _Mode(survivor_fixed_sequence, True),
    "path": _Mode(ltt_joint, True),
    "crc": _Mode(conformal_risk_control, False),
    "released": _Mode(released, False),
    "empirical": _Mode(empirical, False),
}


class SelectiveRiskCalibrator:
    r"""Chooses the thresholds of early exits.

    $R_e = P(\text{wrong} \mid \text{leaves at } e)$. With the modes `ltt` and `path`,
    $P(R_e \le \alpha \text{ for all open exits } e) \ge 1 - \delta$ over calibration samples that are independent
    draws from the law that the network will see; it says nothing of other data. The others are there to be compared
    with: `crc` (conformal risk control, in expectation and approximately), `released` (SAFE-KD's public code; does
    not control $R_e$) and `empirical`.

    Args:
        alpha: Error rate among those who leave at an exit, in (0, 1).
        delta: Probability, in (0, 1), that a promise may fail.
        mode: `ltt`, `path`, `crc`, `released` or `empirical`.

    Raises:
        UserError: If an argument is out of its range.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> sure = rng.uniform(size=(4000, 2))
        >>> right = rng.uniform(size=(4000, 2)) < sure**0.2  # the surer, the likelier right
        >>> policy = SelectiveRiskCalibrator(alpha=0.1, delta=0.1).fit(sure[:2000], right[:2000], sure[2000:],
        ...     right[2000:])
        >>> policy.certified, 0.0 < policy.thresholds[0] < 1.0
        ((True, False), True)
    """

    def __init__(self, alpha: float, delta: float = 0.1, mode: str = "ltt") -> None:
        for name, value in (("alpha", alpha), ("delta", delta)):
            if not 0.0 < value < 1.0:
                raise UserError(f"{name} is {value}, and must lie between 0 and 1, both excluded")
        if mode not in MODES:
            raise UserError(f"mode is {mode!r}, which is not known; {nearest(mode, MODES)}")
        self.alpha, self.delta, self.mode = alpha, delta, mode

    def fit(
        self,
        scores: Any,
        correct: Any,
        tuning_scores: Any,
        tuning_correct: Any,
        true_class_probability: Any = None,
        cost: Sequence[float] | None = None,
        *,
        score: str = "max_softmax",
        network: str = "",
        gamma: float = 1.0,
        proxy: str = "",
    ) -> ExitPolicy:
        """Calibrate.

        Args:
            scores: Confidence of n calibration samples at each of E exits, the last included, (n, E).
            correct: Whether each exit is right about them, (n, E).
            tuning_scores: The same of other samples, on which the order of the tests is decided, (t, E).
            tuning_correct: (t, E).
            true_class_probability: What each exit gives the true class, (n, E); for `released` alone.
            cost: What leaving at each exit costs, (E,), for `path`; by default 1, 2, ..., E.
            score: What the scores are, for whoever applies the policy.
            network: Fingerprint of the network that gave the scores; a policy refuses any other.
            gamma: Of the score `agreement`.
            proxy: Fingerprint of the proxy that had a part in the scores, if any.

        Returns:
            The policy, with what is promised of it and what it was calibrated on.

        Raises:
            UserError: If the arrays do not fit together, are empty, or hold NaN.
        """
        policy = self.fit_scored(
            ExitScores.checked(scores, correct, true_class_probability, "calibration "),
            ExitScores.checked(tuning_scores, tuning_correct, name="tuning "),
            cost,
        )
        return replace(policy, score=score, network=network, gamma=gamma, proxy=proxy)

    def fit_scored(
        self, calibration: ExitScores, tuning: ExitScores, cost: Sequence[float] | None = None
    ) -> ExitPolicy:
        """As `fit`, from samples that are checked already; whose scores they are is for the caller to add.

        Raises:
            UserError: If the two have not as many exits, or the costs do not fit them.
        """
        exits = calibration.num_exits
        if tuning.num_exits != exits:
            raise UserError(f"calibration has {exits} exits, and tuning {tuning.num_exits}; both need the same")
        costs = np.arange(1.0, exits + 1) if cost is None else np.asarray(cost, dtype=np.float64)
        if costs.shape != (exits,) or not np.isfinite(costs).all():
            raise UserError(
                f"cost has the shape {costs.shape}; a finite number for each of the {exits} exits is needed"
            )
        mode = MODES[self.mode]
        chosen = mode.rule(calibration, tuning, CalibrationTarget(self.alpha, self.delta, costs))
        return self._policy(chosen, calibration, len(tuning), mode.promises)

    def _policy(self, chosen: SelectedThresholds, calibration: ExitScores, tuning: int, promises: bool) -> ExitPolicy:
        thresholds, search_bounds = (*chosen.thresholds, -math.inf), (*chosen.search_bounds, -math.inf)
        policy = ExitPolicy(
            thresholds=thresholds,
            search_bounds=search_bounds,
            certified=(*(promises and threshold < math.inf for threshold in chosen.thresholds), False),
            alpha=self.alpha,
            delta=self.delta,
            mode=self.mode,
        )
        exits = policy.assign(calibration.scores)
        leaving = [exits == exit_ for exit_ in range(policy.num_exits)]
        return replace(
            policy,
            samples=len(calibration),
            tuning_samples=tuning,
            leaving=tuple(int(leaves.sum()) for leaves in leaving),
            errors=tuple(int((leaves & ~calibration.correct[:, e]).sum()) for e, leaves in enumerate(leaving)),
            needed=(*chosen.needed, None),
            versions={"fedekd": fedekd.__version__, "torch": torch.__version__},
        )
