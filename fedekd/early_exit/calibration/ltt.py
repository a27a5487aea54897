r"""Survivor fixed-sequence testing: exits whose error rates hold together with probability 1 - delta.

Learn-then-test (Angelopoulos et al., arXiv 2110.01052) for exits in a row. The error rate $R_e$ among those who leave
at exit e is not monotone in its threshold, and whoever has left before is not there any more: calibrating every exit
on all samples promises something about samples that never come. So each exit is tested on survivors alone:

    A = all calibration samples
    for each open exit e in order:  tau_e = band_e = inf
        for lam in grid_e, from high to low:
            band_e = lam;  m = #{A: s_e >= lam};  k = wrong among them
            if P(Bin(m, alpha) <= k) <= delta_e: tau_e = lam   else: break
        A = {A: s_e < band_e}

Given m, the errors k among those with $s_e \ge \lambda$ are Bin(m, R), and tests in a fixed order, up to the first that
fails, cost $\delta_e$ once per exit. The walk looks at samples with $s_e \ge$ band only, so those below it are again
independent draws, from the law of whoever is below, and the next exit's tests are fresh. With
$\delta_e = 1 - (1-\delta)^{1/\#open}$ all hold at once with probability $1 - \delta$. Samples between band and
threshold have been looked at, and not promised: in deployment they go to the last exit.

The grids and which exits are open must not depend on the calibration samples: the tuning samples decide them.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from fedekd.early_exit.calibration.exit_scores import ExitScores
from fedekd.early_exit.calibration.risk_curve import RiskCurve, Scores, expected_p_value, risk_curve, samples_needed
from fedekd.early_exit.calibration.types import CalibrationTarget, SelectedThresholds
from fedekd.functional.binomial import error_p_value

#: Thresholds tried at an exit; a finer walk stops at smaller accidents.
STEPS = 100


class Plan(NamedTuple):
    """What the tuning samples decide.

    Attributes:
        grids: By exit the thresholds to try, falling; empty where the exit is closed beforehand.
        delta: The level of each open exit's tests.
        needed: For a closed exit about how many calibration samples would open it.
    """

    grids: list[Scores]
    delta: float
    needed: tuple[int | None, ...]


def survivor_fixed_sequence(
    calibration: ExitScores, tuning: ExitScores, setting: CalibrationTarget
) -> SelectedThresholds:
    """The rule `ltt`: P(every R_e <= alpha) >= 1 - delta, for independent calibration samples of one law."""
    plan = make_plan(tuning, len(calibration), setting)
    thresholds, search_bounds = [], []
    alive = np.ones(len(calibration), dtype=bool)
    for exit_, grid in enumerate(plan.grids):
        threshold = search_bound = math.inf
        scores, correct = calibration.scores[alive, exit_], calibration.correct[alive, exit_]
        for lam in grid:
            search_bound = float(lam)
            leaves = scores >= lam
            p = error_p_value((leaves & ~correct).sum(), leaves.sum(), setting.alpha)
            if p > plan.delta:
                break
            threshold = search_bound
        thresholds.append(threshold)
        search_bounds.append(search_bound)
        alive &= calibration.scores[:, exit_] < search_bound
    return SelectedThresholds(tuple(thresholds), tuple(search_bounds), plan.needed)


def make_plan(tuning: ExitScores, samples: int, setting: CalibrationTarget) -> Plan:
    """Decide on tuning samples which exits are open, and where each walk begins.

    An exit at which not even the most promising threshold is expected to pass with `samples` calibration samples is
    closed beforehand, the least promising first, since every exit less raises the level of the others.
    """
    ratio = samples / len(tuning)
    closed: dict[int, int | None] = {}
    early = tuning.num_exits - 1
    while True:
        open_ = early - len(closed)
        delta = 1.0 - (1.0 - setting.delta) ** (1.0 / open_) if open_ else setting.delta
        grids: list[Scores] = []
        prospects: dict[int, tuple[float, RiskCurve | None]] = {}
        alive = np.ones(len(tuning), dtype=bool)
        for exit_ in range(early):
            grid = np.empty(0)
            if exit_ not in closed and alive.any():
                walk = risk_curve(tuning.scores[alive, exit_], tuning.correct[alive, exit_])
                p = expected_p_value(walk, setting.alpha, ratio)
                prospects[exit_] = (float(p.min()), walk)
                if p.min() <= delta:  # or it will be closed, and take nobody from the exits behind it
                    grid = _grid(walk, p)
                    failing = error_p_value(*_counts_at(walk, grid, ratio), setting.alpha) > delta
                    search_bound = grid[int(np.argmax(failing))] if failing.any() else grid[-1]
                    alive &= tuning.scores[:, exit_] < search_bound
            elif exit_ not in closed:
                prospects[exit_] = (math.inf, None)  # nobody comes here
            grids.append(grid)
        hopeless = {exit_: (p, walk) for exit_, (p, walk) in prospects.items() if p > delta}
        if not hopeless:
            return Plan(grids, delta, tuple(closed.get(exit_) for exit_ in range(early)))
        # Of equal ones the deepest: it saves the least.
        worst = max(hopeless, key=lambda exit_: (hopeless[exit_][0], exit_))
        of_worst = hopeless[worst][1]
        closed[worst] = None if of_worst is None else samples_needed(of_worst, setting.alpha, delta, len(tuning))


def _grid(walk: RiskCurve, p: Scores) -> Scores:
    """At most `STEPS` thresholds from the most promising one down, with about as many samples between any two."""
    begin = int(np.argmin(p))
    if len(walk.thresholds) - begin <= STEPS:
        return walk.thresholds[begin:]
    wanted = np.linspace(walk.samples[begin], walk.samples[-1], STEPS)
    places = np.unique(np.searchsorted(walk.samples, wanted))
    return walk.thresholds[places]


def _counts_at(walk: RiskCurve, grid: Scores, ratio: float) -> tuple[Scores, Scores]:
    """Errors and samples to expect at the thresholds of a grid."""
    places = np.searchsorted(-walk.thresholds, -grid)
    return walk.errors[places].astype(np.float64) * ratio, walk.samples[places].astype(np.float64) * ratio
