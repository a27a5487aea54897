"""Label priors against literal transcriptions in float64, a general solver, and a mixture with a known prior."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.stats import norm
from torch import Tensor

from fedekd.functional import adjust_log_prior, estimate_label_prior, log_label_prior


def literal_log_prior(counts: Sequence[float], s: float) -> list[float]:
    n, classes = sum(counts), len(counts)
    return [math.log((n_c + s) / (n + s * classes)) if n_c + s else -math.inf for n_c in counts]


def literal_posterior(p: Sequence[float], source: Sequence[float], target: Sequence[float]) -> list[float]:
    """Saerens et al., Eq. 2.4."""
    joint = [target[c] / source[c] * p[c] for c in range(len(p))]
    return [value / sum(joint) for value in joint]


def literal_em(
    rows: Sequence[Sequence[float]], source: Sequence[float], strength: float, iterations: int
) -> list[float]:
    """Saerens et al., Eq. 2.9, with pseudo-inputs of the source prior."""
    prior = list(source)
    for _ in range(iterations):
        posteriors = [literal_posterior(row, source, prior) for row in rows]
        prior = [
            (sum(row[c] for row in posteriors) + strength * source[c]) / (len(rows) + strength)
            for c in range(len(source))
        ]
    return prior


def log_posterior(p: Tensor, source: Tensor, prior: Tensor, strength: float) -> float:
    likelihood = float((p * (prior / source)).sum(1).log().sum())
    return likelihood + (strength * float((source * prior.log()).sum()) if strength else 0.0)


def problem(n: int, classes: int, seed: int, sharpness: float = 2.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    p = (sharpness * torch.randn(n, classes, dtype=torch.float64, generator=generator)).softmax(1)
    return p, torch.randn(classes, dtype=torch.float64, generator=generator).softmax(0)


def mixture(target: Sequence[float], source: Sequence[float], n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw from normal classes around 0, 2, 4...; return the exact source posteriors and the labels' shares."""
    generator = np.random.default_rng(seed)
    labels = generator.choice(len(target), size=n, p=target)
    x = generator.normal(2.0 * labels, 1.0)
    joint = np.stack([pi * norm.pdf(x, 2.0 * c, 1.0) for c, pi in enumerate(source)], axis=1)
    shares = np.bincount(labels, minlength=len(target)) / n
    return torch.from_numpy(joint / joint.sum(1, keepdims=True)), torch.from_numpy(shares)


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=12), st.sampled_from([0.01, 1.0, 37.5]))
def test_log_label_prior_matches_literal_equation(counts: list[int], smoothing: float) -> None:
    result = log_label_prior(torch.tensor(counts), smoothing)
    assert result.dtype == torch.float64
    expected = torch.tensor(literal_log_prior(counts, smoothing), dtype=torch.float64)
    torch.testing.assert_close(result, expected, rtol=1e-13, atol=1e-13)
    assert abs(float(result.exp().sum()) - 1) < 1e-12


def test_log_label_prior_without_smoothing_excludes_missing_class() -> None:
    result = log_label_prior(torch.tensor([3, 0, 1]), 0.0)
    assert result.tolist() == pytest.approx([math.log(0.75), -math.inf, math.log(0.25)])
    assert log_label_prior(torch.zeros(4), 1.0).exp().tolist() == [0.25] * 4


@pytest.mark.parametrize(
    ("counts", "smoothing", "message"),
    [
        ([[1.0]], 1.0, "counts: expected shape"),
        ([], 1.0, "counts: expected shape"),
        ([1.0, -1.0], 1.0, "counts: expected finite"),
        ([1.0, math.nan], 1.0, "counts: expected finite"),
        ([1.0, math.inf], 1.0, "counts: expected finite"),
        ([0.0, 0.0], 0.0, "counts: expected finite"),
        ([1.0], -1.0, "smoothing: expected"),
        ([1.0], math.nan, "smoothing: expected"),
        ([1.0], math.inf, "smoothing: expected"),
    ],
)
def test_log_label_prior_invalid_input_raises_value_error(counts: list[float], smoothing: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        log_label_prior(torch.tensor(counts), smoothing)


@given(st.integers(0, 10**6), st.integers(2, 9))
def test_adjust_log_prior_matches_literal_posterior(seed: int, classes: int) -> None:
    p, source = problem(5, classes, seed)
    target = problem(1, classes, seed + 1)[1]
    adjusted = adjust_log_prior(p.log(), source, target).softmax(1)
    expected = [literal_posterior(row, source.tolist(), target.tolist()) for row in p.tolist()]
    torch.testing.assert_close(adjusted, torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=1e-12)
    restored = adjust_log_prior(adjusted.log(), target, source).softmax(1)
    torch.testing.assert_close(restored, p, rtol=1e-9, atol=1e-12)


def test_adjust_log_prior_equal_priors_return_logits_unchanged() -> None:
    logits = torch.randn(50, 7, generator=torch.Generator().manual_seed(0))
    prior = log_label_prior(torch.arange(7), 1.0).exp()
    assert torch.equal(adjust_log_prior(logits, prior, prior), logits)


def test_adjust_log_prior_target_zero_is_never_predicted() -> None:
    logits = torch.tensor([[90.0, 0.0, 1.0]])
    adjusted = adjust_log_prior(logits, torch.tensor([0.2, 0.3, 0.5]), torch.tensor([0.0, 0.5, 0.5]))
    assert adjusted[0, 0] == -math.inf
    assert adjusted.softmax(1)[0, 0] == 0
    assert adjusted.softmax(1).isfinite().all()


def test_adjust_log_prior_half_precision_is_computed_in_float32() -> None:
    logits = torch.zeros(1, 2, dtype=torch.bfloat16)
    adjusted = adjust_log_prior(logits, torch.tensor([0.5, 0.5]), torch.tensor([0.501, 0.499]))
    assert adjusted.dtype == torch.float32
    assert adjusted.softmax(1)[0, 0] == pytest.approx(0.501, abs=1e-6)


def test_adjust_log_prior_is_differentiable() -> None:
    logits = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    adjust_log_prior(logits, torch.full((4,), 0.25), torch.tensor([0.1, 0.2, 0.3, 0.4])).sum().backward()
    assert torch.equal(logits.grad, torch.ones(3, 4, dtype=torch.float64))


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        ([0.5, 0.5], [0.5, 0.25, 0.25], r"target: expected shape \(2,\)"),
        ([1.0], [0.5, 0.5], r"source: expected shape \(2,\)"),
        ([1.0, 0.0], [0.5, 0.5], "source: expected finite probabilities above 0"),
        ([0.5, 0.5], [1.5, -0.5], "target: expected finite probabilities of at least 0"),
        ([0.5, 0.5], [0.0, 0.0], "target: expected finite probabilities of at least 0"),
        ([0.5, 0.5], [math.nan, 1.0], "target: expected finite probabilities of at least 0"),
        ([0.5, math.inf], [0.5, 0.5], "source: expected finite probabilities above 0"),
    ],
)
def test_adjust_log_prior_invalid_prior_raises_value_error(
    source: list[float], target: list[float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        adjust_log_prior(torch.zeros(3, 2), torch.tensor(source), torch.tensor(target))


@pytest.mark.parametrize("strength", [0.0, 0.5, 10.0])
@pytest.mark.parametrize("iterations", [1, 2, 25])
def test_estimate_label_prior_matches_literal_em(strength: float, iterations: int) -> None:
    p, source = problem(30, 5, seed=iterations)
    result = estimate_label_prior(p, source, strength, tolerance=1e-300, max_iterations=iterations)
    expected = literal_em(p.tolist(), source.tolist(), strength, iterations)
    torch.testing.assert_close(result, torch.tensor(expected, dtype=torch.float64), rtol=1e-11, atol=1e-13)


@given(st.integers(0, 10**6), st.integers(1, 20), st.integers(2, 6), st.sampled_from([0.0, 0.3, 5.0]))
def test_estimate_label_prior_likelihood_never_falls(seed: int, n: int, classes: int, strength: float) -> None:
    p, source = problem(n, classes, seed)
    values = [log_posterior(p, source, source, strength)]
    for iterations in range(1, 12):
        prior = estimate_label_prior(p, source, strength, tolerance=1e-300, max_iterations=iterations)
        assert (prior >= 0).all()
        assert abs(float(prior.sum()) - 1) < 1e-12
        values.append(log_posterior(p, source, prior, strength))
    assert all(later >= earlier - 1e-10 for earlier, later in pairwise(values))


@pytest.mark.parametrize("strength", [0.5, 3.0])
@pytest.mark.parametrize("seed", range(5))
def test_estimate_label_prior_matches_general_solver(seed: int, strength: float) -> None:
    p, source = problem(40, 4, seed)

    def negative(prior: np.ndarray) -> float:
        return -log_posterior(p, source, torch.from_numpy(prior), strength)

    solved = minimize(
        negative,
        source.numpy(),
        bounds=[(1e-9, 1)] * 4,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
        method="SLSQP",
        options={"ftol": 1e-13, "maxiter": 1000},
    )
    result = estimate_label_prior(p, source, strength, tolerance=1e-13)
    np.testing.assert_allclose(result.numpy(), solved.x, atol=2e-5)
    assert negative(result.numpy()) <= solved.fun + 1e-9


@pytest.mark.parametrize("target", [(0.8, 0.1, 0.1), (0.05, 0.9, 0.05), (1 / 3, 1 / 3, 1 / 3)])
def test_estimate_label_prior_recovers_prior_of_mixture(target: tuple[float, ...]) -> None:
    source = (0.2, 0.3, 0.5)
    p, _ = mixture(target, source, 20_000, seed=0)
    result = estimate_label_prior(p, torch.tensor(source))
    # Standard error of a share of 20,000 labels: 0.0035; overlapping classes cost a factor of about 2.
    torch.testing.assert_close(result, torch.tensor(target, dtype=torch.float64), rtol=0, atol=0.02)
    assert float((p.mean(0) - torch.tensor(target)).abs().max()) > 0.02 or target == source


def test_estimate_label_prior_certain_posteriors_give_shares_of_labels() -> None:
    labels = torch.tensor([0, 0, 0, 1, 2, 2])
    p = torch.nn.functional.one_hot(labels, 3).double()
    result = estimate_label_prior(p, torch.tensor([0.1, 0.2, 0.7]))
    torch.testing.assert_close(result, torch.tensor([3, 1, 2]).double() / 6)


def test_estimate_label_prior_strength_prevents_collapse_of_few_inputs() -> None:
    source = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    one = torch.tensor([[0.6, 0.2, 0.2]], dtype=torch.float64)  # likelihood ratios 1.2, 0.67, 1
    assert estimate_label_prior(one, source)[0] > 0.999
    shrunk = estimate_label_prior(one, source, strength=10.0)
    assert (shrunk - source).abs().max() < 0.1
    assert (shrunk > 0.1).all()
    torch.testing.assert_close(estimate_label_prior(one, source, strength=1e12), source, rtol=0, atol=1e-9)


def test_estimate_label_prior_without_inputs_returns_source() -> None:
    source = torch.tensor([0.25, 0.75])
    for strength in (0.0, 1.0):
        assert estimate_label_prior(torch.zeros(0, 2), source, strength).tolist() == [0.25, 0.75]


@pytest.mark.parametrize("strength", [0.0, 5.0])
@pytest.mark.parametrize("tiny", [1e-200, 1e-320])
def test_estimate_label_prior_of_a_tiny_source_prior_is_finite(tiny: float, strength: float) -> None:
    source = torch.tensor([1 - tiny, tiny], dtype=torch.float64)
    p = torch.tensor([[0.9, 0.1], [0.2, 0.8], [1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    result = estimate_label_prior(p, source, strength)
    assert abs(float(result.sum()) - 1) < 1e-12
    # Any probability of the second class outweighs its source prior: three of four inputs are of it.
    assert result.tolist() == pytest.approx([(1 + strength) / (4 + strength), 3 / (4 + strength)], rel=1e-9)


def test_estimate_label_prior_accepts_rounded_rows() -> None:
    p, source = problem(30, 5, seed=0)
    half = p.float().half()
    torch.testing.assert_close(estimate_label_prior(half, source), estimate_label_prior(p, source), rtol=0, atol=5e-3)


@given(st.permutations(range(5)), st.permutations(range(12)))
def test_estimate_label_prior_is_equivariant(classes: list[int], inputs: list[int]) -> None:
    p, source = problem(12, 5, seed=3)
    result = estimate_label_prior(p, source, 1.0)
    permuted = estimate_label_prior(p[inputs][:, classes], source[classes], 1.0)
    torch.testing.assert_close(permuted, result[classes], rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"probabilities": torch.zeros(3)}, "probabilities: expected shape"),
        ({"probabilities": torch.zeros(2, 2)}, "probabilities: expected finite"),
        ({"probabilities": torch.tensor([[math.nan, 1.0]])}, "probabilities: expected finite"),
        ({"probabilities": torch.tensor([[-0.1, 1.1]])}, "probabilities: expected finite"),
        ({"probabilities": torch.tensor([[0.5, 0.499], [0.5, 0.498]])}, "with sum 1 within 0.001 in each row"),
        ({"probabilities": torch.tensor([[2.0, 1.0]])}, "with sum 1 within 0.001 in each row"),
        (
            {"source": torch.tensor([1e10, 1e-320], dtype=torch.float64)},
            "source: expected finite probabilities above 0",
        ),
        ({"source": torch.tensor([1.0, 0.0])}, "source: expected finite probabilities above 0"),
        ({"source": torch.ones(3) / 3}, "source: expected shape"),
        ({"strength": -1.0}, "strength: expected"),
        ({"strength": math.inf}, "strength: expected"),
        ({"tolerance": 0.0}, "tolerance, max_iterations: expected"),
        ({"max_iterations": 0}, "tolerance, max_iterations: expected"),
    ],
)
def test_estimate_label_prior_invalid_input_raises_value_error(arguments: dict, message: str) -> None:
    valid = {"probabilities": torch.full((3, 2), 0.5), "source": torch.tensor([0.5, 0.5])}
    with pytest.raises(ValueError, match=message):
        estimate_label_prior(**(valid | arguments))
