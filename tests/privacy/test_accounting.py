"""Account of epsilon against the definition of differential privacy."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
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


def test_accounting_without_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(UserError, match=r"privacy: expected the package dp-accounting.*fedekd\[privacy\]"):
        gaussian_epsilon([1.0], 1e-5)


@pytest.mark.parametrize("delta", [0.0, 1.0])
def test_accounting_refuses_invalid_delta(delta: float) -> None:
    with pytest.raises(UserError, match=r"privacy\.delta: expected a probability in \(0, 1\)"):
        gaussian_epsilon([1.0], delta)


@pytest.fixture
def _accounting() -> None:
    pytest.importorskip("dp_accounting")


pytestmark_accounting = pytest.mark.usefixtures("_accounting")


@pytestmark_accounting
@pytest.mark.parametrize(("noise", "updates"), [(1.0, 1), (4.0, 5), (20.0, 100)])
@pytest.mark.parametrize("delta", [1e-5, 1e-3])
def test_update_epsilon_equals_definition(noise: float, updates: int, delta: float) -> None:
    epsilon = update_epsilon(noise, updates, delta)
    # Updates that differ by 2C each: T of them are a point at distance 2C sqrt(T).
    assert literal_delta(epsilon, noise / 2 / math.sqrt(updates)) == pytest.approx(delta, rel=1e-4)
    assert hockey_stick(epsilon, noise, 2 * math.sqrt(updates)) == pytest.approx(delta, rel=1e-3)


@pytestmark_accounting
def test_update_epsilon_agrees_with_numerical_composition() -> None:
    """dp-accounting's privacy loss distribution composes round by round."""
    import dp_accounting
    from dp_accounting import pld

    accountant = pld.PLDAccountant(dp_accounting.NeighboringRelation.REPLACE_SPECIAL)
    accountant.compose(dp_accounting.GaussianDpEvent(3.0 / 2), 5)
    assert update_epsilon(3.0, 5, 1e-5) == pytest.approx(accountant.get_epsilon(1e-5), rel=1e-3)


@pytestmark_accounting
def test_epsilon_grows_with_updates_and_falls_with_noise() -> None:
    by_updates = [update_epsilon(2.0, updates, 1e-5) for updates in range(6)]
    assert by_updates[0] == 0.0
    assert by_updates == sorted(set(by_updates))
    by_noise = [update_epsilon(noise, 5, 1e-5) for noise in (0.0, 0.5, 1.0, 10.0)]
    assert by_noise[0] == math.inf
    assert by_noise == sorted(set(by_noise), reverse=True)
    assert gaussian_epsilon([2.0, 0.0], 1e-5) == math.inf


@pytestmark_accounting
def test_mean_epsilon_counts_the_noise_of_all_but_the_adversary() -> None:
    assert mean_epsilon(1.0, [5] * 4, 1e-5) == pytest.approx(update_epsilon(2.0, 4, 1e-5))
    # With one or two clients in a round the victim's noise is left.
    assert mean_epsilon(1.0, [1, 2], 1e-5) == pytest.approx(update_epsilon(1.0, 2, 1e-5))
    mixed = gaussian_epsilon([0.5 * math.sqrt(2), 0.5 * math.sqrt(8)], 1e-5)
    assert mean_epsilon(1.0, [3, 9], 1e-5) == pytest.approx(mixed)


@pytestmark_accounting
def test_account_counts_updates_per_client() -> None:
    account = GaussianMechanism(2.0, 0.5, 1e-4).account([[0, 1], [1], [0, 1, 2]], clients=4, is_mean=True)
    assert account["updates"] == [2, 3, 1, 0]
    assert account["epsilon"] == [update_epsilon(2.0, count, 1e-4) for count in (2, 3, 1, 0)]
    expected = [mean_epsilon(2.0, sizes, 1e-4) for sizes in ([2, 3], [2, 1, 3], [3], [])]
    assert account["epsilon_of_mean"] == expected
    assert (account["rounds"], account["delta"], account["clipping_norm"]) == (3, 1e-4, 0.5)
    without = GaussianMechanism(0.0).account([[0]], clients=2, is_mean=False)
    assert without["epsilon"] == [None, 0.0]
    assert without["epsilon_of_mean"] is None
