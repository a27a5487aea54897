r"""Fixed-sequence testing on the survivors of earlier exits.

Guarantee. Population: the distribution of the calibration samples, which must be independent draws of it. Target: the
error rate $R_e = P(\text{wrong} \mid \text{exit at } e)$ of each open exit is at most the target risk $\alpha$.
Confidence: all hold at once with probability at least $1 - \delta$ over the calibration samples. Assumption: deployed
samples have the same distribution; thresholds to test and closed exits are fixed on independent tuning samples.

Learn-then-test (Angelopoulos et al., arXiv 2110.01052) for a sequence of exits. $R_e$ is not monotone in the
threshold, and samples that exited earlier do not reach exit e, so each exit is tested on the survivors:

    A = all calibration samples
    for each open exit e in order:  tau_e = bound_e = inf
        for lam in grid_e, in decreasing order:
            bound_e = lam;  m = #{A: s_e >= lam};  k = errors among them
            if P(Bin(m, alpha) <= k) <= delta_e: tau_e = lam   else: break
        A = {A: s_e < bound_e}

Given m, the number k of errors among the samples with $s_e \ge \lambda$ is Bin(m, R). Tests in a fixed order, up to
the first that fails, cost $\delta_e$ once per exit (fixed-sequence testing). The search reads samples with $s_e \ge$
bound only, so the samples below are again independent draws, from the distribution of the samples below the bound, and
the tests of the next exit are independent of it. With $\delta_e = 1 - (1-\delta)^{1/\#open}$ all guarantees hold at
once with probability $1 - \delta$. Samples between bound and threshold were tested without a guarantee: they take the
last exit.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from fedekd.early_exit.calibration.exit_scores import ExitScores
from fedekd.early_exit.calibration.risk_curve import RiskCurve, Scores, expected_p_value, required_samples, risk_curve
from fedekd.early_exit.calibration.types import CalibrationTarget, SelectedThresholds
from fedekd.functional.binomial import error_p_value

#: Maximum number of thresholds tested per exit; a finer grid stops at smaller random deviations.
STEPS = 100


class SearchPlan(NamedTuple):
    """Decisions that are made on the tuning samples.

    Attributes:
        grids: Per exit the thresholds to test in decreasing order; empty for a closed exit.
        level: Significance level of the tests of each open exit.
        required_samples: Per closed exit the estimated number of calibration samples that would open it, or None.
    """

    grids: list[Scores]
    level: float
    required_samples: tuple[int | None, ...]


def survivor_fixed_sequence(
    calibration: ExitScores, tuning: ExitScores, target: CalibrationTarget
) -> SelectedThresholds:
    """Rule `ltt`: fixed-sequence tests per exit on the survivors.

    Guarantees P(all R_e <= target_risk) >= confidence for independent, identically distributed samples.

    Args:
        calibration: Samples on which the thresholds are tested.
        tuning: Independent samples on which the sequence of tests is fixed.
        target: Target risk and failure probability.

    Returns:
        Thresholds, search bounds and sample-size estimates.

    Reference:
        Angelopoulos et al., "Learn then Test", arXiv 2110.01052 (fixed-sequence testing).
    """
    plan = make_plan(tuning, len(calibration), target)
    thresholds, search_bounds = [], []
    alive = np.ones(len(calibration), dtype=bool)
    for exit_, grid in enumerate(plan.grids):
        threshold = search_bound = math.inf
        scores, correct = calibration.scores[alive, exit_], calibration.correct[alive, exit_]
        for candidate in grid:
            search_bound = float(candidate)
            exits_here = scores >= candidate
            p = error_p_value((exits_here & ~correct).sum(), exits_here.sum(), target.target_risk)
            if p > plan.level:
                break
            threshold = search_bound
        thresholds.append(threshold)
        search_bounds.append(search_bound)
        alive &= calibration.scores[:, exit_] < search_bound
    return SelectedThresholds(tuple(thresholds), tuple(search_bounds), plan.required_samples)


def make_plan(tuning: ExitScores, samples: int, target: CalibrationTarget) -> SearchPlan:
    """Fix on the tuning samples which exits are open and which thresholds are tested.

    An exit is closed if even its best threshold is not expected to pass with `samples` calibration samples. Exits are
    closed one at a time, the least likely first, because each closed exit raises the level of the others.

    Args:
        tuning: Tuning samples.
        samples: Number of calibration samples.
        target: Target risk and failure probability.
    """
    ratio = samples / len(tuning)
    closed: dict[int, int | None] = {}
    early_exits = tuning.num_exits - 1
    while True:
        num_open = early_exits - len(closed)
        level = target.failure_probability
        if num_open:
            level = 1.0 - (1.0 - target.failure_probability) ** (1.0 / num_open)
        grids: list[Scores] = []
        prospects: dict[int, tuple[float, RiskCurve | None]] = {}
        alive = np.ones(len(tuning), dtype=bool)
        for exit_ in range(early_exits):
            grid = np.empty(0)
            if exit_ not in closed and alive.any():
                curve = risk_curve(tuning.scores[alive, exit_], tuning.correct[alive, exit_])
                p = expected_p_value(curve, target.target_risk, ratio)
                prospects[exit_] = (float(p.min()), curve)
                if p.min() <= level:  # else the exit will be closed and removes no samples from deeper exits
                    grid = _grid(curve, p)
                    failing = error_p_value(*_expected_counts(curve, grid, ratio), target.target_risk) > level
                    search_bound = grid[int(np.argmax(failing))] if failing.any() else grid[-1]
                    alive &= tuning.scores[:, exit_] < search_bound
            elif exit_ not in closed:
                prospects[exit_] = (math.inf, None)  # no sample reaches this exit
            grids.append(grid)
        failing_exits = {exit_: (p, curve) for exit_, (p, curve) in prospects.items() if p > level}
        if not failing_exits:
            return SearchPlan(grids, level, tuple(closed.get(exit_) for exit_ in range(early_exits)))
        # Of ties close the deepest: it saves the least.
        worst = max(failing_exits, key=lambda exit_: (failing_exits[exit_][0], exit_))
        curve_of_worst = failing_exits[worst][1]
        closed[worst] = (
            None if curve_of_worst is None else required_samples(curve_of_worst, target.target_risk, level, len(tuning))
        )


def _grid(curve: RiskCurve, p: Scores) -> Scores:
    """At most `STEPS` thresholds below the lowest p-value, evenly spaced."""
    start = int(np.argmin(p))
    if len(curve.thresholds) - start <= STEPS:
        return curve.thresholds[start:]
    counts = np.linspace(curve.samples[start], curve.samples[-1], STEPS)
    return curve.thresholds[np.unique(np.searchsorted(curve.samples, counts))]


def _expected_counts(curve: RiskCurve, grid: Scores, ratio: float) -> tuple[Scores, Scores]:
    """Expected errors and samples at the thresholds of a grid."""
    indices = np.searchsorted(-curve.thresholds, -grid)
    return curve.errors[indices].astype(np.float64) * ratio, curve.samples[indices].astype(np.float64) * ratio
