"""Thresholds per group and shared thresholds against a literal reference, and their level."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from fedekd.early_exit import ExitPolicy, ExitScores, SelectiveRiskCalibrator
from fedekd.early_exit.calibration import ltt
from fedekd.early_exit.calibration.ltt import make_plan
from fedekd.early_exit.calibration.risk_curve import group_curve
from fedekd.early_exit.calibration.types import CalibrationTarget
from fedekd.early_exit.client_calibration import GroupColumn
from fedekd.early_exit.grouping import PREDICTED_CLASS, TRUE_CLASS, Grouping
from fedekd.early_exit.scoring import ExitOutputs
from fedekd.errors import UserError
from fedekd.functional.binomial import clopper_pearson

INF = math.inf
SHARES = (0.7, 0.2, 0.1)
NAMES = ("A", "B", "C")


def draw(seed: int, samples: int, exits: int = 3, by_exit: bool = False) -> ExitScores:
    """Draw samples of three groups of unequal size and difficulty; groups may differ between exits."""
    rng = np.random.default_rng((1, seed))
    groups = rng.choice(3, size=(samples, exits if by_exit else 1), p=SHARES)
    scores = rng.uniform(size=(samples, exits)).round(2)
    groups = np.broadcast_to(groups, scores.shape).copy()
    correct = rng.uniform(size=scores.shape) < 0.7 + 0.3 * scores ** (0.5 + groups)
    return ExitScores(scores, correct, None, groups)


def fit(calibration: ExitScores, tuning: ExitScores, shared: bool, by: str = "scanner", alpha=0.15) -> ExitPolicy:
    grouping = Grouping(by, NAMES, shared)
    return SelectiveRiskCalibrator(alpha, 0.9).fit_scores(calibration, tuning, grouping=grouping)


def literal(calibration: ExitScores, plan, shared: bool, alpha: float):
    """Transcribe the rule sample by sample: per cell the threshold and the search bound."""
    alive = list(range(len(calibration)))
    searches = [[0, 1, 2]] if shared else [[0], [1], [2]]
    cells, cell = [], 0
    for exit_ in range(calibration.num_exits - 1):
        bounds = {}
        for tested in searches:
            tau = bound = INF
            for lam in plan.grids[cell]:
                bound = lam
                p_values = []
                for group in tested:
                    here = [
                        i
                        for i in alive
                        if calibration.groups[i, exit_] == group and calibration.scores[i, exit_] >= lam
                    ]
                    wrong = sum(not calibration.correct[i, exit_] for i in here)
                    p_values.append(binom.cdf(wrong, len(here), alpha))
                if max(p_values) > plan.level:
                    break
                tau = lam
            cells.append((tau, bound))
            bounds |= dict.fromkeys(tested, bound)
            cell += 1
        alive = [i for i in alive if calibration.scores[i, exit_] < bounds[calibration.groups[i, exit_]]]
    return cells


@given(st.integers(0, 10**6), st.booleans(), st.booleans(), st.sampled_from([0.1, 0.2]))
@settings(max_examples=12)
def test_ltt_with_groups_equals_literal_transcription(seed, shared, by_exit, alpha):
    calibration, tuning = draw(seed, 250, by_exit=by_exit), draw(seed + 1, 300, by_exit=by_exit)
    plan = make_plan(tuning, 250, CalibrationTarget(alpha, 0.1, np.ones(3), 3, shared))
    num_open = sum(len(grid) > 0 for grid in plan.grids)
    assert plan.level == pytest.approx(1 - 0.9 ** (1 / num_open) if num_open else 0.1, rel=1e-12)
    policy = fit(calibration, tuning, shared, PREDICTED_CLASS if by_exit else "scanner", alpha)
    cells = literal(calibration, plan, shared, alpha)
    searches = 1 if shared else 3
    for number, group in enumerate(policy.groups):
        expected = [cells[exit_ * searches + (0 if shared else number)] for exit_ in range(2)]
        assert list(zip(group.thresholds, group.search_bounds, strict=True)) == [*expected, (-INF, -INF)]
        assert group.certified == (*(tau < INF for tau, _ in expected), False)


@given(st.integers(0, 10**6))
@settings(max_examples=10)
def test_group_curve_counts_equal_loops(seed):
    samples = draw(seed, 60, exits=1)
    curve = group_curve(samples.scores[:, 0], samples.correct[:, 0], samples.groups[:, 0], [0, 2])
    for row, threshold in enumerate(curve.thresholds):
        for column, group in enumerate([0, 2]):
            mask = (samples.scores[:, 0] >= threshold) & (samples.groups[:, 0] == group)
            assert curve.samples[row, column] == mask.sum()
            assert curve.errors[row, column] == (mask & ~samples.correct[:, 0]).sum()


def test_ltt_one_group_equals_calibration_without_groups():
    calibration, tuning = draw(3, 600), draw(4, 400)
    one = [replace(part, groups=np.zeros_like(part.groups)) for part in (calibration, tuning)]
    calibrator = SelectiveRiskCalibrator(0.2, 0.9)
    plain = calibrator.fit_scores(calibration, tuning)
    for shared in (True, False):
        [group] = calibrator.fit_scores(*one, grouping=Grouping("scanner", ("A",), shared)).groups
        assert (group.thresholds, group.search_bounds) == (plain.thresholds, plain.search_bounds)
        assert (group.exit_counts, group.error_counts) == (plain.exit_counts, plain.error_counts)
        assert group.required_samples == plain.required_samples


def violation_interval(shared: bool, level: float | None = None, draws: int = 400) -> tuple[float, float]:
    """Interval of the probability that an exit opens for a group, each of which exceeds the target risk slightly.

    Groups have 70%, 20% and 10% of 600 samples. The plan is fixed on tuning samples, on which all groups pass.
    """
    alpha, risk = 0.1, 0.1001
    target = CalibrationTarget(alpha, 0.1, np.ones(2), 3, shared)
    groups = np.repeat(np.arange(3), 1000)[:, None].repeat(2, axis=1)
    right = (np.arange(3000) % 50 > 0)[:, None].repeat(2, axis=1)
    plan = make_plan(ExitScores(np.full((3000, 2), 0.5), right, None, groups), 600, target)
    plan = plan._replace(level=level or plan.level)
    rng, failed = np.random.default_rng(0), 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ltt, "make_plan", lambda *_: plan)
        for _ in range(draws):
            groups = rng.choice(3, size=(600, 1), p=SHARES).repeat(2, axis=1)
            correct = rng.uniform(size=(600, 2)) >= risk
            calibration = ExitScores(np.full((600, 2), 0.5), correct, None, groups)
            selected = ltt.survivor_fixed_sequence(calibration, calibration, target)
            failed += min(selected.thresholds) < INF
    return clopper_pearson(failed, draws, 0.99)


@pytest.mark.parametrize("shared", [False, True])
def test_familywise_level_holds_for_groups_of_unequal_size(shared):
    low, high = violation_interval(shared)
    assert low <= 0.1
    assert high > 0 if shared else high > 0.05  # open for some draws: the check is not vacuous


def test_familywise_level_without_correction_is_violated():
    assert violation_interval(shared=False, level=0.1)[0] > 0.1


def test_shared_threshold_that_passes_for_any_group_is_violated(monkeypatch):
    class AnyGroup(np.ndarray):
        def max(self, *arguments, **options):
            return self.min(*arguments, **options)

    test = ltt.error_p_value
    monkeypatch.setattr(ltt, "error_p_value", lambda *arguments: test(*arguments).view(AnyGroup))
    assert violation_interval(shared=True)[0] > 0.1


def test_policy_with_groups_round_trips_and_closes_exits_of_unknown_groups():
    calibration, tuning = draw(1, 3000), draw(2, 2000)
    policy = fit(calibration, tuning, shared=False, alpha=0.2)
    assert ExitPolicy.from_json(policy.to_json()) == policy
    assert policy.needs_group
    assert policy.is_certified
    unknown = np.full_like(calibration.groups, -1)
    assert (policy.assign(calibration.scores, unknown) == 2).all()
    assert (policy.assign(calibration.scores) == 2).all()
    exits = policy.assign(calibration.scores, calibration.groups)
    for number, name in enumerate(NAMES):
        mask = calibration.groups[:, 0] == number
        assert exits[mask].tolist() == policy.for_group(name).assign(calibration.scores[mask]).tolist()
        assert sum(policy.groups[number].exit_counts) == policy.groups[number].samples == mask.sum()
    with pytest.raises(UserError, match="group: expected one of A, B, C, got 'D'"):
        policy.for_group("D")


def test_small_group_stays_closed_and_has_an_estimate():
    few = draw(5, 600)
    policy = fit(few, draw(6, 600), shared=False, alpha=0.05)
    closed = [group for group in policy.groups if group.thresholds[0] == INF and group.required_samples[0]]
    assert closed
    assert all(group.required_samples[0] > group.samples for group in closed)


def test_tested_samples_of_a_predicted_class_count_those_at_the_exit():
    calibration, tuning = draw(7, 600, by_exit=True), draw(8, 600, by_exit=True)
    for shared in (False, True):
        policy = fit(calibration, tuning, shared, PREDICTED_CLASS)
        for number, group in enumerate(policy.groups):
            of_group = [[shared or row[exit_] == number for row in calibration.groups] for exit_ in range(3)]
            assert group.tested_samples == tuple(map(sum, of_group))
    assert policy.groups[0].tested_samples[0] != policy.groups[0].samples


def test_shared_predicted_classes_are_those_of_the_tuning_samples():
    logits = torch.eye(4)[:, None, :].repeat(1, 2, 1)
    tuning, calibration = (ExitOutputs(logits[rows], torch.tensor(rows)) for rows in ([3, 1], [0, 1, 2]))
    client = SimpleNamespace(spec=SimpleNamespace(num_outputs=4), samples=SimpleNamespace(class_names=tuple("abcd")))

    def names(by: str, shared: bool) -> str:
        return "".join(GroupColumn(by, shared).grouping(client, tuning, calibration).names)

    assert names(PREDICTED_CLASS, True) == "bd"
    assert names(PREDICTED_CLASS, False) == names(TRUE_CLASS, True) == "abcd"


@pytest.mark.parametrize("mode", ["ltt_joint", "empirical"])
def test_fit_groups_with_another_mode_raises(mode):
    with pytest.raises(UserError, match="mode: expected ltt with groups"):
        SelectiveRiskCalibrator(0.1, 0.9, mode).fit_scores(draw(1, 50), draw(2, 50), None, Grouping("x", NAMES, False))


def test_shared_threshold_removes_samples_of_groups_without_tuning_samples() -> None:
    rng = np.random.default_rng(0)

    def known(samples: int) -> ExitScores:
        scores = np.column_stack([rng.uniform(size=(samples, 2)), np.ones(samples)])
        correct = np.column_stack([scores[:, 0] > 0.5, np.ones((samples, 2), dtype=bool)])
        return ExitScores(scores, correct, None, np.zeros((samples, 3), dtype=np.int64))

    # Samples of an unknown class take exit 1 at deployment, so that their errors at exit 2 do not count.
    tuning, some = known(1000), known(2000)
    unknown = ExitScores(np.full((300, 3), 0.99), np.zeros((300, 3), bool), None, np.tile([-1, 0, 0], (300, 1)))
    parts = ((getattr(some, name), getattr(unknown, name)) for name in ("scores", "correct"))
    scores, correct = map(np.concatenate, parts)
    calibration = ExitScores(scores, correct, None, np.concatenate([some.groups, unknown.groups]))
    target = CalibrationTarget(0.1, 0.1, np.arange(1.0, 4.0), groups=1, shared=True)
    first, second = ltt.survivor_fixed_sequence(calibration, tuning, target).thresholds[:2]
    assert 0.3 < first < 0.6
    assert second < 0.1
