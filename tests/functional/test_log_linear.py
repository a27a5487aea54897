"""Combinations of members against literal transcriptions in float64; fits by their optimality and general solvers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from torch import Tensor

from fedekd.functional import (
    combine_log_linear,
    fit_linear_weights,
    fit_log_linear_weights,
    fit_sample_weights,
    log_linear,
    sample_weights,
)

seeds = st.integers(0, 10**6)


def literal_combination(members: Sequence[Sequence[float]], weights: Sequence[float]) -> list[float]:
    """Log-probabilities of one sample, from those of each member."""
    classes = range(len(members[0]))
    products = [math.prod(math.exp(row[c]) ** w for row, w in zip(members, weights, strict=True)) for c in classes]
    return [math.log(product / sum(products)) for product in products]


def literal_loss(members: Tensor, targets: Tensor, weights: Sequence[Sequence[float]]) -> float:
    """Cross-entropy with the weights of each sample, one row per sample."""
    return -sum(literal_combination(members[:, i].tolist(), weights[i])[y] for i, y in enumerate(targets.tolist()))


def literal_entropy(row: Sequence[float]) -> float:
    return -sum(math.exp(value) * value for value in row) / math.log(len(row))


def problem(n: int = 40, classes: int = 4, members: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Members of different accuracy: the first knows most of the target."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(classes, (n,), generator=generator)
    logits = torch.randn(members, n, classes, dtype=torch.float64, generator=generator)
    for m in range(members):
        logits[m, torch.arange(n), targets] += 2.0 / (m + 1)
    return (1.5 * logits).log_softmax(2), targets


def plain_objective(theta: np.ndarray, members: Tensor, targets: Tensor, ridge: float) -> float:
    """The objective of `fit_log_linear_weights`, without the code under test."""
    logits = (torch.from_numpy(theta)[:, None, None] * members).sum(0)
    loss = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    return float(loss) + ridge * float(((theta - 1 / len(theta)) ** 2).sum())


def plain_sample_objective(theta: np.ndarray, members: Tensor, targets: Tensor, ridge: float) -> float:
    """The objective of `fit_sample_weights` with theta = (a, b), without the code under test."""
    count, _, classes = members.shape
    a, b = torch.from_numpy(theta).reshape(2, count)
    entropy = -(members.exp() * members).sum(2) / math.log(classes)
    logits = ((a[:, None] + b[:, None] * entropy)[:, :, None] * members).sum(0)
    loss = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    return float(loss + ridge * (((a - 1 / count) ** 2).sum() + (b**2).sum()))


# combine_log_linear


@given(seeds, st.integers(1, 4), st.integers(1, 5), st.integers(2, 6))
def test_combine_log_linear_matches_literal_equation(seed: int, members: int, n: int, classes: int) -> None:
    log_p, _ = problem(n, classes, members, seed)
    weights = 2 * torch.rand(members, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    combined = combine_log_linear(log_p, weights)
    expected = [literal_combination(log_p[:, i].tolist(), weights.tolist()) for i in range(n)]
    torch.testing.assert_close(combined, torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=1e-10)
    repeated = combine_log_linear(log_p, weights[:, None].expand(members, n))
    torch.testing.assert_close(repeated, combined, rtol=0, atol=1e-14)


def test_combine_log_linear_weights_of_each_sample_match_literal_equation() -> None:
    log_p, _ = problem(6, 4, 3)
    weights = torch.rand(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    combined = combine_log_linear(log_p, weights)
    expected = [literal_combination(log_p[:, i].tolist(), weights[:, i].tolist()) for i in range(6)]
    torch.testing.assert_close(combined, torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=1e-10)


def test_combine_log_linear_one_member_is_returned() -> None:
    log_p, _ = problem(members=1)
    torch.testing.assert_close(combine_log_linear(log_p, torch.ones(1)), log_p[0], rtol=0, atol=1e-12)
    # The weight of a member that is left out may be 0 where its probability is 0.
    excluded = torch.stack([log_p[0], torch.full_like(log_p[0], -math.inf)])
    combined = combine_log_linear(excluded, torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(combined, log_p[0], rtol=0, atol=1e-12)


def test_combine_log_linear_zero_probabilities_are_clipped_without_nan() -> None:
    log_p = torch.tensor([[[0.0, -math.inf]], [[-math.inf, 0.0]]], requires_grad=True)
    combined = combine_log_linear(log_p, torch.tensor([0.5, 0.5]))
    torch.testing.assert_close(combined.exp(), torch.tensor([[0.5, 0.5]]))
    combined.sum().backward()
    assert log_p.grad.isfinite().all()
    # Two thirds of the weight cannot be overruled by a probability that was rounded to 0.
    assert combine_log_linear(log_p, torch.tensor([2 / 3, 1 / 3])).argmax().item() == 0


def test_combine_log_linear_float32_large_logits_stay_finite() -> None:
    log_p = (1e4 * torch.randn(3, 8, 5, generator=torch.Generator().manual_seed(0))).log_softmax(2)
    for weights in (torch.zeros(3), torch.ones(3), torch.tensor([1e3, 0.0, 1.0])):
        combined = combine_log_linear(log_p, weights)
        assert combined.dtype == torch.float32
        assert combined.isfinite().all()
    assert combine_log_linear(log_p.bfloat16(), torch.ones(3)).dtype == torch.float32


@pytest.mark.parametrize(
    ("log_p", "weights", "message"),
    [
        (torch.zeros(2, 3), torch.ones(2), "log_probabilities: expected shape"),
        (torch.zeros(0, 2, 3), torch.ones(0), "log_probabilities: expected shape"),
        (torch.zeros(2, 3, 4), torch.ones(3), r"weights: expected shape \(2,\) or \(2, 3\)"),
        (torch.zeros(2, 3, 4), torch.ones(2, 1), r"weights: expected shape \(2,\) or \(2, 3\)"),
    ],
)
def test_combine_log_linear_invalid_shape_raises_value_error(log_p: Tensor, weights: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        combine_log_linear(log_p, weights)


# fit_log_linear_weights and fit_sample_weights


def test_objective_matches_literal_equation() -> None:
    log_p, targets = problem(7, 3, 2)
    weights = np.array([0.7, 0.2])
    literal = literal_loss(log_p, targets, [weights.tolist()] * 7) + 3.0 * sum((w - 0.5) ** 2 for w in weights)
    assert plain_objective(weights, log_p, targets, 3.0) == pytest.approx(literal, rel=1e-12)
    a, b = [0.7, 0.2], [-0.3, 0.4]
    rows = [[a[m] + b[m] * literal_entropy(log_p[m, i].tolist()) for m in range(2)] for i in range(7)]
    literal = literal_loss(log_p, targets, rows) + 3.0 * (0.2**2 + 0.3**2 + 0.3**2 + 0.4**2)
    assert plain_sample_objective(np.array(a + b), log_p, targets, 3.0) == pytest.approx(literal, rel=1e-12)


@pytest.mark.parametrize("fit", [fit_log_linear_weights, fit_sample_weights])
@given(seed=seeds)
def test_gradient_matches_finite_differences(fit: Callable[..., Tensor], seed: int) -> None:
    """Compare the function that the solver receives, features and penalty included."""
    log_p, targets = problem(12, 4, 3, seed)
    calls: list[tuple] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(log_linear, "_minimise", lambda *call: calls.append(call) or call[2])
        fit(log_p, targets, 2.5)
    [(features, labels, start, penalty)] = calls

    def evaluate(theta: np.ndarray) -> tuple[float, np.ndarray]:
        return log_linear._objective(features, labels, theta, penalty)

    theta, step = start + 0.3 * np.random.default_rng(seed).random(len(start)), 1e-5
    for index, slope in enumerate(evaluate(theta)[1]):
        unit = np.eye(len(theta))[index] * step
        central = (evaluate(theta + unit)[0] - evaluate(theta - unit)[0]) / (2 * step)
        assert central == pytest.approx(slope, rel=1e-6, abs=1e-6)


@settings(max_examples=20)
@given(seeds, st.sampled_from([0.1, 1.0, 30.0]))
def test_fit_log_linear_weights_matches_general_solver(seed: int, ridge: float) -> None:
    log_p, targets = problem(25, 3, 3, seed)
    weights = fit_log_linear_weights(log_p, targets, ridge).numpy()
    assert weights.dtype == np.float64
    assert (weights >= 0).all()
    solved = minimize(
        plain_objective, np.full(3, 0.5), (log_p, targets, ridge), "SLSQP", bounds=[(0, None)] * 3,
        options={"ftol": 1e-12, "maxiter": 500},
    )  # fmt: skip
    assert plain_objective(weights, log_p, targets, ridge) <= solved.fun + 1e-8
    np.testing.assert_allclose(weights, solved.x, atol=1e-4)


def test_fit_log_linear_weights_beats_every_point_of_a_grid() -> None:
    log_p, targets = problem(30, 3, 2, seed=4)
    best = plain_objective(fit_log_linear_weights(log_p, targets, 0.5).numpy(), log_p, targets, 0.5)
    grid = np.linspace(0, 3, 61)
    assert best <= min(plain_objective(np.array([u, v]), log_p, targets, 0.5) for u in grid for v in grid)


@settings(max_examples=15)
@given(seeds, st.sampled_from([0.5, 5.0]))
def test_fit_sample_weights_matches_general_solver(seed: int, ridge: float) -> None:
    log_p, targets = problem(30, 3, 2, seed)
    a, b = fit_sample_weights(log_p, targets, ridge).numpy()
    assert (a >= 0).all()
    assert (a + b >= -1e-15).all()
    solved = minimize(
        plain_sample_objective, np.full(4, 0.1), (log_p, targets, ridge), "SLSQP",
        bounds=[(0, None)] * 2 + [(None, None)] * 2,
        constraints={"type": "ineq", "fun": lambda theta: theta[:2] + theta[2:]},
        options={"ftol": 1e-12, "maxiter": 500},
    )  # fmt: skip
    assert plain_sample_objective(np.concatenate([a, b]), log_p, targets, ridge) <= solved.fun + 1e-8
    np.testing.assert_allclose(np.concatenate([a, b]), solved.x, atol=1e-4)


@settings(max_examples=15)
@given(seeds, st.permutations(range(4)), st.permutations(range(30)))
def test_fits_are_equivariant_to_order(seed: int, members: list[int], samples: list[int]) -> None:
    log_p, targets = problem(30, 3, 4, seed)
    permuted = log_p[members][:, samples]
    weights = fit_log_linear_weights(log_p, targets, 1.0)
    torch.testing.assert_close(
        fit_log_linear_weights(permuted, targets[samples], 1.0), weights[members], rtol=0, atol=1e-6
    )
    coefficients = fit_sample_weights(log_p, targets, 1.0)
    torch.testing.assert_close(
        fit_sample_weights(permuted, targets[samples], 1.0), coefficients[:, members], rtol=0, atol=1e-5
    )


def test_fits_infinite_ridge_gives_equal_weights() -> None:
    log_p, targets = problem()
    equal = torch.full((3,), 1 / 3, dtype=torch.float64)
    assert torch.equal(fit_log_linear_weights(log_p, targets, math.inf), equal)
    assert torch.equal(fit_sample_weights(log_p, targets, math.inf), torch.stack([equal, 0 * equal]))
    torch.testing.assert_close(fit_log_linear_weights(log_p, targets, 1e9), equal, rtol=0, atol=1e-6)
    torch.testing.assert_close(fit_sample_weights(log_p, targets, 1e9)[0], equal, rtol=0, atol=1e-6)
    distances = [float((fit_log_linear_weights(log_p, targets, r) - equal).norm()) for r in (0.1, 1.0, 10.0, 1e3)]
    assert distances == sorted(distances, reverse=True)


@pytest.mark.parametrize("n", [0, 1, 19])
def test_fits_few_samples_give_exactly_equal_weights(n: int) -> None:
    log_p, targets = problem(n)
    assert fit_log_linear_weights(log_p, targets, 1.0, min_samples=20).tolist() == [1 / 3] * 3
    assert fit_sample_weights(log_p, targets, 1.0, min_samples=20).tolist() == [[1 / 3] * 3, [0.0] * 3]
    assert fit_linear_weights(log_p[:, :, 0], targets, 1.0, min_samples=20).tolist() == [1 / 3] * 3
    if n:
        assert fit_log_linear_weights(log_p, targets, 1.0, min_samples=n).tolist() != [1 / 3] * 3
    else:
        assert fit_log_linear_weights(log_p, targets, 1.0, min_samples=0).tolist() == [1 / 3] * 3


def test_fits_perfect_member_gets_largest_weight() -> None:
    log_p, targets = problem(50)
    perfect = (20 * torch.nn.functional.one_hot(targets, 4).double()).log_softmax(1)
    members = torch.stack([log_p[0], perfect, log_p[2]])
    weights = fit_log_linear_weights(members, targets, 1.0)
    assert weights.argmax() == 1
    assert fit_sample_weights(members, targets, 1.0)[0].argmax() == 1
    combined = combine_log_linear(members, weights)
    assert torch.equal(combined.argmax(1), targets)


def test_fit_log_linear_weights_wrong_member_gets_zero() -> None:
    log_p, targets = problem(50)
    wrong = (5 * torch.nn.functional.one_hot((targets + 1) % 4, 4).double()).log_softmax(1)
    weights = fit_log_linear_weights(torch.stack([log_p[0], wrong]), targets, 0.1)
    assert weights[1] == 0


def test_fits_zero_probabilities_stay_finite() -> None:
    targets = torch.tensor([0, 1, 0])
    certain = torch.eye(2)[targets].log()
    wrong = torch.eye(2)[1 - targets].log()
    for members in (torch.stack([certain, wrong]), torch.stack([wrong, wrong])):
        assert fit_log_linear_weights(members, targets, 1.0).isfinite().all()
        coefficients = fit_sample_weights(members, targets, 1.0)
        assert coefficients.isfinite().all()
        assert sample_weights(members, coefficients).isfinite().all()
    weights = fit_log_linear_weights(torch.stack([certain, wrong]), targets, 1.0)
    assert weights[0] > 1 / 2 > weights[1]


def test_sample_weights_match_literal_equation() -> None:
    log_p, targets = problem(9, 4, 3)
    coefficients = fit_sample_weights(log_p, targets, 0.5)
    a, b = coefficients.tolist()
    expected = [[a[m] + b[m] * literal_entropy(log_p[m, i].tolist()) for i in range(9)] for m in range(3)]
    weights = sample_weights(log_p, coefficients)
    torch.testing.assert_close(weights, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    assert sample_weights(torch.zeros(2, 3, 1), torch.ones(2, 2)).tolist() == [[1.0] * 3] * 2  # one class: no entropy


def test_fit_sample_weights_uses_entropy_where_it_marks_errors() -> None:
    """A member that is right where it is certain and random where it is not gets a falling weight."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(3, (400,), generator=generator)
    steady = torch.randn(400, 3, dtype=torch.float64, generator=generator)
    steady[torch.arange(400), targets] += 1.0
    certain = torch.rand(400, generator=generator) < 0.5
    shown = torch.where(certain, targets, torch.randint(3, (400,), generator=generator))
    moody = torch.nn.functional.one_hot(shown, 3).double() * torch.where(certain, 6.0, 1.0)[:, None]
    members = torch.stack([steady, moody]).log_softmax(2)
    _, b = fit_sample_weights(members, targets, 1.0)
    assert b[1] < -0.2


@pytest.mark.parametrize("fit", [fit_log_linear_weights, fit_sample_weights])
@pytest.mark.parametrize(
    ("log_p", "targets", "ridge", "message"),
    [
        (torch.zeros(3, 4), torch.zeros(3), 1.0, "log_probabilities: expected shape"),
        (torch.zeros(2, 3, 4), torch.zeros(2), 1.0, r"targets: expected shape \(3,\)"),
        (torch.zeros(2, 3, 4), torch.full((3,), 4), 1.0, r"targets: expected integers in \[0, 4\)"),
        (torch.zeros(2, 3, 4), torch.full((3,), -1), 1.0, r"targets: expected integers in \[0, 4\)"),
        (torch.full((2, 3, 4), math.nan), torch.zeros(3), 1.0, "log_probabilities: expected numbers or -inf"),
        (torch.full((2, 3, 4), math.inf), torch.zeros(3), 1.0, "log_probabilities: expected numbers or -inf"),
        (torch.zeros(2, 3, 4), torch.zeros(3), 0.0, "ridge: expected a number above 0"),
        (torch.zeros(2, 3, 4), torch.zeros(3), math.nan, "ridge: expected a number above 0"),
    ],
)
def test_fits_invalid_input_raises_value_error(
    fit: Callable[..., Tensor], log_p: Tensor, targets: Tensor, ridge: float, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        fit(log_p, targets, ridge)


def test_sample_weights_invalid_shape_raises_value_error() -> None:
    with pytest.raises(ValueError, match=r"coefficients: expected shape \(2, 3\)"):
        sample_weights(torch.zeros(3, 2, 4), torch.zeros(3, 2))


# fit_linear_weights


def linear_objective(w: np.ndarray, f: np.ndarray, y: np.ndarray, ridge: float) -> float:
    errors = [sum(w[m] * f[m, i] for m in range(len(w))) - y[i] for i in range(len(y))]
    return sum(e**2 for e in errors) + ridge * sum((w_m - 1 / len(w)) ** 2 for w_m in w)


def regression(n: int, members: int, seed: int, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    y = torch.randn(n, dtype=torch.float64, generator=generator)
    noise = torch.randn(members, n, dtype=torch.float64, generator=generator)
    bias = torch.randn(members, 1, dtype=torch.float64, generator=generator)
    spread = torch.arange(1, members + 1, dtype=torch.float64)[:, None] / 2
    return scale * (y + spread * noise + 0.3 * bias), scale * y


@settings(max_examples=30)
@given(seeds, st.integers(2, 5), st.integers(1, 20), st.sampled_from([1e-3, 1.0, 50.0]))
def test_fit_linear_weights_matches_general_solver(seed: int, members: int, n: int, ridge: float) -> None:
    f, y = regression(n, members, seed)
    weights = fit_linear_weights(f, y, ridge).numpy()
    assert (weights >= 0).all()
    assert weights.sum() == pytest.approx(1, abs=1e-12)
    arguments = (f.numpy(), y.numpy(), ridge)
    solved = minimize(
        linear_objective, np.full(members, 1 / members), arguments, "SLSQP", bounds=[(0, 1)] * members,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1}, options={"ftol": 1e-13, "maxiter": 500},
    )  # fmt: skip
    assert linear_objective(weights, *arguments) <= solved.fun + 1e-7 * max(1, solved.fun)


def test_fit_linear_weights_beats_every_point_of_a_grid() -> None:
    f, y = regression(30, 3, seed=1)
    best = linear_objective(fit_linear_weights(f, y, 0.5).numpy(), f.numpy(), y.numpy(), 0.5)
    grid = [np.array([u, v, 1 - u - v]) for u in np.linspace(0, 1, 26) for v in np.linspace(0, 1 - u, 26)]
    assert best <= min(linear_objective(w, f.numpy(), y.numpy(), 0.5) for w in grid) + 1e-12


@pytest.mark.parametrize("scale", [1e-9, 1e6])
def test_fit_linear_weights_does_not_depend_on_unit(scale: float) -> None:
    f, y = regression(30, 3, seed=2)
    scaled = fit_linear_weights(f * scale, y * scale, scale**2)
    torch.testing.assert_close(scaled, fit_linear_weights(f, y, 1.0), rtol=0, atol=1e-10)


@given(st.permutations(range(4)))
def test_fit_linear_weights_is_equivariant(order: list[int]) -> None:
    f, y = regression(30, 4, seed=3)
    weights = fit_linear_weights(f, y, 1.0)
    torch.testing.assert_close(fit_linear_weights(f[order], y, 1.0), weights[order], rtol=0, atol=1e-12)


def test_fit_linear_weights_limits() -> None:
    f, y = regression(30, 3, seed=4)
    equal = torch.full((3,), 1 / 3, dtype=torch.float64)
    assert torch.equal(fit_linear_weights(f, y, math.inf), equal)
    torch.testing.assert_close(fit_linear_weights(f, y, 1e12), equal, rtol=0, atol=1e-9)
    perfect = torch.stack([f[0], y, f[2]])
    assert fit_linear_weights(perfect, y, 1e-6)[1] > 0.999


@pytest.mark.parametrize(
    ("f", "y", "ridge", "message"),
    [
        (torch.zeros(3), torch.zeros(3), 1.0, "predictions: expected shape"),
        (torch.zeros(2, 3), torch.zeros(2), 1.0, r"targets: expected shape \(3,\)"),
        (torch.zeros(2, 3), torch.full((3,), math.nan), 1.0, "predictions, targets: expected finite"),
        (torch.zeros(2, 3), torch.zeros(3), -1.0, "ridge: expected a number above 0"),
    ],
)
def test_fit_linear_weights_invalid_input_raises_value_error(f: Tensor, y: Tensor, ridge: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit_linear_weights(f, y, ridge)
