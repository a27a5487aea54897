"""Gaussian mechanism: clipping, noise, and what it leaves unchanged."""

from __future__ import annotations

import math
import os

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import kstest, norm

from fedekd.errors import UserError
from fedekd.methods import ClientUpdate
from fedekd.privacy import GaussianMechanism

RECEIVED = {"a": torch.linspace(-1, 1, 6).reshape(2, 3), "b": torch.ones(4, dtype=torch.float64)}


def update_of(change: float) -> ClientUpdate:
    return ClientUpdate(3, {name: tensor + change for name, tensor in RECEIVED.items()}, 17)


def flat(state: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([state[name].double().flatten() for name in RECEIVED])


@given(st.floats(0.01, 5), st.floats(0.01, 5))
def test_randomise_without_noise_clips_to_the_norm(change: float, bound: float) -> None:
    update = update_of(change)
    sent = GaussianMechanism(0.0, bound).randomise(update, RECEIVED, seed=0)
    before, after = (flat(state) - flat(RECEIVED) for state in (update.state, sent.state))
    scale = min(1.0, bound / math.sqrt(sum(value**2 for value in before.tolist())))
    torch.testing.assert_close(after, before * scale, rtol=0, atol=2e-6)
    assert (sent.client, sent.num_samples) == (3, 17)
    assert {name: tensor.dtype for name, tensor in sent.state.items()} == {"a": torch.float32, "b": torch.float64}


def test_randomise_leaves_the_given_update_unchanged() -> None:
    update, received = update_of(0.5), {name: tensor.clone() for name, tensor in RECEIVED.items()}
    GaussianMechanism(1.0, 0.1).randomise(update, received, seed=0)
    torch.testing.assert_close(flat(dict(update.state)), flat(RECEIVED) + 0.5)
    assert torch.equal(flat(received), flat(RECEIVED))


@pytest.mark.parametrize("seed", [5, None])
def test_noise_is_normal_with_the_stated_deviation(seed: int | None) -> None:
    received = {"a": torch.zeros(40_000, dtype=torch.float64), "b": torch.zeros(200, 200, dtype=torch.float64)}
    sent = GaussianMechanism(3.0, 0.5).randomise(ClientUpdate(0, received, 1), received, seed)
    noise = np.concatenate([tensor.numpy().ravel() for tensor in sent.state.values()]) / 1.5
    assert noise.std() == pytest.approx(1.0, abs=0.02)
    assert kstest(noise, "norm").pvalue > 1e-4
    parts = noise[:40_000], noise[40_000:]
    assert abs(np.corrcoef(*parts)[0, 1]) < 0.03
    assert not set(parts[0]) & set(parts[1])


def test_noise_repeats_with_a_seed_only() -> None:
    mechanism = GaussianMechanism()
    draws = [flat(dict(mechanism.randomise(update_of(0), RECEIVED, seed).state)) for seed in (1, 1, 2, None, None)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert not torch.equal(draws[3], draws[4])


def test_noise_without_seed_is_from_the_operating_system(monkeypatch: pytest.MonkeyPatch) -> None:
    """A generator of NumPy or PyTorch can be predicted from what it has drawn."""
    sizes = []

    def urandom(size: int) -> bytes:
        sizes.append(size)
        return bytes(size)

    monkeypatch.setattr(os, "urandom", urandom)
    sent = GaussianMechanism(1.0, 1.0).randomise(update_of(0), RECEIVED, None)
    assert sizes == [8 * 10]
    torch.testing.assert_close(
        flat(dict(sent.state)) - flat(RECEIVED), torch.full((10,), float(norm.ppf(2.0**-54)), dtype=torch.float64)
    )


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_change_that_is_not_finite_counts_as_zero(value: float) -> None:
    update = update_of(0.5)
    update.state["a"][0, 1] = value  # type: ignore[index]
    mechanism = GaussianMechanism(1.0, 1.0)
    sent, plain = (flat(dict(mechanism.randomise(u, RECEIVED, 0).state)) for u in (update, update_of(0)))
    torch.testing.assert_close(sent, plain)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise_multiplier": -1.0}, r"privacy\.noise_multiplier: expected a finite number of at least 0, got -1\.0"),
        ({"noise_multiplier": math.inf}, r"privacy\.noise_multiplier"),
        ({"clipping_norm": 0.0}, r"privacy\.clipping_norm: expected a finite number above 0, got 0\.0"),
        ({"delta": 1.0}, r"privacy\.delta: expected a probability in \(0, 1\), got 1\.0"),
    ],
)
def test_mechanism_invalid_option_raises(options: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        GaussianMechanism(**options)


def test_require_supported_names_method_and_tensors() -> None:
    mechanism = GaussianMechanism()
    mechanism.require_supported(RECEIVED, "FedeKD")
    with pytest.raises(UserError, match="privacy: expected a method whose clients send tensors, got 'Local'"):
        mechanism.require_supported({}, "Local")
    with pytest.raises(UserError, match=r"floating-point tensors, got 'bn\.num_batches_tracked'"):
        mechanism.require_supported({**RECEIVED, "bn.num_batches_tracked": torch.tensor(3)}, "FedeKD")


def test_require_supported_names_batch_norm_as_an_example_only() -> None:
    """Messages of other methods have integers of other origin."""
    with pytest.raises(UserError, match=r"without integers in the message \(BatchNorm, for example, counts"):
        GaussianMechanism().require_supported({**RECEIVED, "shape": torch.tensor([3, 4])}, "CAFEDistill")
