"""Validation, decisions and error rates (over 2,000 simulated federations) of the do-no-harm rule."""

from __future__ import annotations

import math
from functools import cache
from itertools import permutations

import numpy as np
import pytest
import torch
from scipy.stats import binom, multinomial

from fedekd.do_no_harm import DoNoHarm, acceptance_probability, deciding_samples, fewest_samples
from fedekd.errors import UserError
from fedekd.functional import betting_p_value, betting_stake, paired_p_value, unconditional_p_value
from fedekd.functional.binomial import clopper_pearson
from fedekd.functional.paired_tests import paired_p_values
from fedekd.functional.unconditional_test import critical_better_counts

DELTA = 0.1
TESTS = ("sign", "unconditional")
FEDERATIONS = 2000


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        *[
            ({"confidence": bad}, rf"do_no_harm\.confidence: expected a number in \[1e-9, 1 - 1e-9\], got {bad}")
            for bad in (0, 1, -0.1, math.nan)
        ],
        *[({"margin": bad}, rf"do_no_harm\.margin: expected at least 0, got {bad}") for bad in (-0.1, math.nan)],
        ({"test": "exact"}, r"do_no_harm\.test: expected one of .*, got 'exact'"),
        ({"splits": "tuning"}, r"do_no_harm\.splits: expected one of .*, got 'tuning'"),
        ({"rule": "beter"}, r"do_no_harm\.rule: expected one of .*, got 'beter'. Did you mean 'better'"),
        *[({"looks": bad}, rf"do_no_harm\.looks: expected at least 1, got {bad}") for bad in (0, -1)],
        *[
            ({"clip": bad}, rf"do_no_harm\.clip: expected a finite number above 0, got {bad}")
            for bad in (0, -1, math.nan, math.inf)
        ],
        ({"margin": 0.5, "clip": 0.5}, r"do_no_harm\.margin: expected less than do_no_harm\.clip, 0\.5, got 0\.5"),
    ],
)
def test_rule_invalid_argument_raises_one_line_error(arguments, words):
    with pytest.raises(UserError, match=words) as error:
        DoNoHarm(**arguments)
    assert "\n" not in str(error.value)


def test_compares_at_is_evenly_spaced_and_ends_with_last_round():
    for rounds in range(1, 16):
        for looks in range(1, rounds + 1):
            rule = DoNoHarm(looks=looks)
            at = [round_idx for round_idx in range(rounds + 1) if rule.compares_at(round_idx, rounds)]
            distances = np.diff([0, *at])
            assert len(at) == looks
            assert at[-1] == rounds
            assert distances.max() - distances.min() <= 1
            assert rule.level == pytest.approx(DELTA / looks)


def losses(*parts: tuple[float, float, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Create losses of both models from (local, federated, count)."""
    pairs = torch.tensor([pair for *pair, _ in parts], dtype=torch.float64).reshape(-1, 2)
    return pairs.repeat_interleave(torch.tensor([times for *_, times in parts], dtype=torch.int64), dim=0).unbind(1)


@pytest.mark.parametrize("margin", [0.0, 0.02])
@pytest.mark.parametrize(
    ("test", "p_value", "share"), [("sign", paired_p_value, 10), ("unconditional", unconditional_p_value, 100)]
)
def test_compare_classification_depends_on_counts_only(margin, test, p_value, share):
    rule = DoNoHarm(0.9, margin, looks=2, test=test)
    pair = losses((0, 1, 2), (1, 0, 9), (0, 0, 150), (1, 1, 39))
    comparison = rule.compare(*pair, "classification")
    assert (comparison.worse, comparison.better, comparison.samples) == (2, 9, 200)
    assert comparison.gain == pytest.approx(7 / 200)
    assert comparison.level == 0.05
    assert comparison.p_value == p_value(2, 9, 200, margin, 0.05 / share)
    assert comparison.deployed == "federated"
    assert rule.compare(*reversed(pair), "classification").deployed == "local"
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    assert rule.compare(pair[0][order].float(), pair[1][order].float(), "classification") == comparison


def test_compare_p_value_equal_to_level_deploys_federated_model():
    half = losses((1, 0, 1), (0, 0, 5))  # p = 1/2
    assert DoNoHarm(0.5, test="sign").compare(*half, "classification").deployed == "federated"
    assert DoNoHarm(0.5001, test="sign").compare(*half, "classification").deployed == "local"
    assert DoNoHarm(0.5, looks=2, test="sign").compare(*half, "classification").deployed == "local"


def test_compare_regression_depends_on_clipped_differences():
    generator = torch.Generator().manual_seed(1)
    local, federated = (5 * torch.rand(120, generator=generator, dtype=torch.float64) for _ in range(2))
    rule = DoNoHarm(0.9, margin=0.2, clip=2.0)
    comparison = rule.compare(local, federated, "regression")
    gains = [max(-2.0, min(2.0, a - b)) / 2 for a, b in zip(local.tolist(), federated.tolist(), strict=True)]
    assert 0.01 < comparison.p_value < 0.99
    assert comparison.p_value == pytest.approx(betting_p_value(gains, 0.1), rel=1e-12)
    assert (comparison.worse, comparison.better, comparison.samples) == (0, 0, 120)
    assert comparison.gain == pytest.approx(float((local - federated).mean()))  # not clipped
    assert comparison.deployed == ("federated" if comparison.p_value <= 0.1 else "local")


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_compare_better_selects_lower_loss_without_test(task):
    rule = DoNoHarm(rule="better", margin=0.4)
    better = losses((1, 0, 3), (0, 1, 2))
    for pair, kept in ((better, "federated"), (tuple(reversed(better)), "local"), (losses((0, 0, 9)), "local")):
        comparison = rule.compare(*pair, task)
        assert comparison.deployed == kept
        assert math.isnan(comparison.p_value)
        assert math.isnan(comparison.level)
    comparison = rule.compare(*better, task)
    assert (comparison.worse, comparison.better) == ((2, 3) if task == "classification" else (0, 0))


def test_compared_splits_follow_rule_task_and_method():
    assert DoNoHarm(rule="better").compared_splits("classification", ("train",)) == ("tuning",)
    assert DoNoHarm().compared_splits("classification", ("train",)) == ("tuning", "holdout")
    assert DoNoHarm().compared_splits("classification", ("train", "tuning")) == ("holdout",)
    assert DoNoHarm(splits="holdout").compared_splits("classification", ("train",)) == ("holdout",)
    assert DoNoHarm().compared_splits("regression", ("train",)) == ("holdout",)  # the tuning split sets the stake
    assert DoNoHarm(test="sign").compared_splits("regression", ("train",)) == ("tuning", "holdout")


def test_from_stored_rule_without_new_fields_keeps_its_test():
    stored = {"confidence": 0.8, "margin": 0.01, "rule": "certified", "looks": 1, "clip": 1.0}
    assert DoNoHarm.from_stored(stored) == DoNoHarm(0.8, 0.01, test="sign", splits="holdout", unit="sample")
    assert DoNoHarm.from_stored({**stored, "test": "unconditional"}).test == "unconditional"


def test_compare_regression_takes_its_stake_from_tuning_losses():
    generator = torch.Generator().manual_seed(2)
    local, federated, *tuning = (torch.rand(90, generator=generator, dtype=torch.float64) for _ in range(4))
    rule, gains = DoNoHarm(0.9, margin=0.2), (local - federated).numpy()
    stake = betting_stake((tuning[0] - tuning[1]).numpy(), 0.2, 90, rule.level)
    comparison = rule.compare(local, federated, "regression", tuple(tuning))
    assert comparison.p_value == pytest.approx(betting_p_value(gains, 0.2, stake), rel=1e-12)
    mixture = betting_p_value(gains, 0.2)
    empty = torch.zeros(0), torch.zeros(0)
    assert rule.compare(local, federated, "regression", empty).p_value == pytest.approx(mixture)
    sign = DoNoHarm(0.9, margin=0.2, test="sign").compare(local, federated, "regression", tuple(tuning))
    assert sign.p_value == pytest.approx(mixture)


@pytest.mark.parametrize("task", ["classification", "regression"])
@pytest.mark.parametrize("selection_rule", ["certified", "better"])
def test_compare_ties_or_no_samples_deploy_local_model(selection_rule, task):
    for pair in (losses(), losses((0, 0, 500)), losses((1, 1, 40), (0, 0, 40))):
        assert DoNoHarm(0.001, rule=selection_rule).compare(*pair, task).deployed == "local"


@pytest.mark.parametrize("selection_rule", ["certified", "better"])
@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_compare_non_finite_federated_losses_deploy_local_model(selection_rule, bad):
    rule = DoNoHarm(0.001, rule=selection_rule)
    for pair in (losses((1, bad, 50)), losses((bad, bad, 50)), losses((9, 0, 50), (9, bad, 60))):
        assert rule.compare(*pair, "regression").deployed == "local"
    if bad == math.inf:  # a finite federated model replaces a diverged local one
        assert rule.compare(*losses((bad, 1, 50)), "regression").deployed == "federated"


def test_compare_sample_with_both_losses_infinite_counts_as_largest_loss():
    comparison = DoNoHarm().compare(*losses((math.inf, math.inf, 3), (2, 1.5, 40)), "regression")
    assert comparison.p_value == pytest.approx(betting_p_value([-1.0] * 3 + [0.5] * 40))


@pytest.mark.parametrize("shapes", [((3,), (4,)), ((3, 1), (3, 1)), ((), ())])
def test_compare_different_shapes_raise(shapes):
    with pytest.raises(ValueError, match="expected the same shape"):
        DoNoHarm().compare(torch.zeros(shapes[0]), torch.zeros(shapes[1]), "classification")


@cache
def accepted(rule: DoNoHarm, worse: int, samples: int) -> np.ndarray:
    """By the number of better samples."""
    if rule.test == "sign":
        return paired_p_values(worse, samples, rule.margin, rule.nuisance_level) <= rule.level
    critical = critical_better_counts(samples, rule.margin, rule.level, rule.nuisance_level)
    return np.arange(samples - worse + 1) >= critical[worse:]


def decisions(rule: DoNoHarm, counts: np.ndarray) -> np.ndarray:
    """Decide from (worse, better, neither), shape (..., 3), whether the federated model is deployed, shape (...).

    `test_compare_classification_depends_on_counts_only` checks that `compare` uses these p-values.
    """
    flat = counts.reshape(-1, 3)
    if rule.rule == "better":
        return (flat[:, 1] > flat[:, 0]).reshape(counts.shape[:-1])
    found = [accepted(rule, b, b + c + rest)[c] for b, c, rest in flat.tolist()]
    return np.array(found).reshape(counts.shape[:-1])


def agrees(errors: np.ndarray, delta: float = DELTA) -> bool:
    """Check that the error count is consistent with a probability of at most delta."""
    return clopper_pearson(int(errors.sum()), errors.size)[0] <= delta


@pytest.mark.parametrize("margin", [0.0, 0.02, 0.05])
@pytest.mark.parametrize(("samples", "differing"), [(60, 0.06), (60, 0.3), (400, 0.02), (400, 0.3), (2300, 0.05)])
def test_error_rate_at_the_boundary_is_at_most_delta(samples, margin, differing):
    """Simulate three clients per federation whose federated model is worse by exactly the margin."""
    differing = max(differing, margin)
    worse, better = (differing + margin) / 2, (differing - margin) / 2
    rng = np.random.default_rng(samples)
    counts = rng.multinomial(samples, [worse, better, 1 - differing], size=(FEDERATIONS, 3))
    comparison = decisions(DoNoHarm(1 - DELTA, margin), counts)
    assert all(agrees(comparison[:, client]) for client in range(3))
    if margin == 0 and samples * differing > 40:
        assert comparison.mean() > 0.05  # not trivially valid
        assert decisions(DoNoHarm(1 - DELTA, rule="better"), counts).mean() > 4 * DELTA


@cache
def federations(malicious: int, samples: int = 200, clients: int = 4, classes: int = 3) -> dict[str, np.ndarray]:
    """Simulate nearest-centroid models and their mean as proxy; malicious clients permute their labels.

    If all clients are malicious, the proxy is mixed with the local model, otherwise it would be trivially bad.

    Returns:
        The true gain in accuracy, exact because the population is finite, shape (federations, clients), and the counts
        on each client's holdout and tuning samples, shape (federations, clients, 3).
    """
    rng = np.random.default_rng(3 + malicious)
    labels = np.arange(1500) % classes
    angles = 2 * np.pi * labels / classes
    pool = 1.3 * np.stack([np.cos(angles), np.sin(angles)], 1) + rng.normal(size=(1500, 2))
    mixes = list(permutations(range(classes)))[1:]
    gains, seen = np.empty((FEDERATIONS, clients)), np.empty((2, FEDERATIONS, clients, 3), dtype=int)
    for federation in range(FEDERATIONS):
        train = rng.integers(len(pool) // classes, size=(clients, classes, 5)) * classes + np.arange(classes)[:, None]
        local = pool[train].mean(axis=2)  # (clients, classes, 2)
        proxies = local.copy()
        for client_index in range(malicious):
            proxies[client_index] = local[client_index][list(mixes[rng.integers(len(mixes))])]
        trust = 0.5 if malicious == clients else 1.0
        models = np.stack([local, (1 - trust) * local + trust * proxies.mean(axis=0)])
        scores = np.einsum("nd,mkcd->mknc", 2 * pool, models) - (models**2).sum(-1)[:, :, None]
        right = scores.argmax(-1) == labels
        gains[federation] = right[1].mean(-1) - right[0].mean(-1)
        for split in range(2):
            for client in range(clients):
                drawn = right[:, client, rng.integers(len(pool), size=samples)]
                b, c = int((drawn[0] & ~drawn[1]).sum()), int((drawn[1] & ~drawn[0]).sum())
                seen[split, federation, client] = b, c, samples - b - c
    return {"gain": gains, "holdout": seen[0], "tuning": seen[1]}


@pytest.mark.slow
@pytest.mark.parametrize("margin", [0.0, 0.03])
@pytest.mark.parametrize("malicious", [1, 4])
def test_error_rate_with_malicious_proxies_is_at_most_delta(malicious, margin):
    drawn = federations(malicious)
    comparison = decisions(DoNoHarm(1 - DELTA, margin), drawn["holdout"])
    harmed = drawn["gain"] <= -margin
    for client in range(4):
        assert harmed[:, client].sum() > 200
        assert agrees(
            comparison[:, client][harmed[:, client]]
        )  # conditional on harm, which is stronger than the guarantee


@pytest.mark.slow
def test_honest_proxies_are_accepted_and_rule_better_violates_delta():
    honest, one = federations(0), federations(1)
    assert decisions(DoNoHarm(1 - DELTA), honest["holdout"])[honest["gain"] > 0.05].mean() > 0.5
    harmed = one["gain"] <= 0
    by_loss = decisions(DoNoHarm(rule="better"), one["tuning"])[harmed]
    assert not agrees(by_loss)
    assert by_loss.mean() > 2 * decisions(DoNoHarm(1 - DELTA), one["holdout"])[harmed].mean()


def test_error_rate_over_dependent_looks_is_at_most_delta():
    """Simulate two equally accurate models that change from look to look, on one holdout split."""
    looks, samples, rng = 5, 150, np.random.default_rng(11)
    shape = (FEDERATIONS, 2, samples)
    right = rng.random(shape) < 0.8
    accepted, undivided = np.zeros(FEDERATIONS, dtype=bool), np.zeros(FEDERATIONS, dtype=bool)
    for _ in range(looks):
        b, c = ((right[:, i] & ~right[:, 1 - i]).sum(axis=1) for i in range(2))
        counts = np.stack([b, c, samples - b - c], axis=1)
        accepted |= decisions(DoNoHarm(1 - DELTA, looks=looks), counts)
        undivided |= decisions(DoNoHarm(1 - DELTA), counts)
        right = np.where(rng.random(shape) < 0.7, right, rng.random(shape) < 0.8)
    assert agrees(accepted)
    assert accepted.mean() > 0.02
    assert not agrees(undivided)


@pytest.mark.parametrize("margin", [0.0, 0.1])
def test_error_rate_of_regression_is_at_most_delta(margin):
    rng = np.random.default_rng(5)
    pool = np.clip(rng.normal(size=5000) ** 2 - rng.normal(size=5000) ** 2, -0.85, 0.85)
    gains = torch.from_numpy(pool - pool.mean() - margin)  # what clipping leaves of the differences
    drawn = torch.from_numpy(rng.integers(5000, size=(FEDERATIONS, 120)))
    rule = DoNoHarm(1 - DELTA, margin)
    comparison = [rule.compare(2 + gains[draw], torch.full((120,), 2.0), "regression").deployed for draw in drawn]
    assert agrees(np.array(comparison) == "federated")


@pytest.mark.parametrize(("differing", "power"), [(0.04, 0.427), (0.05, 0.382), (0.06, 0.350)])
def test_acceptance_probability_equals_sum_over_differing_samples(differing, power):
    """A gain of 0.5 points on 2,300 samples, as few data sets have per client, is detected in two of five cases."""
    samples, rule, gain = 2300, DoNoHarm(1 - DELTA, test="sign"), 0.005
    differ = binom.pmf(np.arange(samples + 1), samples, differing)
    total = 0.0
    for n in np.flatnonzero(differ > 1e-5).tolist():
        accepted = [b for b in range(n // 2 + 1) if binom.cdf(b, n, 0.5) <= rule.level]
        total += differ[n] * binom.cdf(max(accepted, default=-1), n, (1 - gain / differing) / 2)
    assert total == pytest.approx(power, abs=0.002)
    assert acceptance_probability(rule, gain, differing, samples) == pytest.approx(total, abs=1e-4)


@pytest.mark.parametrize("arguments", [(0.2, 0.1, 10), (0.0, 1.5, 10), (0.0, 0.1, -1)])
def test_acceptance_probability_argument_out_of_range_raises(arguments):
    with pytest.raises(ValueError, match="expected"):
        acceptance_probability(DoNoHarm(), *arguments)


@pytest.mark.parametrize(("margin", "gain"), [(0.0, 0.01), (0.01, 0.0), (0.01, -0.01)])
def test_acceptance_probability_of_unconditional_test_equals_sum_over_outcomes(margin, gain):
    samples, differing, rule = 60, 0.05, DoNoHarm(1 - DELTA, margin)
    worse, better = (differing - gain) / 2, (differing + gain) / 2
    every = [(b, c) for b in range(9) for c in range(10)]
    total = 0.0
    for b, c in every:
        if rule.p_value(b, c, samples) <= rule.level:
            total += multinomial.pmf([b, c, samples - b - c], samples, [worse, better, 1 - differing])
    assert acceptance_probability(rule, gain, differing, samples) == pytest.approx(total, abs=1e-4)
    assert total <= DELTA or gain > -margin


@pytest.mark.parametrize("margin", [0.0, 0.01])
def test_acceptance_probability_of_unconditional_test_is_larger(margin):
    """Figures of the table in docs/explanation/certified_federation.md."""
    power = {test: acceptance_probability(DoNoHarm(margin=margin, test=test), 0.01, 0.05, 300) for test in TESTS}
    assert power["sign"] == pytest.approx({0.0: 0.22, 0.01: 0.35}[margin], abs=0.005)
    assert power["unconditional"] == pytest.approx({0.0: 0.28, 0.01: 0.58}[margin], abs=0.005)


@pytest.mark.parametrize("test", TESTS)
def test_fewest_samples_is_the_first_number_that_can_decide(test):
    for rule in (DoNoHarm(test=test), DoNoHarm(0.99, 0.05, test=test)):
        fewest = fewest_samples(rule)
        assert rule.p_value(0, fewest, fewest) <= rule.level < rule.p_value(0, fewest - 1, fewest - 1)


@pytest.mark.parametrize("test", TESTS)
def test_deciding_samples_accept_at_the_observed_rates(test):
    rule = DoNoHarm(test=test)
    number = deciding_samples(rule, 10, 20, 300)
    assert number is not None
    scaled = [round(count * number / 300) for count in (10, 20)]
    assert rule.p_value(*scaled, number) <= rule.level
    if number > 300:
        assert rule.p_value(10, 20, 300) > rule.level
    assert deciding_samples(rule, 2, 30, 300) == 300
    assert deciding_samples(rule, 6, 4, 300) is None  # no gain
    assert deciding_samples(rule, 0, 0, 20) is None  # without a margin
    more = deciding_samples(DoNoHarm(margin=0.01, test=test), 0, 0, 20)
    assert more is not None
    assert more > 20
