"""E-processes: literal references, and the supermartingale property by enumeration of all outcomes."""

from __future__ import annotations

import math
from itertools import permutations, product
from types import SimpleNamespace

import numpy as np
import pytest

from fedekd.functional import (
    betting_e_process,
    conformal_ranks,
    error_payoffs,
    first_alarm,
    loss_payoffs,
    rank_e_process,
)
from fedekd.functional.e_process import BLOCK, LARGEST, STAKES

TOLERANCE = 1e-12  # relative, of products of 9 factors in float64


def literal_e_process(payoffs: list[float], block: int) -> list[float]:
    """The formula of the docstring, term by term; starts after the stream have the product 1."""
    values = []
    for t in range(len(payoffs)):
        total = 0.0
        for stake in STAKES.tolist():
            started = 0.0
            for b in range(t // block + 1):
                weight = 1 / ((b + 1) * (b + 2))
                started += weight
                total += weight * math.prod(1 + stake * g for g in payoffs[b * block : t + 1])
            total += 1 - started
        values.append(total / len(STAKES))
    return values


@pytest.mark.parametrize("block", [1, 3, 32])
def test_betting_e_process_equals_literal_reference(block: int) -> None:
    rng = np.random.default_rng(block)
    streams = [error_payoffs(rng.uniform(size=40) < 0.2, 0.1), loss_payoffs(rng.integers(-1, 2, 40), 0.02)]
    expected = np.array([literal_e_process(stream.tolist(), block) for stream in streams])
    for stream, values in zip(streams, expected, strict=True):
        np.testing.assert_allclose(betting_e_process(stream, block), values, rtol=1e-10)
    both = betting_e_process(np.stack(streams, axis=1), block)
    np.testing.assert_allclose(both, expected.T, rtol=1e-10)


def _every_stream(outcomes: tuple[float, ...], length: int) -> np.ndarray:
    """All streams of outcomes, shape (length, number); the last sample changes first."""
    return np.array(list(product(outcomes, repeat=length))).T


def _conditional_means(evidence: np.ndarray, chances: np.ndarray, outcomes: int) -> list[np.ndarray]:
    """By sample, the mean of the next evidence over the evidence, minus 1, for each prefix."""
    length = len(evidence)
    changes = []
    for t in range(length):
        step = outcomes ** (length - t - 1)  # streams with one prefix of t + 1 samples
        following = evidence[t, ::step].reshape(-1, outcomes) @ chances
        before = np.ones(1) if t == 0 else evidence[t - 1, :: step * outcomes]
        changes.append(following / before - 1)
    return changes


@pytest.mark.parametrize("target_risk", [0.05, 0.3])
def test_error_e_process_every_null_rate_is_supermartingale(target_risk: float) -> None:
    streams = _every_stream((0.0, 1.0), 9)
    evidence = betting_e_process(error_payoffs(streams, target_risk), block=2)
    for rate in np.linspace(0, target_risk, 7):
        for change in _conditional_means(evidence, np.array([1 - rate, rate]), 2):
            assert change.max() <= TOLERANCE
        chances = np.prod(np.where(streams == 1, rate, 1 - rate), axis=0)
        assert evidence[-1] @ chances <= 1 + TOLERANCE
        for level in (0.5, 0.1):  # Ville
            assert (evidence.max(axis=0) >= 1 / level) @ chances <= level + TOLERANCE
    beyond = np.array([0.9 - target_risk, 0.1 + target_risk])
    assert _conditional_means(evidence, beyond, 2)[0].max() > 0.01  # the check can fail


@pytest.mark.parametrize("margin", [0.0, 0.1])
def test_loss_e_process_every_null_rate_is_supermartingale(margin: float) -> None:
    evidence = betting_e_process(loss_payoffs(_every_stream((-1.0, 0.0, 1.0), 6), margin), block=2)
    for worse, share in product(np.linspace(0, 1, 11), np.linspace(0, 1, 11)):
        better = share * (1 - worse)
        if worse - better > margin:
            continue
        chances = np.array([better, 1 - worse - better, worse])
        assert max(change.max() for change in _conditional_means(evidence, chances, 3)) <= TOLERANCE


def test_rank_e_process_mean_over_permutations_is_one() -> None:
    """The evidence is linear in each uniform number, so 1/2 stands for its mean; the sample has ties."""
    sample = [0.1, 0.4, 0.4, 0.7, 0.7, 0.9, 0.2]
    orders = [list(order) for order in permutations(sample)]
    ranks = np.stack([conformal_ranks(order[:3], order[3:], [0.5] * 4) for order in orders], axis=1)
    np.testing.assert_allclose(rank_e_process(ranks, block=2).mean(axis=1), 1.0, rtol=1e-12)


def test_conformal_ranks_equal_literal_counts() -> None:
    rng = np.random.default_rng(3)
    reference, values, uniforms = rng.integers(0, 9, 20), rng.integers(0, 9, 30), rng.uniform(size=30)
    ranks = conformal_ranks(reference, values, uniforms)
    for t, value in enumerate(values):
        seen = [*reference.tolist(), *values[: t + 1].tolist()]
        below, equal = sum(z < value for z in seen), sum(z == value for z in seen)
        assert ranks[t] == pytest.approx((below + uniforms[t] * equal) / len(seen), abs=1e-15)


def test_conformal_ranks_equal_those_of_mapie() -> None:
    """MAPIE counts larger scores: of the negative values, these are the smaller values."""
    martingales = pytest.importorskip("mapie.exchangeability_testing.martingales")
    rng = np.random.default_rng(4)
    reference, values, uniforms = rng.integers(0, 9, 20), rng.integers(0, 9, 30), rng.uniform(size=30)
    peer = SimpleNamespace(rng=SimpleNamespace(uniform=iter(uniforms).__next__))
    expected = [
        martingales.OnlineMartingaleTest.compute_p_value(peer, -value, -np.r_[reference, values[:t]])
        for t, value in enumerate(values)
    ]
    np.testing.assert_allclose(conformal_ranks(reference, values, uniforms), expected, rtol=1e-15)


def test_betting_e_process_prefix_equals_shorter_stream() -> None:
    payoffs = error_payoffs(np.random.default_rng(0).uniform(size=200) < 0.3, 0.2)
    whole = betting_e_process(payoffs)
    for length in (0, 1, 31, 32, 33, 150):
        assert betting_e_process(payoffs[:length]).tobytes() == whole[:length].tobytes()


def test_betting_e_process_late_change_is_found_and_bounded() -> None:
    errors = np.r_[np.zeros(2000), np.ones(2000)]
    evidence = betting_e_process(error_payoffs(errors, 0.1))
    found = first_alarm(evidence, 0.01)
    assert found is not None
    assert 2000 <= found < 2000 + BLOCK
    assert 1e99 < evidence.max() <= LARGEST
    assert first_alarm(evidence[:2000], 0.9) is None


@pytest.mark.parametrize("payoffs", [[-1.5], [math.nan], [[[0.0]]]])
def test_betting_e_process_invalid_payoffs_raise_error(payoffs: list[float]) -> None:
    with pytest.raises(ValueError, match="payoffs: expected"):
        betting_e_process(payoffs)
    with pytest.raises(ValueError, match="block: expected"):
        betting_e_process([0.0], block=0)
