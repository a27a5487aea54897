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

Groups. Let $R_{e,g}$ be the error rate of group g at exit e. With a threshold per group, the loop runs per exit and
group on the survivors of the group, and $\#open$ counts pairs of exit and group. Groups are disjoint samples: given
their sizes and the tests of earlier exits, the tests are independent, so Sidak's level holds for all pairs at once.

With shared thresholds a candidate passes if the test of each group passes. Where $R_{e,g} > \alpha$ for some g, that
test passes with probability at most $\delta_e$ (intersection-union test): groups cost nothing, power is that of the
group with the least evidence.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from fedekd.early_exit.calibration.exit_scores import ExitScores
from fedekd.early_exit.calibration.risk_curve import (
    RiskCurve,
    Scores,
    expected_p_value,
    group_curve,
    required_samples,
)
from fedekd.early_exit.calibration.types import CalibrationTarget, SelectedThresholds
from fedekd.functional.binomial import error_p_value

#: Maximum number of thresholds tested per exit; a finer grid stops at smaller random deviations.
STEPS = 100


class SearchPlan(NamedTuple):
    """Decisions that are made on the tuning samples.

    A cell is one search for a threshold. Cells are in the order of exits, and within an exit of `target.searches`;
    without groups there is one cell per exit.

    Attributes:
        grids: Per cell the thresholds to test in decreasing order; empty for a closed cell.
        level: Significance level of the tests of each open cell.
        required_samples: Per closed cell the estimated least number of calibration samples, or None.
    """

    grids: list[Scores]
    level: float
    required_samples: tuple[int | None, ...]


def survivor_fixed_sequence(
    calibration: ExitScores, tuning: ExitScores, target: CalibrationTarget
) -> SelectedThresholds:
    """Rule `ltt`: fixed-sequence tests per exit on the survivors.

    Guarantees P(all R_e <= target_risk) >= confidence for independent, identically distributed samples; with groups
    P(all R_eg <= target_risk) >= confidence.

    Args:
        calibration: Samples on which the thresholds are tested.
        tuning: Independent samples on which the sequence of tests is fixed.
        target: Target risk, failure probability and groups.

    Returns:
        Thresholds, search bounds and sample-size estimates.

    Reference:
        Angelopoulos et al., "Learn then Test", arXiv 2110.01052 (fixed-sequence testing); Sidak, JASA 62 (1967);
        Berger, Technometrics 24 (1982) (intersection-union test).
    """
    plan = make_plan(tuning, len(calibration), target)
    thresholds, search_bounds = [], []
    alive = np.ones(len(calibration), dtype=bool)
    for exit_ in range(calibration.num_exits - 1):
        groups, stays = calibration.groups_at(exit_), alive.copy()
        for cell, tested in _cells(exit_, target):
            threshold = search_bound = math.inf
            members = alive & np.isin(groups, tested)
            scores, correct = calibration.scores[members, exit_], calibration.correct[members, exit_]
            for candidate in plan.grids[cell]:
                search_bound = float(candidate)
                exits_here = scores >= candidate
                samples, errors = (
                    np.bincount(groups[members][mask], minlength=target.groups)[tested]
                    for mask in (exits_here, exits_here & ~correct)
                )
                if error_p_value(errors, samples, target.target_risk).max() > plan.level:
                    break
                threshold = search_bound
            thresholds.append(threshold)
            search_bounds.append(search_bound)
            below = calibration.scores[:, exit_] < search_bound
            stays &= below if target.shared else ~members | below  # a shared threshold holds for untested groups, too
        alive = stays
    return SelectedThresholds(tuple(thresholds), tuple(search_bounds), plan.required_samples)


def make_plan(tuning: ExitScores, samples: int, target: CalibrationTarget) -> SearchPlan:
    """Fix on the tuning samples which cells are open and which thresholds are tested.

    A cell is closed if even its best threshold is not expected to pass with `samples` calibration samples. Cells are
    closed one at a time, the least likely first, because each closed cell raises the level of the others.

    Args:
        tuning: Tuning samples.
        samples: Number of calibration samples.
        target: Target risk, failure probability and groups.
    """
    ratio = samples / len(tuning)
    closed: dict[int, int | None] = {}
    num_cells = (tuning.num_exits - 1) * len(target.searches)
    while True:
        num_open = num_cells - len(closed)
        level = target.failure_probability
        if num_open:
            level = 1.0 - (1.0 - target.failure_probability) ** (1.0 / num_open)
        grids: list[Scores] = []
        prospects: dict[int, tuple[float, RiskCurve | None, int]] = {}
        alive = np.ones(len(tuning), dtype=bool)
        for exit_ in range(tuning.num_exits - 1):
            groups, stays = tuning.groups_at(exit_), alive.copy()
            for cell, tested in _cells(exit_, target):
                grid = np.empty(0)
                is_tested = np.isin(groups, tested)
                members = alive & is_tested
                if cell not in closed and members.any():
                    scores, correct = tuning.scores[members, exit_], tuning.correct[members, exit_]
                    curve = group_curve(scores, correct, groups[members], tested)
                    p = expected_p_value(curve, target.target_risk, ratio)
                    prospects[cell] = (float(p.min()), curve, int(is_tested.sum()))
                    if p.min() <= level:  # else the cell will be closed and removes no samples from deeper exits
                        grid = _grid(curve, p)
                        at_grid = curve.take(np.searchsorted(-curve.thresholds, -grid))
                        failing = expected_p_value(at_grid, target.target_risk, ratio) > level
                        search_bound = grid[int(np.argmax(failing))] if failing.any() else grid[-1]
                        below = tuning.scores[:, exit_] < search_bound
                        stays &= below if target.shared else ~members | below
                elif cell not in closed:
                    prospects[cell] = (math.inf, None, 0)  # no sample reaches this exit
                grids.append(grid)
            alive = stays
        failing_cells = {cell: prospect for cell, prospect in prospects.items() if prospect[0] > level}
        if not failing_cells:
            return SearchPlan(grids, level, tuple(closed.get(cell) for cell in range(num_cells)))
        # Of ties close the deepest: it saves the least.
        worst = max(failing_cells, key=lambda cell: (failing_cells[cell][0], cell))
        _, curve_of_worst, tested_samples = failing_cells[worst]
        closed[worst] = (
            None
            if curve_of_worst is None
            else required_samples(curve_of_worst, target.target_risk, level, tested_samples)
        )


def _cells(exit_: int, target: CalibrationTarget) -> Iterator[tuple[int, list[int]]]:
    """Yield the number of each cell of an exit, and the groups that it tests."""
    yield from enumerate(target.searches, start=exit_ * len(target.searches))


def _grid(curve: RiskCurve, p: Scores) -> Scores:
    """At most `STEPS` thresholds below the lowest p-value, evenly spaced."""
    start = int(np.argmin(p))
    if len(curve.thresholds) - start <= STEPS:
        return curve.thresholds[start:]
    samples = curve.samples if curve.samples.ndim == 1 else curve.samples.sum(axis=1)
    counts = np.linspace(samples[start], samples[-1], STEPS)
    return curve.thresholds[np.unique(np.searchsorted(samples, counts))]
