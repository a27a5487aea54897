"""The gate against a literal Eq. 3, and the propositions of Appendix F."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from fedekd.functional import trust_weights
from fedekd.modules.losses import GATES

energies = st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=40)
betas = st.floats(0.05, 8.0)


def literal_normalized(energy: list[float], eps: float = 1e-8) -> list[float]:
    n = len(energy)
    mean = math.fsum(energy) / n
    std = math.sqrt(math.fsum((e - mean) ** 2 for e in energy) / n)
    return [(e - mean) / (std + eps) for e in energy]


def sigmoid(t: float) -> float:
    return 1 / (1 + math.exp(-t))


@pytest.mark.parametrize("beta", [0.25, 1.0, 8.0])
@pytest.mark.parametrize("n", [1, 2, 3, 64])
def test_trust_weights_match_literal_equation(n: int, beta: float) -> None:
    torch.manual_seed(n)
    energy = 5 + torch.randn(n, dtype=torch.float64).exp()
    expected = [sigmoid(-beta * e) for e in literal_normalized(energy.tolist())]
    torch.testing.assert_close(
        trust_weights(energy, beta=beta), torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12
    )


def test_trust_weights_eps_matters_for_small_spread() -> None:
    energy = [0.0, 1e-8, 4e-8]
    expected = [sigmoid(-e) for e in literal_normalized(energy)]
    torch.testing.assert_close(trust_weights(torch.tensor(energy)), torch.tensor(expected))
    wide = [sigmoid(-e) for e in literal_normalized([0.0, 1.0], eps=0.5)]
    torch.testing.assert_close(trust_weights(torch.tensor([0.0, 1.0]), eps=0.5), torch.tensor(wide))


@given(energies, betas)
def test_trust_weights_decrease_with_energy_as_in_proposition_1(energy: list[float], beta: float) -> None:
    weights = trust_weights(torch.tensor(sorted(energy)), beta=beta)
    assert (weights.diff() <= 0).all()


@given(energies, st.floats(0.05, 4.0))
def test_trust_weights_are_bounded_as_in_proposition_2(energy: list[float], beta: float) -> None:
    weights = trust_weights(torch.tensor(energy, dtype=torch.float64), beta=beta)
    bound = beta * math.sqrt(len(energy) - 1)
    assert weights.min().item() >= sigmoid(-bound) * (1 - 1e-9)
    assert weights.max().item() <= sigmoid(bound) * (1 + 1e-12)
    assert (weights > 0).all()


def test_trust_weights_reach_bounds_of_proposition_2() -> None:
    n = 10
    weights = trust_weights(torch.tensor([1.0] + [0.0] * (n - 1), dtype=torch.float64))
    assert weights[0].item() == pytest.approx(sigmoid(-math.sqrt(n - 1)), rel=1e-6)
    weights = trust_weights(torch.tensor([-1.0] + [0.0] * (n - 1), dtype=torch.float64))
    assert weights[0].item() == pytest.approx(sigmoid(math.sqrt(n - 1)), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_trust_weights_equal_energies_give_one_half(dtype: torch.dtype) -> None:
    for n, value in product([1, 2, 3, 7, 64], [0.0, 0.1, 1000.1, -3.3, 1e-30, 2e12]):
        weights = trust_weights(torch.full((n,), value, dtype=dtype))
        assert torch.equal(weights.double(), torch.full((n,), 0.5).double()), (n, value)


@given(st.floats(-20, 20), betas)
def test_trust_weights_minimize_objective_of_proposition_3(spread: float, beta: float) -> None:
    energy = [0.0, spread, 3.0]
    normalized = literal_normalized(energy)
    weights = trust_weights(torch.tensor(energy, dtype=torch.float64), beta=beta).tolist()

    def phi(w: float, e: float) -> float:
        return w * e + (w * math.log(w) + (1 - w) * math.log(1 - w)) / beta

    for w, e in zip(weights, normalized, strict=True):
        best = phi(w, e)
        assert all(best <= phi(other / 200, e) + 1e-12 for other in range(1, 200))


@given(st.lists(st.floats(0, 100, width=32), min_size=2, max_size=64, unique=True))
def test_trust_weights_mean_is_near_one_half(energy: list[float]) -> None:
    # Why the gate cannot shut a bad proxy off: high energies or low, about half of the batch is trusted.
    mean = trust_weights(torch.tensor(energy, dtype=torch.float64)).mean().item()
    assert 0.45 < mean < 0.55


@given(energies, st.floats(-1e3, 1e3), st.floats(0.1, 100))
def test_trust_weights_ignore_offset_and_unit(energy: list[float], shift: float, unit: float) -> None:
    exact = torch.tensor(energy, dtype=torch.float64)
    assume(len(energy) == 1 or exact.std() > 1e-3)  # else eps and rounding are not small beside the spread
    torch.testing.assert_close(trust_weights(exact * unit + shift), trust_weights(exact), rtol=1e-4, atol=1e-4)


def test_trust_weights_huge_energies_do_not_overflow() -> None:
    ordinary = torch.tensor([0.0, 1.0, 5.0])
    torch.testing.assert_close(trust_weights(ordinary * 1e30), trust_weights(ordinary))


def test_trust_weights_are_detached_and_at_least_float32() -> None:
    energy = torch.tensor([0.0, 1.0], dtype=torch.bfloat16, requires_grad=True)
    weights = trust_weights(energy)
    assert not weights.requires_grad
    assert weights.dtype == torch.float32
    assert trust_weights(energy.double()).dtype == torch.float64


def test_trust_weights_empty_batch_gives_empty_result() -> None:
    assert trust_weights(torch.zeros(0)).shape == (0,)


@pytest.mark.parametrize("beta", [0.0, -1.0, math.nan, math.inf])
def test_trust_weights_invalid_beta_raises_value_error(beta: float) -> None:
    with pytest.raises(ValueError, match="beta: expected a finite number above 0"):
        trust_weights(torch.zeros(3), beta=beta)


def test_trust_weights_matrix_raises_value_error() -> None:
    with pytest.raises(ValueError, match=r"shape \(B,\)"):
        trust_weights(torch.zeros(3, 1))


@pytest.mark.parametrize("beta", [0.25, 1.0, 8.0])
@pytest.mark.parametrize("n", [1, 2, 3, 64])
def test_reversed_gate_match_literal_equation(n: int, beta: float) -> None:
    torch.manual_seed(n)
    energy = 5 + torch.randn(n, dtype=torch.float64).exp()
    expected = [sigmoid(beta * e) for e in literal_normalized(energy.tolist())]
    weights = GATES["reversed"].weigh(energy, beta, None)
    torch.testing.assert_close(weights, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


@given(energies, betas)
def test_reversed_gate_rise_with_energy_and_complement_the_gate(energy: list[float], beta: float) -> None:
    exact = torch.tensor(sorted(energy), dtype=torch.float64)
    weights = GATES["reversed"].weigh(exact, beta, None)
    assert (weights.diff() >= 0).all()
    torch.testing.assert_close(weights + trust_weights(exact, beta=beta), torch.ones_like(weights))


@pytest.mark.parametrize("value", [0.0, 0.1, 1000.1, -3.3, 1e-30, 2e12])
def test_reversed_gate_equal_energies_give_one_half(value: float) -> None:
    assert torch.equal(GATES["reversed"].weigh(torch.full((7,), value), 1.0, None), torch.full((7,), 0.5))
