"""RAPS and the losses of FedType against literal transcriptions in float64, and coverage by simulation."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedekd.functional import (
    conformal_quantile,
    fit_temperature,
    prediction_sets,
    regularized_scores,
    set_agreement,
    set_ranking_loss,
)

Row = Sequence[float]
lams = pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
kappas = pytest.mark.parametrize("kappa", [1, 3, 5])


def ranked(row: Row) -> list[int]:
    return sorted(range(len(row)), key=lambda c: (-row[c], c))


def literal_score(row: Row, label: int, u: float, lam: float, kappa: int) -> float:
    order = ranked(row)
    rank = order.index(label) + 1
    return sum(row[c] for c in order[: rank - 1]) + u * row[label] + lam * max(0, rank - kappa)


def literal_set(row: Row, tau: float, u: float, lam: float, kappa: int) -> set[int]:
    order = ranked(row)
    cumulative = np.cumsum([row[c] for c in order])
    penalty = [lam * max(0, rank - kappa) for rank in range(1, len(row) + 1)]
    size = min(len(row), 1 + sum(c + p <= tau for c, p in zip(cumulative, penalty, strict=True)))
    last = row[order[size - 1]]
    v = (tau - (cumulative[size - 1] - last) - penalty[size - 1]) / last
    if u > v:
        size = max(1, size - 1)
    return set(order[:size])


def literal_ranking_loss(row: Row, chosen: Sequence[bool]) -> float:
    inside = [z for z, member in zip(row, chosen, strict=True) if member]
    outside = [z for z, member in zip(row, chosen, strict=True) if not member]
    if not outside:
        return 0.0
    return sum(max(0.0, b - a) for a in inside for b in outside) / (len(inside) * len(outside))


def batch(n: int = 60, classes: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(n + classes)
    probabilities = (2 * torch.randn(n, classes, dtype=torch.float64)).softmax(1)
    return probabilities, torch.randint(classes, (n,)), torch.rand(n, dtype=torch.float64)


def as_sets(rows: Tensor) -> list[set[int]]:
    return [set(row.nonzero().flatten().tolist()) for row in rows]


@lams
@kappas
def test_regularized_scores_match_literal_equation(lam: float, kappa: int) -> None:
    probabilities, labels, u = batch()
    rows = zip(probabilities.tolist(), labels.tolist(), u.tolist(), strict=True)
    expected = torch.tensor([literal_score(*row, lam, kappa) for row in rows], dtype=torch.float64)
    scores = regularized_scores(probabilities, labels, u, lam, kappa)
    torch.testing.assert_close(scores, expected, rtol=1e-12, atol=1e-12)


def test_regularized_scores_ties_rank_by_index() -> None:
    probabilities = torch.full((40, 40), 1 / 40, dtype=torch.float64)  # many enough for an unstable sort to show
    scores = regularized_scores(probabilities, torch.arange(40), torch.zeros(40), 0.0, 1)
    torch.testing.assert_close(scores, torch.arange(40).double() / 40)
    kept = prediction_sets(probabilities, 0.5 + 1e-9, torch.zeros(40), 0.0, 1)
    assert as_sets(kept) == [set(range(21))] * 40


@lams
@kappas
@pytest.mark.parametrize("tau", [0.05, 0.4, 0.9, 1.2, 2.6, 5.5])
def test_prediction_sets_match_literal_construction(tau: float, lam: float, kappa: int) -> None:
    probabilities, _, u = batch()
    rows = zip(probabilities.tolist(), u.tolist(), strict=True)
    expected = [literal_set(row, tau, v, lam, kappa) for row, v in rows]
    assert as_sets(prediction_sets(probabilities, tau, u, lam, kappa)) == expected


@lams
def test_prediction_sets_contain_top_label_and_scores_below_threshold(lam: float) -> None:
    probabilities, labels, u = batch(400)
    scores = regularized_scores(probabilities, labels, u, lam, 2)
    for tau in scores[:20].tolist():  # each of them is reached exactly
        inside = prediction_sets(probabilities, tau, u, lam, 2).gather(1, labels[:, None]).squeeze(1)
        assert torch.equal(inside, (scores <= tau) | (probabilities.argmax(1) == labels))


rows = st.lists(st.lists(st.floats(-20, 20), min_size=5, max_size=5), min_size=1, max_size=6)


@given(rows, st.floats(0, 3), st.floats(0, 2), st.floats(0, 2), st.integers(1, 5), st.integers(0, 99))
def test_prediction_sets_grow_with_tau_and_shrink_with_lam(
    logits: list[list[float]], tau: float, lam: float, more: float, kappa: int, seed: int
) -> None:
    probabilities = torch.tensor(logits).softmax(1)
    u = torch.rand(len(logits), generator=torch.Generator().manual_seed(seed))
    sets = prediction_sets(probabilities, tau, u, lam, kappa)
    assert sets.any(dim=1).all()
    assert (sets <= prediction_sets(probabilities, tau + more, u, lam, kappa)).all()
    assert (sets >= prediction_sets(probabilities, tau, u, lam + more, kappa)).all()
    assert (sets <= prediction_sets(probabilities, tau, u, lam, kappa + 1)).all()
    assert prediction_sets(probabilities, math.inf, u, lam, kappa).all()


def test_prediction_sets_drop_last_label_with_probability_1_minus_v() -> None:
    n = 100_000
    probabilities = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64).expand(n, 3)
    u = torch.rand(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    share = prediction_sets(probabilities, 0.59, u, 0.0, 1).double().mean(0)
    assert share.tolist() == pytest.approx([1.0, 0.3, 0.0], abs=0.006)  # V = 0.09 / 0.3


@pytest.mark.parametrize("alpha", [0.1, 0.05, 0.2, 0.3, 1 / 3, 0.7, 0.9])
def test_conformal_quantile_matches_numpy(alpha: float) -> None:
    for n in range(1, 130):
        scores = torch.randperm(n, generator=torch.Generator().manual_seed(n)).double()
        numerator = math.ceil((n + 1) * (1 - alpha) - 1e-9)
        level = numerator / n
        expected = math.inf if level > 1 else np.quantile(scores.numpy(), level, method="higher")
        assert conformal_quantile(scores, alpha) == expected
        assert (scores <= expected).sum() >= min(numerator, n)


def test_conformal_quantile_has_no_rounding_error() -> None:
    # In floats, 10 * (1 - 0.7) is 3.0000000000000004, and its ceiling 4.
    assert conformal_quantile(torch.arange(9.0), 0.1) == 8
    assert conformal_quantile(torch.arange(8.0), 0.1) == math.inf
    assert conformal_quantile(torch.arange(19.0), 0.05) == 18
    assert conformal_quantile(torch.arange(9.0), 0.7) == 3  # 3 of 9, then the next higher
    assert conformal_quantile(torch.arange(2.0), 1 / 3) == 1
    assert conformal_quantile(torch.arange(100.0), 1e-12) == math.inf
    assert conformal_quantile(torch.arange(3.0), 1 - 1e-12) <= 1


def test_conformal_quantile_few_samples_is_infinite() -> None:
    probabilities, labels, u = batch()
    for n in range(9):
        tau = conformal_quantile(regularized_scores(probabilities, labels, u, 0.5, 4)[:n], 0.1)
        assert tau == math.inf
        assert prediction_sets(probabilities, tau, u, 0.5, 4).all()


def test_conformal_nan_scores_exclude_no_label() -> None:
    scores = torch.full((20,), math.nan)
    assert conformal_quantile(scores, 0.1) == math.inf
    assert prediction_sets(torch.full((2, 3), math.nan), 0.5, torch.rand(2), 0.5, 1).all()


def pool(size: int = 20_000, classes: int = 10) -> tuple[Tensor, Tensor]:
    """Logits that are twice too sure of themselves, and labels by the probabilities that they should give."""
    random = torch.Generator().manual_seed(5)
    logits = 4 * torch.randn(size, classes, generator=random)
    return logits, torch.multinomial((logits / 2).softmax(1), 1, generator=random).squeeze(1)


@lams
@pytest.mark.parametrize(("calibration", "excess"), [(20, 0.075), (200, 0.03)])
def test_prediction_sets_cover_true_label(lam: float, calibration: int, excess: float) -> None:
    alpha, kappa, draws, test = 0.1, 5, 200, 2000
    logits, labels = pool()
    probabilities = (logits / 1.3).softmax(1)  # of no matter whether the temperature is right
    random = torch.Generator().manual_seed(int(10 * lam) + calibration)
    coverage = torch.empty(draws, dtype=torch.float64)
    for draw in range(draws):
        chosen = torch.randint(len(labels), (calibration + test,), generator=random)
        u = torch.rand(calibration + test, generator=random)
        p, y = probabilities[chosen], labels[chosen]
        scores = regularized_scores(p[:calibration], y[:calibration], u[:calibration], lam, kappa)
        tau = conformal_quantile(scores, alpha)
        sets = prediction_sets(p[calibration:], tau, u[calibration:], lam, kappa)
        coverage[draw] = sets.gather(1, y[calibration:, None]).double().mean()
    error = (coverage.std() / math.sqrt(draws)).item()
    assert coverage.mean().item() >= 1 - alpha - 1.96 * error
    assert coverage.mean().item() <= 1 - alpha + excess


def test_prediction_sets_regularization_reduces_largest_sets() -> None:
    logits, labels = pool(4000)
    probabilities, u = logits.softmax(1), torch.rand(4000, generator=torch.Generator().manual_seed(0))
    largest = []
    for lam in (0.0, 1.0):
        tau = conformal_quantile(regularized_scores(probabilities, labels, u, lam, 5), 0.1)
        largest.append(prediction_sets(probabilities, tau, u, lam, 5).sum(1).max().item())
    assert largest[1] <= 6 < largest[0]


@pytest.mark.parametrize("true", [0.25, 1.0, 2.0, 6.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fit_temperature_recovers_simulated_temperature(true: float, dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(1)
    honest = 2 * torch.randn(20_000, 6, generator=random, dtype=torch.float64)
    labels = torch.multinomial(honest.softmax(1), 1, generator=random).squeeze(1)
    logits = (true * honest).to(dtype)
    fitted = fit_temperature(logits, labels)
    assert fitted == pytest.approx(true, rel=0.03)
    assert fitted == fit_temperature(logits, labels, start=15.0)

    def loss(temperature: float) -> float:
        return torch.nn.functional.cross_entropy(logits.double() / temperature, labels).item()

    assert all(loss(fitted) <= loss(fitted * factor) for factor in (0.5, 0.99, 0.9999, 1.0001, 1.01, 2))


def test_fit_temperature_limits_and_start() -> None:
    logits, first = torch.tensor([[3.0, 0.0, 1.0]] * 4), torch.zeros(4, dtype=torch.long)
    assert fit_temperature(logits, first) == 0.05
    assert fit_temperature(logits, first + 1) == 20.0
    assert fit_temperature(torch.zeros(0, 3), first[:0]) == 1.3
    assert fit_temperature(torch.zeros(0, 3), first[:0], start=2.0) == 2.0
    assert fit_temperature(torch.full((4, 3), 0.1), first) == 1.3
    assert 0.05 <= fit_temperature(torch.tensor([[1e4, -1e4]] * 4), torch.tensor([0, 0, 0, 1])) <= 20.0


def literal_agreement(s: set[int], other: set[int]) -> float:
    return len(s & other) / len(s | other) if len(other) <= len(s) else len(s & other) / len(s)


def test_set_agreement_matches_literal_equation_for_all_pairs() -> None:
    every = torch.tensor([[bool(bits >> c & 1) for c in range(4)] for bits in range(1, 16)])
    proxy, private = every.repeat_interleave(15, 0), every.repeat(15, 1)
    pairs = zip(as_sets(proxy), as_sets(private), strict=True)
    expected = torch.tensor([literal_agreement(s, other) for s, other in pairs])
    torch.testing.assert_close(set_agreement(proxy_sets=proxy, private_sets=private), expected)


@pytest.mark.parametrize("classes", [2, 5, 9])
def test_set_ranking_loss_matches_literal_equation_in_value_and_gradient(classes: int) -> None:
    torch.manual_seed(classes)
    logits = torch.randn(12, classes, dtype=torch.float64)
    sets = torch.rand(12, classes) < 0.5
    sets[:, 0], sets[0] = True, True
    tracked = logits.clone().requires_grad_()
    losses = set_ranking_loss(tracked, sets)
    chosen = sets.tolist()
    expected = [literal_ranking_loss(*row) for row in zip(logits.tolist(), chosen, strict=True)]
    torch.testing.assert_close(losses, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    assert losses[0] == 0
    (gradient,) = torch.autograd.grad(losses.sum(), tracked)
    step = 1e-6
    for i in range(12):
        for c in range(classes):
            sides = []
            for sign in (1, -1):
                row = logits[i].tolist()
                row[c] += sign * step
                sides.append(literal_ranking_loss(row, chosen[i]))
            assert gradient[i, c].item() == pytest.approx((sides[0] - sides[1]) / (2 * step), abs=1e-7)


def test_set_ranking_loss_descent_raises_logits_of_set() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0]], requires_grad=True)
    loss = set_ranking_loss(logits, torch.tensor([[True, False, False]])).sum()
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient.tolist() == [[-1.0, 0.5, 0.5]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_conformal_promotes_half_precision(dtype: torch.dtype) -> None:
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    sets = torch.tensor([[True, False, True]])
    logits = torch.tensor([[1e4, -1e4, 3e4]], dtype=dtype, requires_grad=True)
    loss = set_ranking_loss(logits, sets)
    assert loss.dtype == wanted
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert gradient.isfinite().all()
    assert regularized_scores(logits.softmax(1), torch.tensor([1]), torch.rand(1), 0.5, 1).dtype == wanted
    assert prediction_sets(logits.softmax(1), 0.5, torch.rand(1), 0.5, 1).dtype == torch.bool


def test_conformal_empty_batch_gives_empty_results() -> None:
    nothing, labels = torch.zeros(0, 3), torch.zeros(0, dtype=torch.long)
    assert regularized_scores(nothing, labels, torch.zeros(0), 0.5, 1).shape == (0,)
    assert prediction_sets(nothing, 0.5, torch.zeros(0), 0.5, 1).shape == (0, 3)
    assert set_ranking_loss(nothing, nothing.bool()).shape == (0,)
    assert set_agreement(nothing.bool(), nothing.bool()).shape == (0,)
    assert conformal_quantile(torch.zeros(0), 0.1) == math.inf


@pytest.mark.parametrize("alpha", [0.0, 1.0, -0.1, math.nan])
def test_conformal_quantile_invalid_alpha_raises_value_error(alpha: float) -> None:
    with pytest.raises(ValueError, match=r"alpha: expected a number in \(0, 1\)"):
        conformal_quantile(torch.zeros(20), alpha)


def test_conformal_invalid_arguments_raise_value_error() -> None:
    probabilities, labels, u = batch(4)
    with pytest.raises(ValueError, match=r"uniforms \(4, 1\)"):
        regularized_scores(probabilities, labels, u[:, None], 0.5, 1)
    with pytest.raises(ValueError, match=r"labels \(3,\)"):
        regularized_scores(probabilities, labels[:3], u, 0.5, 1)
    with pytest.raises(ValueError, match="lam: expected at least 0"):
        prediction_sets(probabilities, 0.5, u, -0.1, 1)
    with pytest.raises(ValueError, match=r"scores: expected shape \(n,\)"):
        conformal_quantile(u[:, None], 0.1)
    with pytest.raises(ValueError, match=r"labels \(4, 1\)"):
        fit_temperature(probabilities, labels[:, None])
    with pytest.raises(ValueError, match="logits: expected finite"):
        fit_temperature(probabilities / 0, labels)
    with pytest.raises(ValueError, match="start: expected a finite number above 0"):
        fit_temperature(probabilities, labels, start=0.0)
    with pytest.raises(ValueError, match="expected equal shapes"):
        set_agreement(torch.ones(4, 3).bool(), torch.ones(1, 3).bool())
    with pytest.raises(ValueError, match="expected equal shapes"):
        set_ranking_loss(torch.ones(4, 3), torch.ones(4, 1).bool())
