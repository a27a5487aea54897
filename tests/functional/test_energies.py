"""Eq. 1, 2 and 6-9 against literal transcriptions in float64, and at the limits of floating-point formats."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedekd.functional import (
    entropy_energy,
    feature_distance_energy,
    kl_energy,
    logsumexp_energy,
    margin_energy,
    squared_error_energy,
)

Row = Sequence[float]


def softmax(z: Row) -> list[float]:
    total = sum(math.exp(value) for value in z)
    return [math.exp(value) / total for value in z]


def kl(p: Row, q: Row) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def entropy(p: Row) -> float:
    return -sum(a * math.log(a) for a in p)


def literal_kl_energy(private: Row, proxy: Row) -> float:
    p, q = softmax(private), softmax(proxy)
    return 0.5 * (kl(p, q) + kl(q, p)) / (entropy(p) + entropy(q) + 1e-8)


def literal_squared_error_energy(private: Row, proxy: Row) -> float:
    return 0.5 * sum((a - b) ** 2 for a, b in zip(private, proxy, strict=True))


def literal_entropy_energy(z: Row) -> float:
    return -sum(p * math.log(p + 1e-8) for p in softmax(z))


def literal_margin_energy(z: Row) -> float:
    first, second = sorted(z, reverse=True)[:2]
    return -(first - second)


def literal_logsumexp_energy(z: Row) -> float:
    return -math.log(sum(math.exp(value) for value in z))


def literal_feature_distance_energy(proxy: Row, private: Row) -> float:
    return math.sqrt(sum((a - b) ** 2 for a, b in zip(proxy, private, strict=True)))


PAIRS = [
    (kl_energy, literal_kl_energy, 2),
    (squared_error_energy, literal_squared_error_energy, 2),
    (entropy_energy, literal_entropy_energy, 1),
    (margin_energy, literal_margin_energy, 1),
    (logsumexp_energy, literal_logsumexp_energy, 1),
    (feature_distance_energy, literal_feature_distance_energy, 2),
]


def case_name(value: object) -> str:
    return getattr(value, "__name__", str(value))


every_energy = pytest.mark.parametrize(("energy", "literal", "inputs"), PAIRS, ids=case_name)


@every_energy
@pytest.mark.parametrize(("batch", "width"), [(1, 2), (5, 10), (3, 4)])
def test_energy_matches_literal_equation_in_value_and_gradient(
    energy: Callable[..., Tensor], literal: Callable[..., float], inputs: int, batch: int, width: int
) -> None:
    torch.manual_seed(batch + width)
    given = [3 * torch.randn(batch, width, dtype=torch.float64) for _ in range(inputs)]
    tracked = [t.clone().requires_grad_() for t in given]
    values = energy(*tracked)
    expected = [literal(*(t[i].tolist() for t in given)) for i in range(batch)]
    assert values.shape == (batch,)
    torch.testing.assert_close(values, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)

    gradients = torch.autograd.grad(values.sum(), tracked)
    step = 1e-6
    for which, gradient in enumerate(gradients):
        for i in range(batch):
            for c in range(width):
                sides = []
                for sign in (1, -1):
                    rows = [t[i].tolist() for t in given]
                    rows[which][c] += sign * step
                    sides.append(literal(*rows))
                slope = (sides[0] - sides[1]) / (2 * step)
                assert gradient[i, c].item() == pytest.approx(slope, rel=1e-5, abs=1e-7)


@every_energy
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_energy_promotes_half_precision(
    energy: Callable[..., Tensor], literal: Callable[..., float], inputs: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    given = [torch.randn(6, 5).to(dtype).requires_grad_() for _ in range(inputs)]
    values = energy(*given)
    assert values.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    # Nothing but the inputs is rounded to half precision: the result is that of the same inputs in float64.
    torch.testing.assert_close(values.double(), energy(*(t.detach().double() for t in given)), rtol=1e-5, atol=1e-6)
    gradients = torch.autograd.grad(values.sum(), given)
    assert all(gradient.dtype == dtype for gradient in gradients)


EXTREME = torch.tensor(
    [
        [1e4, -1e4, 0.0],
        [-1e4, 1e4, 0.0],
        [1e4, 1e4, -1e4],
        [1e4, 1e4, 1e4],
        [-1e4, -1e4, -1e4],
        [0.0, 0.0, 0.0],
        [30.0, 0.0, -30.0],
        [100.0, 0.0, 1.0],
    ]
)


@every_energy
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_energy_extreme_logits_have_finite_gradients(
    energy: Callable[..., Tensor], literal: Callable[..., float], inputs: int, dtype: torch.dtype
) -> None:
    n = len(EXTREME)
    first = EXTREME.repeat_interleave(n, 0)
    rows = [first, EXTREME.repeat(n, 1)][:inputs]  # every row against every row, itself included
    given = [t.float().requires_grad_() for t in rows]
    values = energy(*(t.to(dtype) for t in given))
    assert values.isfinite().all()
    if dtype != torch.float16:  # whose gradients are clipped at 65504 on the way back, by its own format
        assert all(g.isfinite().all() for g in torch.autograd.grad(values.sum(), given))


def test_kl_energy_confident_disagreement_is_divergence_over_eps() -> None:
    energy = kl_energy(torch.tensor([[1e4, -1e4]]), torch.tensor([[-1e4, 1e4]]))
    torch.testing.assert_close(energy, torch.tensor([2e4 / 1e-8]), rtol=1e-5, atol=0)


@given(st.lists(st.tuples(*[st.floats(-50, 50, width=32)] * 6), min_size=1, max_size=8))
def test_kl_energy_is_symmetric_and_nonnegative(rows: list[tuple[float, ...]]) -> None:
    private, proxy = torch.tensor(rows).split(3, dim=1)
    energy = kl_energy(private, proxy)
    assert torch.equal(energy, kl_energy(proxy, private))
    assert (energy >= 0).all()
    assert (kl_energy(private, private) == 0).all()


def test_kl_energy_ignores_constant_in_logits() -> None:
    torch.manual_seed(1)
    private, proxy = torch.randn(2, 4, 5, dtype=torch.float64)
    torch.testing.assert_close(kl_energy(private + 7, proxy - 3), kl_energy(private, proxy))


def test_energy_uses_eps_argument() -> None:
    private, proxy = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    p, q = softmax([1, 0]), softmax([0, 1])
    half_sum = 0.5 * (kl(p, q) + kl(q, p))
    assert kl_energy(private, proxy, eps=0.5).item() == pytest.approx(half_sum / (2 * entropy(p) + 0.5), rel=1e-6)
    assert entropy_energy(private, eps=0.5).item() == pytest.approx(-sum(a * math.log(a + 0.5) for a in p), rel=1e-6)


def test_squared_error_energy_accepts_vectors() -> None:
    private, proxy = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.0, 2.0, 7.0])
    expected = torch.tensor([0.5, 0.0, 8.0])
    assert torch.equal(squared_error_energy(private, proxy), expected)
    assert torch.equal(squared_error_energy(private[:, None], proxy[:, None]), expected)


def test_feature_distance_energy_equal_features_have_zero_gradient() -> None:
    features = torch.ones(2, 3, requires_grad=True)
    feature_distance_energy(features, torch.ones(2, 3)).sum().backward()
    assert features.grad is not None
    assert torch.equal(features.grad, torch.zeros(2, 3))


def test_margin_energy_tie_is_0() -> None:
    assert torch.equal(margin_energy(torch.tensor([[2.0, 2.0, 1.0]])), torch.tensor([0.0]))


@every_energy
def test_energy_empty_batch_gives_empty_result(
    energy: Callable[..., Tensor], literal: Callable[..., float], inputs: int
) -> None:
    assert energy(*[torch.zeros(0, 4)] * inputs).shape == (0,)


def test_energy_invalid_shapes_raise_value_error() -> None:
    with pytest.raises(ValueError, match=r"private_output \(4,\), proxy_output \(4, 1\)"):
        squared_error_energy(torch.zeros(4), torch.zeros(4, 1))
    with pytest.raises(ValueError, match="expected equal shapes"):
        kl_energy(torch.zeros(4, 3), torch.zeros(1, 3))
    with pytest.raises(ValueError, match=r"logits: expected shape \(B, D\)"):
        entropy_energy(torch.zeros(4))
    with pytest.raises(ValueError, match="at least 2 classes"):
        margin_energy(torch.zeros(4, 1))
