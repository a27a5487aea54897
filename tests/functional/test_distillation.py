"""Distillation losses, Eq. 4 and the output-level gradients of Appendix F."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedekd.functional import (
    decoupled_distillation,
    gated_distillation,
    kl_distillation,
    kl_energy,
    squared_error_distillation,
    trust_weights,
)


def literal_kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    p, q = torch.softmax(student / temperature, 1), torch.softmax(teacher / temperature, 1)
    return temperature**2 * (q * torch.log(q / p)).sum(1)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_kl_distillation_matches_literal_equation(temperature: float) -> None:
    torch.manual_seed(0)
    student, teacher = (
        (2 * torch.randn(5, 4, dtype=torch.float64)).requires_grad_(),
        torch.randn(5, 4).double(),
    )
    teacher.requires_grad_()
    ours, literal = kl_distillation(student, teacher, temperature), literal_kl(student, teacher, temperature)
    torch.testing.assert_close(ours, literal, rtol=1e-12, atol=1e-12)
    weights = torch.rand(5, dtype=torch.float64)
    for a, b in zip(
        torch.autograd.grad((weights * ours).sum(), (student, teacher)),
        torch.autograd.grad((weights * literal).sum(), (student, teacher)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_kl_distillation_is_weighted_by_teacher() -> None:
    sure, unsure = torch.tensor([[math.log(9.0), 0.0]]), torch.tensor([[0.0, 0.0]])
    towards_sure = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)
    assert kl_distillation(student_logits=unsure, teacher_logits=sure).item() == pytest.approx(towards_sure)


rows = st.lists(st.floats(-30, 30), min_size=8, max_size=8)


@given(st.lists(rows, min_size=1, max_size=6), st.floats(0.1, 4))
def test_gated_distillation_logit_gradient_matches_corollary_2(batch: list[list[float]], beta: float) -> None:
    student, teacher = torch.tensor(batch, dtype=torch.float64).split(4, dim=1)
    student = student.clone().requires_grad_()
    weights = trust_weights(kl_energy(student, teacher), beta=beta)
    n = len(batch)
    (gated,) = torch.autograd.grad(gated_distillation(kl_distillation(student, teacher), weights), student)
    (plain,) = torch.autograd.grad(kl_distillation(student, teacher).mean(), student)
    difference = student.detach().softmax(1) - teacher.softmax(1)
    torch.testing.assert_close(n * gated, weights[:, None] * difference, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gated, weights[:, None] * plain, rtol=1e-9, atol=1e-14)
    assert ((n * gated).norm(dim=1) <= difference.norm(dim=1) + 1e-12).all()
    assert (difference.norm(dim=1) <= math.sqrt(2) + 1e-12).all()


def test_gated_distillation_output_gradient_matches_corollary_1() -> None:
    torch.manual_seed(3)
    student, teacher = torch.randn(2, 6, 2, dtype=torch.float64)
    student.requires_grad_()
    weights = torch.rand(6, dtype=torch.float64)
    (gated,) = torch.autograd.grad(gated_distillation(squared_error_distillation(student, teacher), weights), student)
    residual = student.detach() - teacher
    torch.testing.assert_close(6 * gated, 2 * weights[:, None] * residual)


def test_squared_error_distillation_sums_over_outputs() -> None:
    student, teacher = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[3.0, 5.0], [0.0, 1.0]])
    assert torch.equal(squared_error_distillation(student, teacher), torch.tensor([13.0, 1.0]))
    assert torch.equal(squared_error_distillation(student[:, 0], teacher[:, 0]), torch.tensor([4.0, 0.0]))
    assert squared_error_distillation(torch.zeros(0, 1), torch.zeros(0, 1)).shape == (0,)


def test_gated_distillation_detaches_weights_and_divides_by_n() -> None:
    loss = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    weights = torch.tensor([0.5, 0.25, 0.0], requires_grad=True)
    total = gated_distillation(loss, weights)
    assert total.item() == pytest.approx(1.0 / 3)
    total.backward()
    assert weights.grad is None
    torch.testing.assert_close(loss.grad, torch.tensor([0.5, 0.25, 0.0]) / 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_distillation_promotes_half_precision(dtype: torch.dtype) -> None:
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    student, teacher = torch.tensor([[3.0, 1.0]], dtype=dtype), torch.tensor([[1.0, 1.5]], dtype=dtype)
    for loss in (kl_distillation(student, teacher, 3.0), squared_error_distillation(student, teacher)):
        assert loss.dtype == wanted
        assert gated_distillation(loss, torch.ones(1, dtype=dtype)).dtype == wanted
    exact = kl_distillation(student.double(), teacher.double(), 3.0)
    torch.testing.assert_close(kl_distillation(student, teacher, 3.0).double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_distillation_extreme_logits_have_finite_gradients(dtype: torch.dtype) -> None:
    student = torch.tensor([[1e4, -1e4], [-1e4, 1e4], [1e4, 1e4]], requires_grad=True)
    teacher = torch.tensor([[-1e4, 1e4], [-1e4, 1e4], [-1e4, 1e4]])
    loss = kl_distillation(student.to(dtype), teacher.to(dtype))
    torch.testing.assert_close(loss.detach(), torch.tensor([2e4, 0.0, math.log(2)]), rtol=0.01, atol=1e-6)
    loss.sum().backward()
    torch.testing.assert_close(student.grad, torch.tensor([[1.0, -1.0], [0.0, 0.0], [0.5, -0.5]]))


@pytest.mark.parametrize("temperature", [0.0, -2.0, math.nan])
def test_kl_distillation_invalid_temperature_raises_value_error(temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature: expected a finite number above 0"):
        kl_distillation(torch.zeros(1, 2), torch.zeros(1, 2), temperature)


def test_distillation_different_shapes_raise_value_error() -> None:
    with pytest.raises(ValueError, match=r"student_output \(4, 1\), teacher_output \(4,\)"):
        squared_error_distillation(torch.zeros(4, 1), torch.zeros(4))
    with pytest.raises(ValueError, match="expected equal shapes"):
        gated_distillation(torch.zeros(4), torch.zeros(4, 1))
    with pytest.raises(ValueError, match="expected equal shapes"):
        kl_distillation(torch.zeros(4, 3), torch.zeros(4, 1))


def literal_dkd(student: Tensor, teacher: Tensor, targets: Tensor, alpha: float, beta: float, t: float) -> Tensor:
    """Zhao et al.'s Eq. 7, sample by sample."""
    losses = []
    for s_row, t_row, y in zip(student / t, teacher / t, targets.tolist(), strict=True):
        p_s, p_t = s_row.softmax(0), t_row.softmax(0)
        others = [c for c in range(len(p_s)) if c != y]
        binary_s, binary_t = ((p[y], p[others].sum()) for p in (p_s, p_t))
        of_target = sum(b_t * torch.log(b_t / b_s) for b_s, b_t in zip(binary_s, binary_t, strict=True))
        hat_s, hat_t = s_row[others].softmax(0), t_row[others].softmax(0)
        losses.append(t**2 * (alpha * of_target + beta * (hat_t * torch.log(hat_t / hat_s)).sum()))
    return torch.stack(losses)


def logits_and_targets(classes: int = 5, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (2 * torch.randn(7, classes, dtype=torch.float64, generator=generator) for _ in range(2))
    return student, teacher, torch.randint(0, classes, (7,), generator=generator)


@pytest.mark.parametrize(("alpha", "beta", "temperature"), [(1.0, 8.0, 4.0), (0.5, 1.0, 1.0), (0.0, 2.0, 0.5)])
@pytest.mark.parametrize("classes", [2, 5])
def test_decoupled_distillation_matches_literal_equation(
    alpha: float, beta: float, temperature: float, classes: int
) -> None:
    student, teacher, targets = logits_and_targets(classes)
    student.requires_grad_()
    ours = decoupled_distillation(student, teacher, targets, alpha, beta, temperature)
    literal = literal_dkd(student, teacher, targets, alpha, beta, temperature)
    torch.testing.assert_close(ours, literal, rtol=1e-12, atol=1e-12)
    weights = torch.linspace(0.1, 1, 7, dtype=torch.float64)
    gradients = (torch.autograd.grad((weights * loss).sum(), student, retain_graph=True)[0] for loss in (ours, literal))
    torch.testing.assert_close(*gradients, rtol=1e-11, atol=1e-12)


@given(st.integers(0, 10_000), st.integers(2, 12))
def test_decoupled_distillation_is_kl_with_teacher_weights(seed: int, classes: int) -> None:
    """KL(p_t || p_s) = KL(b_t || b_s) + (1 - p_y^t) KL(p^_t || p^_s) at T = 1."""
    student, teacher, targets = logits_and_targets(classes, seed)
    of_target = decoupled_distillation(student, teacher, targets, 1.0, 0.0, 1.0)
    of_others = decoupled_distillation(student, teacher, targets, 0.0, 1.0, 1.0)
    sure = teacher.softmax(1).gather(1, targets[:, None]).squeeze(1)
    whole = of_target + (1 - sure) * of_others
    torch.testing.assert_close(whole, kl_distillation(student, teacher), rtol=1e-10, atol=1e-12)
    assert (of_target >= -1e-12).all()
    assert (of_others >= -1e-12).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_decoupled_distillation_is_finite_for_large_logits(dtype: torch.dtype) -> None:
    large = 1e4 * torch.eye(4, dtype=dtype)
    student = large[[0, 1, 2, 3]].requires_grad_()
    for teacher in (large, large[[1, 2, 3, 0]], -large):
        for target in range(4):
            loss = decoupled_distillation(student, teacher, torch.full((4,), target))
            assert loss.dtype == torch.float32
            assert loss.isfinite().all()
            (gradient,) = torch.autograd.grad(loss.sum(), student)
            assert gradient.isfinite().all()
    assert (decoupled_distillation(student, student.detach(), torch.arange(4)) == 0).all()


@pytest.mark.parametrize(
    ("classes", "targets", "temperature", "words"),
    [(3, torch.zeros(2), 0.0, "temperature"), (3, torch.zeros(3), 1.0, "targets"), (1, torch.zeros(2), 1.0, "C >= 2")],
)
def test_decoupled_distillation_invalid_arguments_raise_value_error(
    classes: int, targets: Tensor, temperature: float, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        decoupled_distillation(
            torch.zeros(2, classes), torch.zeros(2, classes), targets.long(), temperature=temperature
        )
