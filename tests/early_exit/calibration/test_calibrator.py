"""Calibration rules against slow, literal transcriptions, and invalid input of the calibrator."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from fedekd.early_exit import MODES, ExitPolicy, ExitScores, SelectiveRiskCalibrator
from fedekd.early_exit.calibration.ltt import STEPS, make_plan
from fedekd.early_exit.calibration.ltt_joint import candidate_vectors
from fedekd.early_exit.calibration.risk_curve import risk_curve
from fedekd.early_exit.calibration.types import CalibrationTarget
from fedekd.errors import UserError
from fedekd.functional.binomial import error_p_value

INF = math.inf
rates_strategy = st.tuples(st.sampled_from([0.05, 0.1, 0.2]), st.sampled_from([0.05, 0.1, 0.3]))
seeds = st.integers(0, 10**6)
worlds = st.tuples(seeds, st.integers(1, 4), st.sampled_from([3, 20, 0]))
sizes = st.sampled_from([40, 300, 600])


def draw(of: tuple[int, int, int], seed: int, samples: int) -> ExitScores:
    """Draw samples of a random distribution; scores have `levels` distinct values, or all different for 0."""
    distribution, exits, levels = of
    rng = np.random.default_rng(distribution)
    skill, noise = np.sort(rng.uniform(0.3, 0.95, size=exits)), rng.uniform(0.01, 0.1, size=exits)
    rng = np.random.default_rng((distribution, seed))
    hard = rng.uniform(size=(samples, 1))
    correct = hard + rng.normal(scale=0.05, size=(samples, exits)) < skill
    scores = 1 - hard + noise * rng.normal(size=(samples, exits))
    scores = np.round(scores * (levels - 1)) / (levels - 1) if levels else scores
    confidence = np.clip(scores, 0, 1)
    return ExitScores.from_arrays(scores, correct, np.where(correct, confidence, (1 - confidence) / 2))


def fit(calibration: ExitScores, tuning: ExitScores, target_risk=0.05, delta=0.1, mode="ltt", **options) -> ExitPolicy:
    return SelectiveRiskCalibrator(target_risk, 1 - delta, mode).fit(
        calibration.scores,
        calibration.correct,
        tuning.scores,
        tuning.correct,
        calibration.true_class_probability,
        **options,
    )


def literal_ltt(calibration, grids, delta_e, alpha):
    """Transcribe the pseudocode of ltt.py, sample by sample."""
    alive = list(range(len(calibration)))
    taus, search_bounds = [], []
    for exit_, grid in enumerate(grids):
        tau = search_bound = INF
        for lam in grid:
            search_bound = lam
            exits_here = [i for i in alive if calibration.scores[i, exit_] >= lam]
            wrong = sum(1 for i in exits_here if not calibration.correct[i, exit_])
            if binom.cdf(wrong, len(exits_here), alpha) <= delta_e:
                tau = lam
            else:
                break
        alive = [i for i in alive if calibration.scores[i, exit_] < search_bound]
        taus.append(tau)
        search_bounds.append(search_bound)
    return taus, search_bounds


@given(worlds, seeds, sizes, sizes, rates_strategy)
@settings(max_examples=80)
def test_ltt_thresholds_equal_literal_transcription(of, seed, samples, tuning_samples, rates):
    alpha, delta = rates
    calibration, tuning = draw(of, seed, samples), draw(of, seed + 1, tuning_samples)
    plan = make_plan(tuning, len(calibration), CalibrationTarget(alpha, delta, np.ones(of[1])))
    open_ = sum(len(grid) > 0 for grid in plan.grids)
    assert plan.level == pytest.approx(1 - (1 - delta) ** (1 / open_) if open_ else delta, rel=1e-12)
    taus, search_bounds = literal_ltt(calibration, plan.grids, plan.level, alpha)
    policy = fit(calibration, tuning, alpha, delta)
    assert policy.thresholds == (*taus, -INF)
    assert policy.search_bounds == (*search_bounds, -INF)
    assert all(search_bound <= tau for tau, search_bound in zip(taus, search_bounds, strict=True))
    assert policy.certified == (*(tau < INF for tau in taus), False)


@given(worlds, seeds, sizes, rates_strategy)
@settings(max_examples=60)
def test_make_plan_grid_starts_at_lowest_p_value_and_decreases(of, seed, samples, rates):
    alpha, delta = rates
    tuning = draw(of, seed, samples)
    plan = make_plan(tuning, len(tuning), CalibrationTarget(alpha, delta, np.ones(of[1])))
    assert len(plan.grids) == of[1] - 1
    for exit_, grid in enumerate(plan.grids):
        assert len(grid) <= STEPS
        assert (np.diff(grid) < 0).all()
        assert np.isin(grid, tuning.scores[:, exit_]).all()
        assert plan.required_samples[exit_] is None or not len(grid)
    if plan.grids and len(plan.grids[0]):
        walk = risk_curve(tuning.scores[:, 0], tuning.correct[:, 0])
        p = binom.cdf(walk.errors, walk.samples, alpha)
        assert p.min() <= plan.level
        assert plan.grids[0][0] == walk.thresholds[np.isclose(p, p.min(), rtol=1e-12, atol=0)][0]
        assert plan.grids[0][-1] == tuning.scores[:, 0].min()
        if len(walk.thresholds) <= STEPS and len(walk.thresholds) == walk.samples[-1]:  # no ties: every threshold
            assert plan.grids[0].tolist() == walk.thresholds[walk.thresholds <= plan.grids[0][0]].tolist()


@pytest.mark.parametrize("mode", ["ltt", "ltt_joint"])
def test_fit_thresholds_come_from_the_tuning_plan(mode):
    calibration, tuning = draw((4, 4, 0), 1, 800), draw((4, 4, 0), 2, 600)
    target = CalibrationTarget(0.1, 0.1, np.arange(1.0, 5.0))
    plan = make_plan(tuning, len(calibration), target)
    vectors, _ = candidate_vectors(tuning, len(calibration) / len(tuning), target)
    found, rng = set(), np.random.default_rng(0)
    for extra_errors in np.linspace(0, 0.3, 10):
        correct = calibration.correct & (rng.uniform(size=(800, 4)) >= extra_errors)
        policy = fit(ExitScores(calibration.scores, correct), tuning, 0.1, 0.1, mode)
        found.add(policy.thresholds)
        if mode == "ltt_joint":
            assert policy.thresholds[:-1] in [*vectors, (INF, INF, INF)]
        for exit_ in range(3):
            own = [INF, *plan.grids[exit_]] if mode == "ltt" else [INF, *(vector[exit_] for vector in vectors)]
            assert policy.thresholds[exit_] in own
            assert policy.search_bounds[exit_] in own
    assert len(found) > (2 if mode == "ltt" else 1)


@given(worlds, seeds, sizes, rates_strategy)
@example((11, 3, 0), 1, 200, (0.05, 0.1))  # starts at the second vector; the first would fail
@example((22, 3, 0), 1, 200, (0.1, 0.1))
@settings(max_examples=40)
def test_ltt_joint_thresholds_equal_literal_transcription(of, seed, samples, rates):
    alpha, delta = rates
    calibration, tuning = draw(of, seed, samples), draw(of, seed + 1, 200)
    ratio, cost = samples / 200, [exit_ + 1 for exit_ in range(of[1])]
    vectors, _ = candidate_vectors(tuning, ratio, CalibrationTarget(alpha, delta, np.array(cost)))

    def leaving(data, vector):
        return [next((e for e, t in enumerate(vector) if row[e] >= t), len(vector)) for row in data.scores]

    def p(data, vector, times):
        exits, worst = leaving(data, vector), 0.0
        for exit_ in [e for e, threshold in enumerate(vector) if threshold < INF]:
            those = [i for i, e in enumerate(exits) if e == exit_]
            wrong = sum(not data.correct[i, exit_] for i in those)
            worst = max(worst, float(error_p_value(times * wrong, times * len(those), alpha)))
        return worst

    best, cheapest = (INF,) * (of[1] - 1), INF
    forecasts = [p(tuning, vector, ratio) for vector in vectors]
    begin = max((place for place, each in enumerate(forecasts) if each == min(forecasts)), default=0)
    for vector in vectors[begin:]:
        if p(calibration, vector, 1) > delta:
            break
        mean = sum(cost[exit_] for exit_ in leaving(calibration, vector))
        if mean < cheapest:
            best, cheapest = vector, mean
    assert len(vectors) <= 40
    assert fit(calibration, tuning, alpha, delta, "ltt_joint").thresholds == (*best, -INF)


def literal_crc(calibration, alpha):
    alive, taus = list(range(len(calibration))), []
    for exit_ in range(calibration.num_exits - 1):
        tau = INF
        for lam in sorted({calibration.scores[i, exit_] for i in alive}, reverse=True):
            exits_here = [i for i in alive if calibration.scores[i, exit_] >= lam]
            if len(exits_here) < 60:
                continue
            wrong = sum(1 for i in exits_here if not calibration.correct[i, exit_])
            if (wrong + 1) / (len(exits_here) + 1) > alpha:
                break
            tau = lam
        taus.append(tau)
        alive = [i for i in alive if calibration.scores[i, exit_] < tau]
    return taus


def literal_empirical(calibration, alpha):
    alive, taus = list(range(len(calibration))), []
    for exit_ in range(calibration.num_exits - 1):
        tau = INF
        for lam in sorted({calibration.scores[i, exit_] for i in alive}):
            wrong = [not calibration.correct[i, exit_] for i in alive if calibration.scores[i, exit_] >= lam]
            if sum(wrong) / len(wrong) <= alpha:
                tau = lam
                break
        taus.append(tau)
        alive = [i for i in alive if calibration.scores[i, exit_] < tau]
    return taus


def literal_safekd_code(calibration, alpha):
    n, taus = len(calibration), []
    for exit_ in range(calibration.num_exits - 1):
        level = math.ceil(round((n + 1) * (1 - alpha), 9)) / n
        miss = 1 - calibration.true_class_probability[:, exit_]
        taus.append(INF if level > 1 else 1 - np.quantile(miss, level, method="higher"))
    return taus


@pytest.mark.parametrize(
    ("mode", "literal"), [("crc", literal_crc), ("empirical", literal_empirical), ("safekd_code", literal_safekd_code)]
)
@given(worlds, seeds, sizes, st.sampled_from([0.01, 0.05, 0.1, 0.3]))
@settings(max_examples=40)
def test_baselines_equal_literal_transcriptions(mode, literal, of, seed, samples, alpha):
    calibration = draw(of, seed, samples)
    policy = fit(calibration, draw(of, seed + 1, 30), alpha, 0.1, mode)
    np.testing.assert_allclose(policy.thresholds, (*literal(calibration, alpha), -INF), rtol=1e-15)
    assert policy.search_bounds == policy.thresholds
    assert not any(policy.certified)
    assert policy.required_samples == (None,) * of[1]


@pytest.mark.parametrize(("samples", "threshold"), [(59, INF), (60, 0.5), (61, 0.5)])
def test_crc_fewer_than_60_samples_closes_exit(samples, threshold):
    flawless = np.full((samples, 2), 0.5), np.ones((samples, 2))
    assert SelectiveRiskCalibrator(0.05, mode="crc").fit(*flawless, *flawless).thresholds[0] == threshold


@given(worlds, seeds, sizes, rates_strategy, st.sampled_from(sorted(MODES)))
@settings(max_examples=60)
def test_fit_counts_equal_assigned_samples(of, seed, samples, rates, mode):
    calibration = draw(of, seed, samples)
    policy = fit(calibration, draw(of, seed + 1, 120), *rates, mode)
    exits = policy.assign(calibration.scores)
    assert policy.exit_counts == tuple((exits == e).sum() for e in range(of[1]))
    assert policy.error_counts == tuple((~calibration.correct[exits == e, e]).sum() for e in range(of[1]))
    assert sum(policy.exit_counts) == policy.samples == len(calibration)
    assert policy.tuning_samples == 120
    for exit_ in range(of[1] - 1):
        if mode in ("ltt", "ltt_joint") and policy.certified[exit_]:
            assert binom.cdf(policy.error_counts[exit_], policy.exit_counts[exit_], rates[0]) <= rates[1] + 1e-12
        assert policy.thresholds[exit_] < INF or policy.exit_counts[exit_] == 0


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("exits", [1, 2, 4])
def test_fit_all_correct_opens_and_all_wrong_closes(mode, exits):
    rng = np.random.default_rng(0)
    scores, yes = rng.uniform(0.4, 1, (500, exits)), np.ones((500, exits), bool)
    right = fit(ExitScores.from_arrays(scores, yes, scores), ExitScores.from_arrays(scores, yes), 0.05, 0.1, mode)
    wrong = fit(ExitScores.from_arrays(scores, ~yes, 1 - scores), ExitScores.from_arrays(scores, ~yes), 0.05, 0.1, mode)
    assert wrong.required_samples == right.required_samples == (None,) * exits
    if mode != "safekd_code":
        assert wrong.exit_counts == (*[0] * (exits - 1), 500)
        assert exits == 1 or right.exit_counts[0] > 480
        assert right.error_counts == (0,) * exits


@pytest.mark.parametrize("mode", ["ltt", "ltt_joint"])
@pytest.mark.parametrize(("alpha", "delta"), [(0.01, 0.1), (0.05, 0.1), (0.1, 1 - 0.9 ** (1 / 3)), (0.05, 0.01)])
def test_fit_required_samples_open_a_closed_exit(mode, alpha, delta):
    enough = math.ceil(math.log(delta) / math.log1p(-alpha))  # (1 - alpha)^n <= delta

    def of(n: int) -> ExitPolicy:
        flawless = ExitScores.from_arrays(np.full((n, 2), 0.9), np.ones((n, 2)))
        return fit(flawless, flawless, alpha, delta, mode)

    short = of(enough - 1)
    assert short.thresholds == short.search_bounds == (INF, -INF)
    assert enough <= short.required_samples[0] <= 1.002 * enough + 1
    assert of(enough).thresholds == (0.9, -INF)
    assert of(enough).required_samples == (None, None)


def test_ltt_hopeless_exit_does_not_close_others():
    """Exit 1 cannot pass; exit 2 passes if exit 1 is closed in advance."""
    easy = np.arange(1000) < 100
    scores = np.where(easy, 0.9, 0.1)
    first, second = easy & (np.arange(1000) % 25 != 0), easy
    three = ExitScores.from_arrays(np.stack([scores] * 3, 1), np.stack([first, second, second], 1))
    two = three.scores[:, 1:], three.correct[:, 1:]
    assert SelectiveRiskCalibrator(0.05).fit(*two, *two).thresholds == (0.9, -INF)
    assert fit(three, three).thresholds == (INF, 0.9, -INF)


def test_ltt_tied_scores_exit_together():
    scores = np.repeat([0.9, 0.6, 0.3], [300, 300, 400])
    right = np.ones(1000, bool)
    right[[5, *range(305, 341)]] = False  # 1 of 300, then 37 of 600, and then all
    right[600:] = False
    data = ExitScores.from_arrays(np.stack([scores] * 2, 1), np.stack([right] * 2, 1))
    policy = fit(data, data)
    assert (policy.thresholds[0], policy.exit_counts[0], policy.error_counts[0]) == (0.9, 300, 1)
    assert policy.search_bounds[0] < 0.9
    assert policy.assign(np.array([[0.9, 0.9], [0.6, 0.6], [0.3, 0.3]])).tolist() == [0, 1, 1]


def test_make_plan_few_scores_tests_every_threshold():
    """Threshold 0.6 passes and 0.3 fails."""
    scores, right = np.repeat([0.9, 0.6, 0.3], [300, 300, 400]), np.repeat([True, True, False], [300, 300, 400])
    data = ExitScores.from_arrays(np.stack([scores] * 2, 1), np.stack([right] * 2, 1))
    right[300:325] = False
    tuning = ExitScores.from_arrays(np.stack([scores] * 2, 1), np.stack([right] * 2, 1))
    plan = make_plan(tuning, 1000, CalibrationTarget(0.05, 0.1, np.ones(2)))
    assert plan.grids[0].tolist() == [0.9, 0.6, 0.3]
    assert fit(data, tuning).thresholds == (0.6, -INF)


def with_gradient(array):
    return torch.from_numpy(array).requires_grad_(array.dtype == float)


def test_fit_tensors_arrays_and_lists_give_equal_policies():
    calibration, tuning = draw((4, 4, 0), 1, 300), draw((4, 4, 0), 2, 300)
    parts = (calibration.scores, calibration.correct, tuning.scores, tuning.correct, calibration.true_class_probability)
    for mode in MODES:
        expected = SelectiveRiskCalibrator(0.2, mode=mode).fit(*parts)
        for kind in (
            torch.from_numpy,
            lambda array: array.tolist(),
            lambda array: torch.tensor(array, requires_grad=array.dtype == float),
        ):
            assert SelectiveRiskCalibrator(0.2, mode=mode).fit(*map(kind, parts)) == expected


def test_policy_file_keeps_float32_thresholds():
    calibration, tuning = draw((4, 4, 0), 1, 800), draw((4, 4, 0), 2, 800)
    single = [torch.from_numpy(each.scores).float() for each in (calibration, tuning)]
    policy = SelectiveRiskCalibrator(0.1).fit(single[0], calibration.correct, single[1], tuning.correct)
    assert all(0 < threshold < INF for threshold in policy.thresholds[:3])
    again = ExitPolicy.from_json(policy.to_json())
    assert again == policy
    assert tuple(np.bincount(again.assign(single[0].double().numpy()), minlength=4)) == policy.exit_counts
    assert all(float(np.float32(bound)) == bound for bound in policy.thresholds)
    assert set(json.loads(policy.to_json())["versions"]) == {"fedekd", "torch"}


@pytest.mark.parametrize("value", [0, 0.0, 1, 1.5, -0.1, math.nan, INF])
@pytest.mark.parametrize("name", ["target_risk", "confidence"])
def test_calibrator_rate_outside_unit_interval_raises(name, value):
    with pytest.raises(UserError, match=rf"^{name}: expected a number in \(0, 1\), got {value}") as error:
        SelectiveRiskCalibrator(**{"target_risk": 0.1, "confidence": 0.9, name: value})
    assert "\n" not in str(error.value)


GOOD = {
    "scores": np.ones((4, 2)),
    "correct": np.ones((4, 2)),
    "tuning_scores": np.ones((3, 2)),
    "tuning_correct": np.ones((3, 2)),
}
nan = np.array([[0.5, 0.5], [0.5, math.nan]])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            {"scores": nan, "correct": np.ones((2, 2))},
            "calibration scores: expected finite values, got NaN, first at sample 1, exit 2",
        ),
        ({"tuning_scores": nan, "tuning_correct": np.ones((2, 2))}, "tuning scores: expected finite values, got NaN"),
        ({"scores": np.ones(4)}, r"calibration scores: expected the shape \(samples, exits\), got \(4,\)"),
        ({"scores": np.ones((4, 0)), "correct": np.ones((4, 0))}, r"got \(4, 0\)"),
        ({"scores": np.ones((0, 2)), "correct": np.ones((0, 2))}, "calibration scores: expected at least 1 sample"),
        (
            {"tuning_scores": np.ones((0, 2)), "tuning_correct": np.ones((0, 2))},
            "tuning scores: expected at least 1 sample",
        ),
        ({"correct": np.ones((4, 3))}, r"calibration correct: expected the shape \(4, 2\) of the scores, got \(4, 3\)"),
        ({"correct": np.full((4, 2), 0.5)}, "expected bool, or 0 and 1, got other values"),
        ({"tuning_correct": np.full((3, 2), math.nan)}, "expected bool, or 0 and 1, got other values"),
        (
            {"tuning_scores": np.ones((3, 3)), "tuning_correct": np.ones((3, 3))},
            "tuning scores: expected 2 exits as in calibration, got 3",
        ),
        ({"cost": [1.0]}, r"cost: expected 2 finite numbers, one per exit, got an array \(1,\)"),
        ({"cost": [1.0, math.nan]}, "cost: expected 2 finite numbers"),
        ({"true_class_probability": np.full((4, 2), 1.5)}, "values in 0..1"),
        ({"true_class_probability": np.ones((3, 2))}, r"shape \(4, 2\)"),
    ],
)
def test_fit_invalid_samples_raise_one_line_error(arguments, words):
    with pytest.raises(UserError, match=words) as error:
        SelectiveRiskCalibrator(0.1).fit(**{**GOOD, **arguments})
    assert "\n" not in str(error.value)


def test_calibrator_unknown_mode_or_missing_probability_raises():
    with pytest.raises(UserError, match=r"mode: expected one of ltt, .*, got 'lt'. Did you mean 'ltt'"):
        SelectiveRiskCalibrator(0.1, mode="lt")
    for old, new in (("path", "ltt_joint"), ("released", "safekd_code"), ("plug_in", "empirical")):
        with pytest.raises(UserError, match=f"mode: .*got '{old}'. It was renamed to '{new}'"):
            SelectiveRiskCalibrator(0.1, mode=old)
    with pytest.raises(UserError, match="true_class_probability: expected probabilities for mode 'safekd_code'"):
        SelectiveRiskCalibrator(0.1, mode="safekd_code").fit(**GOOD)


def test_fit_accepts_bfloat16_scores():
    flawless = torch.full((100, 2), 0.5, dtype=torch.bfloat16), torch.ones(100, 2)
    assert SelectiveRiskCalibrator(0.1).fit(*flawless, *flawless).thresholds == (0.5, -INF)


def test_exit_scores_infinite_value_raises():
    scores = np.array([[INF, 0.5]] * 40 + [[0.1, 0.5]] * 40)
    with pytest.raises(UserError, match="expected finite values, got inf"):
        ExitScores.from_arrays(scores, np.zeros((80, 2)))


def test_ltt_single_exit_equals_mapie_fixed_sequence():
    """Cross-check the tests of one exit with MAPIE's control of the family-wise error rate."""
    mapie = pytest.importorskip("mapie.risk_control.fwer_control")
    calibration, tuning = draw((4, 2, 0), 1, 800), draw((4, 2, 0), 2, 600)
    plan = make_plan(tuning, len(calibration), CalibrationTarget(0.1, 0.1, np.ones(2)))
    masks = [calibration.scores[:, 0] >= threshold for threshold in plan.grids[0]]
    p = np.array([error_p_value((m & ~calibration.correct[:, 0]).sum(), m.sum(), 0.1) for m in masks])
    passed = mapie.control_fwer(p, plan.level, fwer_method="fixed_sequence")
    assert 0 < len(passed) < len(p)
    assert fit(calibration, tuning, 0.1, 0.1).thresholds[0] == plan.grids[0][passed[-1]]
