"""Confidences against literal transcriptions in float64, and at the limits of floating-point formats."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedekd.functional import CONFIDENCES, max_softmax_confidence

Row = Sequence[float]


def softmax(z: Row) -> list[float]:
    total = sum(math.exp(value) for value in z)
    return [math.exp(value) / total for value in z]


def literal_margin(z: Row) -> float:
    first, second = sorted(softmax(z), reverse=True)[:2]
    return first - second


def literal_entropy(z: Row) -> float:
    return 1 - sum(p * math.log(1 / p) for p in softmax(z)) / math.log(len(z))


LITERAL: dict[str, Callable[[Row], float]] = {
    "max_softmax": lambda z: max(softmax(z)),
    "margin": literal_margin,
    "entropy": literal_entropy,
}

every_confidence = pytest.mark.parametrize("name", CONFIDENCES)
rows = st.integers(2, 6).flatmap(
    lambda width: st.lists(
        st.lists(st.floats(-50, 50, width=16), min_size=width, max_size=width), min_size=1, max_size=5
    )
)


@every_confidence
@pytest.mark.parametrize(("batch", "width"), [(1, 2), (5, 10), (3, 4), (2, 200)])
def test_confidence_matches_literal_formula_in_value_and_gradient(name: str, batch: int, width: int) -> None:
    torch.manual_seed(batch + width)
    logits = (3 * torch.randn(batch, width, dtype=torch.float64)).requires_grad_()
    values = CONFIDENCES[name](logits)
    expected = [LITERAL[name](row) for row in logits.tolist()]
    torch.testing.assert_close(values, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-13)
    (gradient,) = torch.autograd.grad(values.sum(), logits)
    step = 1e-6
    for i in range(batch):
        for c in range(min(width, 10)):
            sides = []
            for sign in (1, -1):
                row = logits[i].tolist()
                row[c] += sign * step
                sides.append(LITERAL[name](row))
            slope = (sides[0] - sides[1]) / (2 * step)
            assert gradient[i, c].item() == pytest.approx(slope, rel=1e-5, abs=1e-8)


@every_confidence
@given(rows=rows, scale=st.sampled_from([1e-6, 1.0, 200.0]), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_confidence_is_in_range(name: str, rows: list[Row], scale: float, dtype: torch.dtype) -> None:
    values = CONFIDENCES[name](scale * torch.tensor(rows, dtype=dtype))
    assert values.shape == (len(rows),)
    lowest = 1 / len(rows[0]) - 1e-6 if name == "max_softmax" else 0
    assert ((values >= lowest) & (values <= 1)).all()


@every_confidence
@given(rows=rows, constant=st.integers(-1000, 1000), seed=st.integers(0, 99))
def test_confidence_ignores_constant_and_order_of_classes(name: str, rows: list[Row], constant: int, seed: int) -> None:
    confidence, logits = CONFIDENCES[name], torch.tensor(rows, dtype=torch.float64)
    order = torch.randperm(logits.shape[1], generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(confidence(logits + constant), confidence(logits), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(confidence(logits[:, order]), confidence(logits), rtol=1e-9, atol=1e-11)


@every_confidence
@pytest.mark.parametrize("classes", [2, 3, 7, 10, 100, 4097])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_confidence_limits_for_equal_and_dominant_logits(name: str, classes: int, dtype: torch.dtype) -> None:
    guess, certain = torch.full((1, classes), 3.7, dtype=dtype), torch.full((1, classes), -1e4, dtype=dtype)
    certain[0, 1] = 1e4
    lowest = CONFIDENCES[name](guess)
    assert lowest.item() == pytest.approx(1 / classes if name == "max_softmax" else 0, abs=1e-6)
    assert lowest.item() >= 0
    assert CONFIDENCES[name](certain).item() == 1


@every_confidence
def test_confidence_increases_with_sharpness(name: str) -> None:
    values = [CONFIDENCES[name](scale * torch.tensor([[2.0, 1.0, 0.0]])).item() for scale in (0.1, 0.5, 1, 2, 4)]
    assert values == sorted(set(values))


@every_confidence
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_confidence_promotes_half_precision(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    logits = torch.randn(6, 5).to(dtype).requires_grad_()
    values = CONFIDENCES[name](logits)
    assert values.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(values.double(), CONFIDENCES[name](logits.detach().double()), rtol=1e-5, atol=1e-6)
    assert torch.autograd.grad(values.sum(), logits)[0].dtype == dtype


@every_confidence
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_confidence_extreme_logits_have_finite_gradients(name: str, dtype: torch.dtype) -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0], [1e4, 1e4, -1e4], [-1e4] * 3, [100.0, 0.0, 1.0]], dtype=dtype)
    values = CONFIDENCES[name](logits.requires_grad_())
    assert values.isfinite().all()
    assert torch.autograd.grad(values.sum(), logits)[0].isfinite().all()


@every_confidence
def test_confidence_minus_infinite_logit_has_probability_0(name: str) -> None:
    masked = CONFIDENCES[name](torch.tensor([[1.0, 0.0, -math.inf]]))
    torch.testing.assert_close(masked, CONFIDENCES[name](torch.tensor([[1.0, 0.0, -1e4]])))


@every_confidence
@pytest.mark.parametrize("position", [0, 1, 2])
def test_confidence_nan_logit_gives_nan(name: str, position: int) -> None:
    logits = torch.tensor([[5.0, 1.0, 0.0], [5.0, 1.0, 0.0]])
    logits[0, position] = math.nan
    values = CONFIDENCES[name](logits)
    assert values[0].isnan()
    assert values[1].isfinite()


@every_confidence
def test_confidence_empty_batch_gives_empty_result(name: str) -> None:
    assert CONFIDENCES[name](torch.zeros(0, 4)).shape == (0,)


@every_confidence
def test_confidence_vector_raises_value_error(name: str) -> None:
    with pytest.raises(ValueError, match=r"logits: expected shape \(B, D\)"):
        CONFIDENCES[name](torch.zeros(4))


def test_confidence_one_class_is_certain_or_raises() -> None:
    assert max_softmax_confidence(torch.zeros(2, 1)).tolist() == [1, 1]
    for name in ("margin", "entropy"):
        with pytest.raises(ValueError, match=f"{name}_confidence: expected logits of at least 2 classes"):
            CONFIDENCES[name](torch.zeros(4, 1))
