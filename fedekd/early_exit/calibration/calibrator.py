"""Calibration of exit thresholds with a guaranteed error rate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

import fedekd
from fedekd.early_exit.calibration.baselines import conformal_risk_control, empirical, safekd_code
from fedekd.early_exit.calibration.exit_scores import ExitScores
from fedekd.early_exit.calibration.ltt import survivor_fixed_sequence
from fedekd.early_exit.calibration.ltt_joint import ltt_joint
from fedekd.early_exit.calibration.types import CalibrationRule, CalibrationTarget, SelectedThresholds
from fedekd.early_exit.grouping import Grouping
from fedekd.early_exit.policy import ExitPolicy, GroupExits
from fedekd.errors import UserError, require, require_choice


class Mode(NamedTuple):
    """A calibration rule.

    Attributes:
        rule: Function that selects the thresholds.
        has_guarantee: Whether P(all R_e <= target_risk) >= confidence.
    """

    rule: CalibrationRule
    has_guarantee: bool


#: Calibration rules by name. A new rule is one function and one row.
MODES: dict[str, Mode] = {
    "ltt": Mode(survivor_fixed_sequence, True),
    "ltt_joint": Mode(ltt_joint, True),
    "crc": Mode(conformal_risk_control, False),
    "safekd_code": Mode(safekd_code, False),
    "empirical": Mode(empirical, False),
}

#: Former names of modes, for errors.
_RENAMED_MODES = {"path": "ltt_joint", "released": "safekd_code", "plug_in": "empirical"}


class SelectiveRiskCalibrator:
    r"""Selector of exit thresholds that bound the error rate at each exit.

    Guarantee of the modes `ltt` and `ltt_joint`. Let $R_e = P(\text{wrong} \mid \text{exit at } e)$.

    - Population: the distribution of the calibration samples.
    - Target and confidence: $P(R_e \le \alpha \text{ for all open exits } e) \ge 1 - \delta$ over the calibration
      samples, where $\alpha$ is `target_risk` and $1 - \delta$ is `confidence`.
    - Assumptions: calibration samples are independent draws; deployed samples have the same distribution; tuning
      samples are independent of the calibration samples. There is no guarantee under distribution shift.

    The other modes are baselines without this guarantee: `crc` (conformal risk control, in expectation and
    approximately), `safekd_code` (SAFE-KD's public code; does not control $R_e$) and `empirical` (plug-in).

    Args:
        target_risk: Maximum error rate among the samples that take an exit, in (0, 1).
        confidence: Probability that the guarantees of all exits hold at once, in (0, 1).
        mode: `ltt`, `ltt_joint`, `crc`, `safekd_code` or `empirical`.
        simultaneous_clients: Number of clients whose guarantees hold at once with this confidence, at least 1. Each
            client is calibrated with the failure probability (1 - confidence) / simultaneous_clients (Bonferroni).

    Raises:
        UserError: An argument is out of its range.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> scores = rng.uniform(size=(4000, 2))
        >>> correct = rng.uniform(size=(4000, 2)) < scores**0.2  # accuracy rises with the score
        >>> calibrator = SelectiveRiskCalibrator(target_risk=0.1, confidence=0.9)
        >>> policy = calibrator.fit(scores[:2000], correct[:2000], scores[2000:], correct[2000:])
        >>> policy.certified, 0.0 < policy.thresholds[0] < 1.0
        ((True, False), True)

    Reference:
        Angelopoulos et al., "Learn then Test", arXiv 2110.01052; see `fedekd.early_exit.calibration.ltt` for the
        algorithm.
    """

    def __init__(
        self, target_risk: float, confidence: float = 0.9, mode: str = "ltt", simultaneous_clients: int = 1
    ) -> None:
        for name, value in (("target_risk", target_risk), ("confidence", confidence)):
            if not 0.0 < value < 1.0:
                raise UserError(f"{name}: expected a number in (0, 1), got {value}")
        require_choice("mode", mode, MODES, _RENAMED_MODES)
        require(simultaneous_clients >= 1, "simultaneous_clients", "at least 1", simultaneous_clients)
        self.target_risk, self.confidence, self.mode = target_risk, confidence, mode
        self.simultaneous_clients = simultaneous_clients
        #: Failure probability of one client. Rounded, because 1 - 0.9 is not 0.1 in floating point.
        self.failure_probability = (round(1.0 - confidence, 12) or 1.0 - confidence) / simultaneous_clients

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
        """Calibrate the exits of a network.

        Args:
            scores: Confidence of n calibration samples at each of E exits, the last included, shape (n, E).
            correct: Whether the prediction of each exit is correct, shape (n, E).
            tuning_scores: Scores of t other samples, on which the sequence of tests is fixed, shape (t, E).
            tuning_correct: Correctness of the tuning samples, shape (t, E).
            true_class_probability: Probability of the true class at each exit, shape (n, E); required by
                `safekd_code` only.
            cost: Cost of a sample at each exit, shape (E,), used by `ltt_joint` (default: 1, 2, ..., E).
            score: Name of the score, a key of `fedekd.functional.SCORES`.
            network: Fingerprint of the network that computed the scores; the policy rejects other networks.
            gamma: Weight of the disagreement in the score `agreement`.
            proxy: Fingerprint of the proxy for the score `agreement`.

        Returns:
            The policy, with its guarantee and the counts of the calibration samples.

        Raises:
            UserError: Arrays have different shapes, are empty or contain NaN.
        """
        policy = self.fit_scores(
            ExitScores.from_arrays(scores, correct, true_class_probability, "calibration "),
            ExitScores.from_arrays(tuning_scores, tuning_correct, name="tuning "),
            cost,
        )
        return replace(policy, score=score, network=network, gamma=gamma, proxy=proxy)

    def fit_scores(
        self,
        calibration: ExitScores,
        tuning: ExitScores,
        cost: Sequence[float] | None = None,
        grouping: Grouping | None = None,
    ) -> ExitPolicy:
        """Calibrate on validated samples; the policy has no fingerprint.

        Args:
            calibration: Calibration samples.
            tuning: Tuning samples.
            cost: Cost of a sample at each exit, shape (E,), used by `ltt_joint` (default: 1, 2, ..., E).
            grouping: Groups of `ExitScores.groups`, whose error rates are bounded all at once. Default: none.

        Raises:
            UserError: The number of exits or costs differs, or the mode has no groups.
        """
        require_mode_with_groups(self.mode, grouping)
        num_exits = calibration.num_exits
        if tuning.num_exits != num_exits:
            raise UserError(f"tuning scores: expected {num_exits} exits as in calibration, got {tuning.num_exits}")
        costs = np.arange(1.0, num_exits + 1) if cost is None else np.asarray(cost, dtype=np.float64)
        if costs.shape != (num_exits,) or not np.isfinite(costs).all():
            raise UserError(f"cost: expected {num_exits} finite numbers, one per exit, got an array {costs.shape}")
        mode = MODES[self.mode]
        target = CalibrationTarget(self.target_risk, self.failure_probability, costs)
        if grouping is None:
            calibration, tuning = (replace(part, groups=None) for part in (calibration, tuning))
        else:
            if calibration.groups is None or tuning.groups is None:
                raise UserError("groups: expected groups of all calibration and tuning samples, got none")
            target = replace(target, groups=len(grouping.names), shared=grouping.is_shared)
        selected = mode.rule(calibration, tuning, target)
        return self._policy(selected, calibration, len(tuning), mode.has_guarantee, grouping)

    def _policy(
        self,
        selected: SelectedThresholds,
        calibration: ExitScores,
        tuning_samples: int,
        has_guarantee: bool,
        grouping: Grouping | None,
    ) -> ExitPolicy:
        exits = selected
        if grouping is not None and not grouping.is_shared:  # an unknown group takes the last exit
            exits = SelectedThresholds.without_tests([math.inf] * (calibration.num_exits - 1))
        policy = ExitPolicy(
            thresholds=(*exits.thresholds, -math.inf),
            search_bounds=(*exits.search_bounds, -math.inf),
            certified=(*(has_guarantee and threshold < math.inf for threshold in exits.thresholds), False),
            target_risk=self.target_risk,
            confidence=self.confidence,
            mode=self.mode,
            simultaneous_clients=self.simultaneous_clients,
        )
        if grouping is not None:
            policy = replace(
                policy,
                group_by=grouping.by,
                shared_thresholds=grouping.is_shared,
                groups=_group_exits(selected, grouping, has_guarantee),
                group_classes=grouping.classes,
            )
            policy = replace(policy, groups=_with_counts(policy, calibration))
        exit_counts, error_counts = _counts(policy.assign(calibration.scores, calibration.groups), calibration)
        return replace(
            policy,
            samples=len(calibration),
            tuning_samples=tuning_samples,
            exit_counts=exit_counts,
            error_counts=error_counts,
            required_samples=(*exits.required_samples, None),
            versions={"fedekd": fedekd.__version__, "torch": torch.__version__},
        )


def require_mode_with_groups(mode: str, grouping: Grouping | None) -> None:
    """Check that a calibration rule can bound the error rate of each group.

    Raises:
        UserError: It cannot.
    """
    if grouping is not None and mode != "ltt":
        raise UserError(f"mode: expected ltt with groups, got {mode}")


def _group_exits(selected: SelectedThresholds, grouping: Grouping, has_guarantee: bool) -> tuple[GroupExits, ...]:
    """Return the exits of each group, without counts."""
    searches = 1 if grouping.is_shared else len(grouping.names)
    groups = []
    for number, name in enumerate(grouping.names):
        cells = slice(0 if grouping.is_shared else number, None, searches)
        thresholds = selected.thresholds[cells]
        groups.append(
            GroupExits(
                name,
                (*thresholds, -math.inf),
                (*selected.search_bounds[cells], -math.inf),
                (*(has_guarantee and threshold < math.inf for threshold in thresholds), False),
                required_samples=(*selected.required_samples[cells], None),
            )
        )
    return tuple(groups)


def _with_counts(policy: ExitPolicy, calibration: ExitScores) -> tuple[GroupExits, ...]:
    """Return the groups of a policy with the counts of the calibration samples."""
    assert calibration.groups is not None
    exits = policy.assign(calibration.scores, calibration.groups)
    at_exit = calibration.groups[np.arange(len(exits)), exits]  # the predicted class is that of the exit taken
    groups = []
    for number, group in enumerate(policy.groups):
        members = at_exit == number
        exit_counts, error_counts = _counts(exits[members], calibration.take(members))
        tested = calibration.groups >= 0 if policy.shared_thresholds else calibration.groups == number
        groups.append(
            replace(
                group,
                samples=int(members.sum()),
                exit_counts=exit_counts,
                error_counts=error_counts,
                tested_samples=tuple(tested.sum(axis=0).tolist()),
            )
        )
    return tuple(groups)


def _counts(exits: npt.NDArray[np.int64], samples: ExitScores) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Count the samples and the errors at each exit."""
    masks = [exits == exit_ for exit_ in range(samples.num_exits)]
    errors = (int((mask & ~samples.correct[:, exit_]).sum()) for exit_, mask in enumerate(masks))
    return tuple(int(mask.sum()) for mask in masks), tuple(errors)
