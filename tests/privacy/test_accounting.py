"""Account of epsilon against the definition of differential privacy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm

from fedekd.errors import UserError
from fedekd.privacy import GaussianMechanism, gaussian_epsilon, mean_epsilon, update_epsilon


def literal_delta(epsilon: float, ratio: float) -> float:
    """Smallest delta of a Gaussian mechanism (Balle and Wang 2018, Theorem 8)."""
    shift = 1 / ratio
    return float(norm.cdf(shift / 2 - epsilon / shift) - math.exp(epsilon) * norm.cdf(-shift / 2 - epsilon / shift))


def hockey_stick(epsilon: float, noise: float, distance: float) -> float:
    """max(0, p - e^epsilon q) of two Gaussians, integrated numerically."""
    x = np.linspace(-60 * noise, 60 * noise + distance, 2_000_001)
    p, q = norm.pdf(x, distance, noise), norm.pdf(x, 0.0, noise)
    return float(np.trapezoid(np.maximum(p - math.exp(epsilon) * q, 0.0), x))


@pytest.mark.parametrize("delta", [0.0, 1.0])
def test_accounting_refuses_invalid_delta(delta: float) -> None:
    with pytest.raises(UserError, match=r"privacy\.delta: expected a probability in \(0, 1\)"):
        gaussian_epsilon([1.0], delta)


@pytest.mark.parametrize(("noise", "updates"), [(1.0, 1), (4.0, 5), (20.0, 100)])
@pytest.mark.parametrize("delta", [1e-5, 1e-3])
def test_update_epsilon_equals_definition(noise: float, updates: int, delta: float) -> None:
    epsilon = update_epsilon(noise, updates, delta)
    # Updates that differ by 2C each: T of them are a point at distance 2C sqrt(T).
    assert literal_delta(epsilon, noise / 2 / math.sqrt(updates)) == pytest.approx(delta, rel=1e-9)
    assert hockey_stick(epsilon, noise, 2 * math.sqrt(updates)) == pytest.approx(delta, rel=1e-6)


def test_update_epsilon_agrees_with_numerical_composition() -> None:
    """dp-accounting's privacy loss distribution composes round by round."""
    dp_accounting = pytest.importorskip("dp_accounting")
    pld = pytest.importorskip("dp_accounting.pld")
    accountant = pld.PLDAccountant(dp_accounting.NeighboringRelation.REPLACE_SPECIAL)
    accountant.compose(dp_accounting.GaussianDpEvent(3.0 / 2), 5)
    assert update_epsilon(3.0, 5, 1e-5) == pytest.approx(accountant.get_epsilon(1e-5), rel=1e-3)


@given(st.floats(0.05, 50), st.floats(-9, -0.05).map(lambda exponent: 10**exponent))
def test_delta_of_epsilon_is_delta(ratio: float, delta: float) -> None:
    epsilon = gaussian_epsilon([ratio], delta)
    if epsilon == 0:
        assert literal_delta(0.0, ratio) <= delta * (1 + 1e-9)
    else:
        assert literal_delta(epsilon, ratio) == pytest.approx(delta, rel=1e-6)


@given(st.floats(0.01, 100), st.floats(1.01, 10), st.integers(1, 20), st.integers(1, 20))
def test_epsilon_falls_with_noise_and_grows_with_rounds(ratio: float, factor: float, updates: int, more: int) -> None:
    epsilon = gaussian_epsilon([ratio] * updates, 1e-5)
    assert gaussian_epsilon([ratio * factor] * updates, 1e-5) < epsilon or epsilon == 0
    assert gaussian_epsilon([ratio] * (updates + more), 1e-5) > epsilon or epsilon == 0
    assert gaussian_epsilon([ratio] * updates, 1e-4) <= epsilon
    assert gaussian_epsilon([ratio / math.sqrt(updates)], 1e-5) == pytest.approx(epsilon, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("delta", [5e-324, 1e-300, 0.5, 1 - 2.0**-53])
@pytest.mark.parametrize("ratio", [1e200, 1e6, 1e-6, 1e-150, 1e-200, 5e-324])
def test_epsilon_of_extreme_values_is_between_its_bounds(ratio: float, delta: float) -> None:
    """epsilon = mu^2/2 + mu x, with x below the quantile of delta."""
    epsilon = gaussian_epsilon([ratio], delta)
    mu, quantile = 1 / ratio, float(norm.ppf(delta))
    assert epsilon >= 0
    assert epsilon <= max(0.0, mu * (mu / 2 - quantile * (1 + 1e-9)) + 1e-9)
    if mu > 100:
        assert epsilon == pytest.approx(mu * (mu / 2 - quantile), rel=1e-2)


def test_epsilon_grows_with_updates_and_falls_with_noise() -> None:
    by_updates = [update_epsilon(2.0, updates, 1e-5) for updates in range(6)]
    assert by_updates[0] == 0.0
    assert by_updates == sorted(set(by_updates))
    by_noise = [update_epsilon(noise, 5, 1e-5) for noise in (0.0, 0.5, 1.0, 10.0)]
    assert by_noise[0] == math.inf
    assert by_noise == sorted(set(by_noise), reverse=True)
    assert gaussian_epsilon([2.0, 0.0], 1e-5) == math.inf


def test_mean_epsilon_counts_the_noise_of_all_but_the_adversary() -> None:
    assert mean_epsilon(1.0, [5] * 4, 1e-5) == pytest.approx(update_epsilon(2.0, 4, 1e-5))
    # With one or two clients in a round the victim's noise is left.
    assert mean_epsilon(1.0, [1, 2], 1e-5) == pytest.approx(update_epsilon(1.0, 2, 1e-5))
    mixed = gaussian_epsilon([0.5 * math.sqrt(2), 0.5 * math.sqrt(8)], 1e-5)
    assert mean_epsilon(1.0, [3, 9], 1e-5) == pytest.approx(mixed)


def test_account_counts_updates_per_client() -> None:
    account = GaussianMechanism(2.0, 0.5, 1e-4).account(
        [[0, 1], [1], [0, 1, 2]], clients=4, is_mean=True, has_seeded_noise=False
    )
    assert account["updates"] == [2, 3, 1, 0]
    assert account["epsilon"] == [update_epsilon(2.0, count, 1e-4) for count in (2, 3, 1, 0)]
    expected = [mean_epsilon(2.0, sizes, 1e-4) for sizes in ([2, 3], [2, 1, 3], [3], [])]
    assert account["epsilon_of_mean"] == expected
    assert (account["rounds"], account["delta"], account["clipping_norm"]) == (3, 1e-4, 0.5)
    assert account["noise"] == "operating system"
    without = GaussianMechanism(0.0).account([[0]], clients=2, is_mean=False, has_seeded_noise=True)
    assert without["epsilon"] == [None, 0.0]
    assert without["epsilon_of_mean"] is None
    assert without["noise"] == "seeded"
