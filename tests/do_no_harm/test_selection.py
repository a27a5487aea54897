"""Choice among candidates and tests of other metrics: decisions, and exact error rates."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
import torch

from fedekd.do_no_harm import DoNoHarm
from fedekd.do_no_harm.evidence import ClassCounts, Evidence, HeldOut, Labels, labels_of
from fedekd.do_no_harm.power import (
    acceptance_probability,
    deciding_gains,
    deciding_parts,
    estimate_acceptance,
    fewest_samples,
    recall_acceptance,
)
from fedekd.do_no_harm.rule import Comparison
from fedekd.do_no_harm.selection import select_model
from fedekd.errors import UserError
from fedekd.functional import betting_p_value, betting_stake


def held_out(losses, scores=()):
    return HeldOut(torch.tensor(losses, dtype=torch.float64), torch.tensor(scores, dtype=torch.float64))


def outcomes(difference):
    """Losses of a local model and of another one: -1 is worse, 1 is better."""
    local = [1.0 if value > 0 else 0.0 for value in difference]
    return local, [1.0 if value < 0 else 0.0 for value in difference]


def select(rule, local, candidates, labels=None):
    """Return the comparison, and the names of the candidates that were evaluated."""
    seen = []

    def evaluate(name):
        seen.append(name)
        return held_out(candidates[name])

    evaluations = {name: lambda splits, name=name: evaluate(name) for name in candidates}
    comparison = select_model(rule, lambda splits: held_out(local), evaluations, "classification", ("holdout",), labels)
    return comparison, seen


LOCAL = [1.0] * 30 + [0.0] * 30
BETTER, BEST, SAME = [1.0] * 20 + [0.0] * 40, [1.0] * 10 + [0.0] * 50, LOCAL


@pytest.mark.parametrize(
    ("candidates", "deployed", "tested"),
    [
        ({"a": BETTER, "b": BEST}, "b", ["a", "b"]),
        ({"a": BEST, "b": BETTER}, "a", ["a", "b"]),
        ({"a": BETTER, "b": SAME, "c": BEST}, "a", ["a", "b"]),
        ({"a": SAME, "b": BEST}, "local", ["a"]),
        ({"a": BEST, "b": BEST}, "a", ["a", "b"]),
    ],
)
def test_select_model_tests_in_order_and_deploys_the_largest_gain(candidates, deployed, tested):
    comparison, seen = select(DoNoHarm(candidates=tuple(candidates)), LOCAL, candidates)
    assert (comparison.deployed, seen) == (deployed, tested)
    assert [row.name for row in comparison.candidates if row.tested] == tested
    assert [row.name for row in comparison.candidates] == list(candidates)
    assert all(math.isnan(row.p_value) for row in comparison.candidates if not row.tested)
    shown = deployed if deployed != "local" else tested[0]
    [row] = [row for row in comparison.candidates if row.name == shown]
    assert (row.p_value, row.gain) == (comparison.p_value, comparison.gain)


def test_select_model_without_candidates_equals_compare():
    rule = DoNoHarm()
    comparison, _ = select(rule, LOCAL, {"federated": BETTER})
    assert comparison == rule.compare(torch.tensor(LOCAL), torch.tensor(BETTER), "classification")
    assert comparison == Comparison("federated", 60, 0, 10, comparison.gain, comparison.p_value, 0.1)


def test_select_model_rule_better_compares_all_candidates():
    rule = DoNoHarm(rule="better", candidates=("a", "b"))
    comparison, seen = select(rule, LOCAL, {"a": SAME, "b": BETTER})
    assert (comparison.deployed, seen) == ("b", ["a", "b"])


@pytest.mark.parametrize("margin", [0.0, 0.2])
def test_fixed_sequence_exact_error_rate_is_at_most_the_level(margin):
    """All outcomes of two dependent candidates on 5 samples: the probability that a harmful one is deployed."""
    rule, size = DoNoHarm(confidence=0.7, margin=margin, candidates=("a", "b")), 5
    cells = list(product((-1, 0, 1), repeat=2))
    counts = [row for row in product(range(size + 1), repeat=len(cells) - 1) if sum(row) <= size]
    counts = np.array([(*row, size - sum(row)) for row in counts])
    deployed = []
    for row in counts:
        pairs = [cell for cell, count in zip(cells, row, strict=True) for _ in range(count)]
        # Losses of 0, 1 and 2: only their order counts.
        candidates = {name: [1.0 - pair[column] for pair in pairs] for name, column in (("a", 0), ("b", 1))}
        deployed.append(select(rule, [1.0] * size, candidates)[0].deployed)
    ways = np.array([math.factorial(size) / math.prod(map(math.factorial, row)) for row in counts.tolist()])
    generator = np.random.default_rng(0)
    deployed, largest = np.array(deployed), 0.0
    for share, concentration in product((0.0, 0.3, 0.6, 1.0), (0.2, 1.0, 5.0)):
        # `a` and `b` are at the boundary, or one is good; equal ones in some share of the samples.
        for first, second in ((-margin, -margin), (0.6, -margin), (-margin, 0.6)):
            marginals = []
            for mean in (first, second):
                differing = abs(mean) + generator.beta(concentration, 1) * (1 - abs(mean))
                marginals.append([(differing - mean) / 2, 1 - differing, (differing + mean) / 2])
            independent = np.outer(*marginals)
            joint = share * comonotone(*marginals) + (1 - share) * independent
            probabilities = ways * (joint.ravel() ** counts).prod(axis=1)
            assert probabilities.sum() == pytest.approx(1)
            harmful = [name for name, mean in (("a", first), ("b", second)) if mean <= -margin]
            largest = max(largest, float(probabilities[np.isin(deployed, harmful)].sum()))
    assert 0.05 < largest <= rule.level


def comonotone(first, second):
    """Return the joint distribution of two variables that increase together."""
    edges = [np.concatenate([[0.0], np.cumsum(values)]) for values in (first, second)]
    low = np.maximum(edges[0][:-1, None], edges[1][None, :-1])
    high = np.minimum(edges[0][1:, None], edges[1][None, 1:])
    return np.maximum(high - low, 0.0)


@pytest.mark.parametrize("margin", [0.0, 0.2])
def test_recall_exact_error_rate_is_at_most_the_level(margin):
    """All outcomes of two classes of 5 samples; class 0 is at the boundary, class 1 anywhere."""
    rule, size = DoNoHarm(confidence=0.7, margin=margin, metric="recall"), 5
    rows = [(b, c, size - b - c) for b in range(size + 1) for c in range(size + 1 - b)]
    labels = Labels(torch.tensor([0] * size + [1] * size), (0, 1))
    accepted = np.zeros((len(rows), len(rows)))
    for (i, first), (j, second) in product(enumerate(rows), repeat=2):
        difference = [value for b, c, same in (first, second) for value in [-1] * b + [1] * c + [0] * same]
        local, other = map(held_out, outcomes(difference))
        evidence = rule.evidence(local, other, labels)
        accepted[i, j] = evidence.p_value <= rule.level
        assert evidence.gain == min(first[1] - first[0], second[1] - second[0]) / size
        assert evidence.p_value == max(rule.p_value(*row[:2], size) for row in (first, second))

    def distribution(mean, differing):
        p = [(differing - mean) / 2, (differing + mean) / 2, 1 - differing]
        ways = np.array([math.factorial(size) / math.prod(map(math.factorial, row)) for row in rows])
        return np.array(
            [w * math.prod(x**k for x, k in zip(p, row, strict=True)) for w, row in zip(ways, rows, strict=True)]
        )

    rates = [
        float(distribution(-margin, differing) @ accepted @ distribution(gain, abs(gain)))
        for differing in np.linspace(max(margin, 0.01), 1, 15)
        for gain in (-margin, 0.0, 0.5, 1.0)
    ]
    assert 0.05 < max(rates) <= rule.level
    # The exact power is a product over the classes.
    power = recall_acceptance(rule, [0.5, 0.8], [0.6, 0.8], [size, size])
    assert power == pytest.approx(float(distribution(0.5, 0.6) @ accepted @ distribution(0.8, 0.8)), abs=1e-6)


@pytest.mark.parametrize("metric", ["recall", "balanced_accuracy"])
def test_metric_with_a_missing_class_deploys_local_model(metric):
    labels = labels_of(torch.tensor([0] * 60), torch.tensor([0, 1]))
    assert labels.classes == (0, 1)
    comparison, _ = select(DoNoHarm(metric=metric), LOCAL, {"federated": BEST}, labels)
    assert (comparison.deployed, comparison.p_value) == ("local", 1)
    comparison, _ = select(
        DoNoHarm(metric=metric), LOCAL, {"federated": BEST}, labels_of(labels.targets, labels.targets)
    )
    assert comparison.deployed == "federated"


def test_balanced_accuracy_gain_is_the_mean_of_the_classes():
    # Class 0: 2 of 40 better; class 1: 10 of 20 better.
    local, other = outcomes([1] * 2 + [0] * 38 + [1] * 10 + [0] * 10)
    labels = Labels(torch.tensor([0] * 40 + [1] * 20), (0, 1))
    evidence = DoNoHarm(metric="balanced_accuracy").evidence(held_out(local), held_out(other), labels)
    assert evidence.gain == pytest.approx((2 / 40 + 10 / 20) / 2)
    assert len(evidence.gains) == 20
    assert np.mean(evidence.gains) == pytest.approx(evidence.gain)


@pytest.mark.parametrize("metric", ["auroc", "auroc_delong"])
def test_auroc_compares_scores_and_not_classes(metric):
    generator = torch.Generator().manual_seed(0)
    targets = torch.arange(200) % 2
    noise = torch.randn(2, 200, generator=generator, dtype=torch.float64)
    weak, strong = 0.3 * targets + noise[0], 2.0 * targets + noise[1]
    rule, labels = DoNoHarm(metric=metric), Labels(targets, (0, 1))
    same = torch.zeros(200)
    better = rule.decide(rule.evidence(HeldOut(same, weak), HeldOut(same, strong), labels))
    worse = rule.decide(rule.evidence(HeldOut(same, strong), HeldOut(same, weak), labels))
    assert (better.deployed, worse.deployed) == ("federated", "local")
    assert better.samples == (100 if metric == "auroc" else 200)
    assert better.gain == pytest.approx(-worse.gain)
    if metric == "auroc":
        assert better.p_value == rule.p_value(better.worse, better.better, 100)


@pytest.mark.parametrize("metric", ["auroc", "auroc_delong"])
def test_auroc_of_several_classes_compares_the_classes_of_the_client(metric):
    generator = torch.Generator().manual_seed(0)
    targets = torch.tensor([0, 2, 3]).repeat(60)  # of 5 classes
    is_target, noise = torch.nn.functional.one_hot(targets, 5), torch.randn(2, 180, 5, generator=generator).double()
    weak, strong = 0.3 * is_target + noise[0], 2.0 * is_target + noise[1]
    rule, labels, same = DoNoHarm(metric=metric), Labels(targets, (0, 2, 3)), torch.zeros(180)
    better = rule.evidence(HeldOut(same, weak), HeldOut(same, strong), labels)
    worse = rule.evidence(HeldOut(same, strong), HeldOut(same, weak), labels)
    assert (rule.decide(better).deployed, rule.decide(worse).deployed) == ("federated", "local")
    assert better.samples == (60 if metric == "auroc" else 180)
    assert better.gain == pytest.approx(-worse.gain)
    assert better.worse < better.better
    missing = rule.evidence(HeldOut(same, weak), HeldOut(same, strong), Labels(targets, (0, 1, 2, 3)))
    assert (missing.gain, missing.p_value, missing.gains) == (0, 1, ())


def test_auroc_of_a_federated_model_without_finite_outputs_is_refused():
    """All samples rank wrong; the shares of these classes add up to more than 1 by a rounding error."""
    targets = torch.tensor([0] * 3 + [1] * 26 + [2] * 56)
    is_target = torch.nn.functional.one_hot(targets, 3).bool()
    perfect, wrong = is_target.double(), torch.where(is_target, -torch.inf, torch.inf).double()
    rule, labels, same = DoNoHarm(metric="auroc"), Labels(targets, (0, 1, 2)), torch.zeros(85)
    evidence = rule.evidence(HeldOut(same, perfect), HeldOut(same, wrong), labels)
    assert (evidence.gain, evidence.p_value) == (pytest.approx(-1), 1)
    assert set(evidence.gains) == {-1.0}
    assert rule.evidence(HeldOut(same, wrong), HeldOut(same, perfect), labels).gain == pytest.approx(1)


def test_deciding_samples_of_auroc_count_samples_and_not_sets():
    generator = torch.Generator().manual_seed(2)
    targets = torch.tensor([0, 1, 2]).repeat(20)
    is_target, noise = torch.nn.functional.one_hot(targets, 3), torch.randn(2, 60, 3, generator=generator).double()
    labels, same = Labels(targets, (0, 1, 2)), torch.zeros(60)
    local, other = (HeldOut(same, size * is_target + part) for size, part in zip((0.3, 1.8), noise, strict=True))
    rule, splits = DoNoHarm(metric="auroc", confidence=0.999999), ("holdout",)
    comparison = select_model(rule, lambda _: local, {"federated": lambda _: other}, "classification", splits, labels)
    sets = deciding_gains(rule, rule.evidence(local, other, labels).gains)
    assert comparison.deciding == 3 * sets > 60


def test_deciding_samples_of_metrics_accept_at_the_observed_rates():
    difference = [1] * 3 + [0] * 27 + [1] * 2 + [0] * 28
    labels = Labels(torch.tensor([0] * 30 + [1] * 30), (0, 1))
    for metric in ("recall", "balanced_accuracy"):
        rule = DoNoHarm(metric=metric)
        local, other = outcomes(difference)
        comparison, _ = select(rule, local, {"federated": other}, labels)
        assert comparison.deployed == "local"
        times = math.ceil(comparison.deciding / 60)
        assert 1 < times < 20
        many = Labels(torch.tensor([0] * 30 * times + [1] * 30 * times), (0, 1))
        repeated = [value for part in (difference[:30], difference[30:]) for value in part * times]
        local, other = outcomes(repeated)
        assert select(rule, local, {"federated": other}, many)[0].deployed == "federated"


def test_fewest_samples_of_a_class_can_accept():
    for metric in ("recall", "balanced_accuracy"):
        rule = DoNoHarm(metric=metric, confidence=0.95)
        fewest = fewest_samples(rule)
        for size, expected in ((fewest, "federated"), (fewest - 1, "local")):
            labels = Labels(torch.tensor([0] * size + [1] * size), (0, 1))
            assert select(rule, [1.0] * 2 * size, {"a": [0.0] * 2 * size}, labels)[0].deployed == expected


@pytest.mark.parametrize("classes", [1, 2, 10])
def test_deciding_parts_of_recall_accept_in_half_of_the_draws(classes):
    rule, part = DoNoHarm(metric="recall", margin=0.02), ClassCounts(worse=1, better=3, samples=40)
    evidence = Evidence(40 * classes, classes, 3 * classes, 0.05, 0.5, parts=(part,) * classes)
    samples = deciding_parts(rule, evidence) // classes
    power = recall_acceptance(rule, [2 / 40] * classes, [4 / 40] * classes, [samples] * classes)
    assert 0.5 <= power <= 0.85


def test_deciding_parts_of_recall_is_of_the_classes_that_do_not_accept_yet():
    rule = DoNoHarm(metric="recall", margin=0.02)
    parts = (ClassCounts(1, 3, 40), *[ClassCounts(0, 30, 40)] * 9)
    samples = deciding_parts(rule, Evidence(400, 1, 273, 0.05, 0.5, parts=parts))
    assert 400 < samples <= 480


def test_deciding_gains_exceed_the_number_of_rejected_gains():
    """The first of these values accept by themselves."""
    gains = [1.0] * 10 + [-0.2] * 30
    assert DoNoHarm().compare(torch.tensor(gains), torch.zeros(40), "regression").is_local
    assert deciding_gains(DoNoHarm(), gains) > 40


def test_deciding_gains_of_regression_is_the_first_number_that_accepts():
    rule, gains = DoNoHarm(), [0.2, -0.1, 0.0]
    found = deciding_gains(rule, gains)
    for number, is_accepted in ((found, True), (found // 2, False)):
        stake = betting_stake(gains, 0.0, number, rule.level)
        assert (betting_p_value(np.resize(gains, number), 0.0, stake) <= rule.level) == is_accepted
    assert deciding_gains(rule, [-0.1, 0.1]) is None


def test_estimate_acceptance_increases_with_samples_and_is_below_the_level_without_gain():
    rule = DoNoHarm()
    power = [estimate_acceptance(rule, [0.2, -0.1], samples, draws=100) for samples in (20, 60, 200)]
    assert power == sorted(power)
    assert power[-1] > 0.9
    assert estimate_acceptance(rule, [0.1, -0.1], 200, draws=100) <= rule.level + 3 * math.sqrt(0.09 / 100)
    assert acceptance_probability(rule, 0.0, 0.1, 100) <= rule.level


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"metric": "f1"}, "do_no_harm.metric: expected one of accuracy, balanced_accuracy, recall"),
        ({"candidates": ("a", "a")}, "do_no_harm.candidates: expected different names"),
        ({"candidates": "a"}, "do_no_harm.candidates: expected different names"),
    ],
)
def test_rule_invalid_candidates_or_metric_raise_one_line_error(arguments, words):
    with pytest.raises(UserError) as error:
        DoNoHarm(**arguments)
    assert words in str(error.value)
    assert "\n" not in str(error.value)
