"""Do no harm: what a rule refuses, how it decides, and that over 2,000 federations it errs no more than delta."""

from __future__ import annotations

import math
from functools import cache
from itertools import permutations

import numpy as np
import pytest
import torch
from scipy.stats import binom

from fedekd.do_no_harm import DoNoHarm
from fedekd.errors import UserError
from fedekd.functional import betting_p_value, paired_p_value
from fedekd.functional.binomial import clopper_pearson

DELTA = 0.1
FEDERATIONS = 2000


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        *[
            ({"confidence": bad}, rf"do_no_harm\.confidence is {bad}, and must be in \(0, 1\)")
            for bad in (0, 1, -0.1, math.nan)
        ],
        *[({"margin": bad}, rf"do_no_harm\.margin is {bad}, and must be at least 0") for bad in (-0.1, math.nan)],
        ({"rule": "beter"}, r"do_no_harm\.rule is 'beter', which is not known; did you mean 'better'"),
        *[({"looks": bad}, rf"do_no_harm\.looks is {bad}, and must be at least 1") for bad in (0, -1)],
        *[({"clip": bad}, rf"do_no_harm\.clip is {bad}, and must be a finite") for bad in (0, -1, math.nan, math.inf)],
        ({"margin": 0.5, "clip": 0.5}, r"do_no_harm\.margin is 0\.5, and must be below do_no_harm\.clip, 0\.5"),
    ],
)
def test_what_makes_no_sense_is_told_in_one_line(arguments, words):
    with pytest.raises(UserError, match=words) as told:
        DoNoHarm(**arguments)
    assert "\n" not in str(told.value)


def test_looks_are_spread_evenly_and_the_last_is_the_end():
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
    """Losses of the local and of the federated model, from (local, federated, how often)."""
    pairs = torch.tensor([pair for *pair, _ in parts], dtype=torch.float64).reshape(-1, 2)
    return pairs.repeat_interleave(torch.tensor([times for *_, times in parts], dtype=torch.int64), dim=0).unbind(1)


@pytest.mark.parametrize("margin", [0.0, 0.02])
def test_of_classes_the_counts_decide(margin):
    rule = DoNoHarm(0.9, margin, looks=2)
    pair = losses((0, 1, 2), (1, 0, 9), (0, 0, 150), (1, 1, 39))
    found = rule.compare(*pair, "classification")
    assert (found.worse, found.better, found.samples) == (2, 9, 200)
    assert found.gain == pytest.approx(7 / 200)
    assert found.level == 0.05
    assert found.p_value == paired_p_value(2, 9, 200, margin, 0.005)
    assert found.deployed == "federated"
    assert rule.compare(*reversed(pair), "classification").deployed == "local"
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    assert rule.compare(pair[0][order].float(), pair[1][order].float(), "classification") == found


def test_the_level_itself_is_enough_and_no_more():
    half = losses((1, 0, 1), (0, 0, 5))  # p = 1/2
    assert DoNoHarm(0.5).compare(*half, "classification").deployed == "federated"
    assert DoNoHarm(0.5001).compare(*half, "classification").deployed == "local"
    assert DoNoHarm(0.5, looks=2).compare(*half, "classification").deployed == "local"


def test_of_numbers_the_clipped_differences_decide():
    generator = torch.Generator().manual_seed(1)
    local, federated = (5 * torch.rand(120, generator=generator, dtype=torch.float64) for _ in range(2))
    rule = DoNoHarm(0.9, margin=0.2, clip=2.0)
    found = rule.compare(local, federated, "regression")
    gains = [max(-2.0, min(2.0, a - b)) / 2 for a, b in zip(local.tolist(), federated.tolist(), strict=True)]
    assert 0.01 < found.p_value < 0.99
    assert found.p_value == pytest.approx(betting_p_value(gains, 0.1), rel=1e-12)
    assert (found.worse, found.better, found.samples) == (0, 0, 120)
    assert found.gain == pytest.approx(float((local - federated).mean()))  # told as it is
    assert found.deployed == ("federated" if found.p_value <= 0.1 else "local")


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_the_better_one_by_its_loss_promises_nothing(task):
    rule = DoNoHarm(rule="better", margin=0.4)
    better = losses((1, 0, 3), (0, 1, 2))
    for pair, kept in ((better, "federated"), (tuple(reversed(better)), "local"), (losses((0, 0, 9)), "local")):
        found = rule.compare(*pair, task)
        assert found.deployed == kept
        assert math.isnan(found.p_value)
        assert math.isnan(found.level)
    found = rule.compare(*better, task)
    assert (found.worse, found.better) == ((2, 3) if task == "classification" else (0, 0))
    assert (rule.split, DoNoHarm().split) == ("tuning", "holdout")


@pytest.mark.parametrize("task", ["classification", "regression"])
@pytest.mark.parametrize("keep", ["certified", "better"])
def test_ties_and_no_samples_keep_the_local_model(keep, task):
    for pair in (losses(), losses((0, 0, 500)), losses((1, 1, 40), (0, 0, 40))):
        assert DoNoHarm(0.001, rule=keep).compare(*pair, task).deployed == "local"


@pytest.mark.parametrize("keep", ["certified", "better"])
@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_model_without_finite_outputs_is_never_certified(keep, bad):
    rule = DoNoHarm(0.001, rule=keep)
    for pair in (losses((1, bad, 50)), losses((bad, bad, 50)), losses((9, 0, 50), (9, bad, 60))):
        assert rule.compare(*pair, "regression").deployed == "local"
    if bad == math.inf:  # but it may be left for one that has not diverged
        assert rule.compare(*losses((bad, 1, 50)), "regression").deployed == "federated"


def test_a_sample_that_both_lose_beyond_measure_counts_against_the_federated_model():
    found = DoNoHarm().compare(*losses((math.inf, math.inf, 3), (2, 1.5, 40)), "regression")
    assert found.p_value == pytest.approx(betting_p_value([-1.0] * 3 + [0.5] * 40))


@pytest.mark.parametrize("shapes", [((3,), (4,)), ((3, 1), (3, 1)), ((), ())])
def test_losses_must_be_one_a_sample(shapes):
    with pytest.raises(ValueError, match="one shape"):
        DoNoHarm().compare(torch.zeros(shapes[0]), torch.zeros(shapes[1]), "classification")


@cache
def takes(rule: DoNoHarm, worse: int, better: int, samples: int) -> bool:
    """Whether the federated model is taken, which of classes the counts alone decide."""
    pair = losses((0, 1, worse), (1, 0, better), (0, 0, samples - worse - better))
    return rule.compare(*pair, "classification").deployed == "federated"


def decisions(rule: DoNoHarm, counts: np.ndarray) -> np.ndarray:
    """Of (worse, better, neither), (..., 3): whether it takes the federated model, (...)."""
    flat = [takes(rule, b, c, b + c + rest) for b, c, rest in counts.reshape(-1, 3).tolist()]
    return np.array(flat).reshape(counts.shape[:-1])


def agrees(errors: np.ndarray, delta: float = DELTA) -> bool:
    """Whether so many errors agree with a probability of at most delta."""
    return clopper_pearson(int(errors.sum()), errors.size)[0] <= delta


@pytest.mark.parametrize("margin", [0.0, 0.02, 0.05])
@pytest.mark.parametrize(("samples", "differing"), [(60, 0.06), (60, 0.3), (400, 0.02), (400, 0.3), (2300, 0.05)])
def test_at_the_boundary_no_client_errs_more_than_delta(samples, margin, differing):
    """Three clients of every federation, whose federated model is worse by exactly the margin."""
    differing = max(differing, margin)
    worse, better = (differing + margin) / 2, (differing - margin) / 2
    rng = np.random.default_rng(samples)
    counts = rng.multinomial(samples, [worse, better, 1 - differing], size=(FEDERATIONS, 3))
    found = decisions(DoNoHarm(1 - DELTA, margin), counts)
    assert all(agrees(found[:, client]) for client in range(3))
    if margin == 0 and samples * differing > 40:
        assert found.mean() > 0.05  # nor does it by taking nothing
        assert decisions(DoNoHarm(1 - DELTA, rule="better"), counts).mean() > 4 * DELTA


@cache
def federations(liars: int, samples: int = 200, clients: int = 4, classes: int = 3) -> dict[str, np.ndarray]:
    """Nearest centroids of few samples, and the proxy, everybody's mean, for which liars have permuted their labels.

    Where all lie it is mixed with the local model, or it would be too bad to be a test.

    Returns by name, (federations, clients): the true gain in accuracy, exact since a pool is the population, and the
    counts on each client's own certificate and selection samples, (federations, clients, 3).
    """
    rng = np.random.default_rng(3 + liars)
    labels = np.arange(1500) % classes
    angles = 2 * np.pi * labels / classes
    pool = 1.3 * np.stack([np.cos(angles), np.sin(angles)], 1) + rng.normal(size=(1500, 2))
    mixes = list(permutations(range(classes)))[1:]
    gains, seen = np.empty((FEDERATIONS, clients)), np.empty((2, FEDERATIONS, clients, 3), dtype=int)
    for federation in range(FEDERATIONS):
        train = rng.integers(len(pool) // classes, size=(clients, classes, 5)) * classes + np.arange(classes)[:, None]
        local = pool[train].mean(axis=2)  # (clients, classes, 2)
        proxies = local.copy()
        for liar in range(liars):
            proxies[liar] = local[liar][list(mixes[rng.integers(len(mixes))])]
        trust = 0.5 if liars == clients else 1.0
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


@pytest.mark.parametrize("margin", [0.0, 0.03])
@pytest.mark.parametrize("liars", [1, 4])
def test_a_proxy_of_permuted_labels_is_taken_no_more_often_than_delta(liars, margin):
    drawn = federations(liars)
    found = decisions(DoNoHarm(1 - DELTA, margin), drawn["holdout"])
    harmed = drawn["gain"] <= -margin
    for client in range(4):
        assert harmed[:, client].sum() > 200
        assert agrees(found[:, client][harmed[:, client]])  # among those whom it would harm: more than is promised


def test_honest_proxies_are_taken_and_the_better_one_breaks_the_promise():
    honest, one = federations(0), federations(1)
    assert decisions(DoNoHarm(1 - DELTA), honest["holdout"])[honest["gain"] > 0.05].mean() > 0.5
    harmed = one["gain"] <= 0
    by_loss = decisions(DoNoHarm(rule="better"), one["tuning"])[harmed]
    assert not agrees(by_loss)
    assert by_loss.mean() > 2 * decisions(DoNoHarm(1 - DELTA), one["holdout"])[harmed].mean()


def test_looks_share_delta_however_they_hang_together():
    """Both models go on from look to look, on one holdout split, always equally good."""
    looks, samples, rng = 5, 150, np.random.default_rng(11)
    shape = (FEDERATIONS, 2, samples)
    right = rng.random(shape) < 0.8
    taken, undivided = np.zeros(FEDERATIONS, dtype=bool), np.zeros(FEDERATIONS, dtype=bool)
    for _ in range(looks):
        b, c = ((right[:, i] & ~right[:, 1 - i]).sum(axis=1) for i in range(2))
        counts = np.stack([b, c, samples - b - c], axis=1)
        taken |= decisions(DoNoHarm(1 - DELTA, looks=looks), counts)
        undivided |= decisions(DoNoHarm(1 - DELTA), counts)
        right = np.where(rng.random(shape) < 0.7, right, rng.random(shape) < 0.8)
    assert agrees(taken)
    assert taken.mean() > 0.02
    assert not agrees(undivided)


@pytest.mark.parametrize("margin", [0.0, 0.1])
def test_of_numbers_no_client_errs_more_than_delta(margin):
    rng = np.random.default_rng(5)
    pool = np.clip(rng.normal(size=5000) ** 2 - rng.normal(size=5000) ** 2, -0.85, 0.85)
    gains = torch.from_numpy(pool - pool.mean() - margin)  # what clipping leaves of the differences
    drawn = torch.from_numpy(rng.integers(5000, size=(FEDERATIONS, 120)))
    rule = DoNoHarm(1 - DELTA, margin)
    found = [rule.compare(2 + gains[draw], torch.full((120,), 2.0), "regression").deployed for draw in drawn]
    assert agrees(np.array(found) == "federated")


@pytest.mark.parametrize(("differing", "power"), [(0.04, 0.427), (0.05, 0.382), (0.06, 0.350)])
def test_what_a_gain_of_half_a_point_needs(differing, power):
    """Of 2,300 samples, as few data sets leave a client: it is seen in two cases of five."""
    samples, rule, gain = 2300, DoNoHarm(1 - DELTA), 0.005
    counts = np.arange(samples + 1)
    differ = binom.pmf(counts, samples, differing)
    found = 0.0
    for of in np.flatnonzero(differ > 1e-5).tolist():
        most = max((b for b in range(of // 2 + 1) if takes(rule, b, of - b, samples)), default=-1)
        found += differ[of] * binom.cdf(most, of, (1 - gain / differing) / 2)
    assert found == pytest.approx(power, abs=0.002)
