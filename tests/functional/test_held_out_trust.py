"""Held-out trust against literal transcriptions in float64, and its properties."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedekd.functional import correctness_trust, look_up_trust, skill_trust


def quantile(values: Sequence[float], share: float) -> float:
    """Quantile between order statistics, linearly interpolated."""
    ordered = sorted(values)
    position = share * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])


def bin_of(value: float, edges: Sequence[float]) -> int:
    return sum(edge <= value for edge in edges)


def literal_correctness(logits: Tensor, targets: Tensor, bins: int, s: float) -> tuple[list[float], list[list[float]]]:
    samples = []
    for row, target in zip(logits.tolist(), targets.tolist(), strict=True):
        powers = [math.exp(value - max(row)) for value in row]
        samples.append((row.index(max(row)), max(powers) / sum(powers), row.index(max(row)) == target))
    edges = [quantile([confidence for _, confidence, _ in samples], j / bins) for j in range(1, bins)]

    def count(c: int | None, b: int | None) -> tuple[int, int]:
        found = [right for k, p, right in samples if (c is None or c == k) and (b is None or b == bin_of(p, edges))]
        return len(found), sum(found)

    n, k = count(None, None)
    r = (k + s / 2) / (n + s)
    table = []
    for c in range(logits.shape[1]):
        row = []
        for b in range(bins):
            n_c, k_c = count(c, None)
            n_b, k_b = count(None, b)
            n_cb, k_cb = count(c, b)
            r_c, r_b = (k_c + s * r) / (n_c + s), (k_b + s * r) / (n_b + s)
            row.append((k_cb + s * (r_c + r_b) / 2) / (n_cb + s))
        table.append(row)
    return edges, table


def literal_skill(outputs: Tensor, targets: Tensor, mean: float, bins: int, s: float) -> tuple[list[float], Any]:
    pairs = list(zip(outputs[:, 0].tolist(), targets.tolist(), strict=True))
    edges = [quantile([g for g, _ in pairs], j / bins) for j in range(1, bins)]
    t, v = sum((g - y) ** 2 for g, y in pairs), sum((mean - y) ** 2 for _, y in pairs)
    u = v / len(pairs)
    w = (v + s * u / 2) / (v + t + s * u)
    row = []
    for b in range(bins):
        inside = [(g, y) for g, y in pairs if bin_of(g, edges) == b]
        t_b, v_b = sum((g - y) ** 2 for g, y in inside), sum((mean - y) ** 2 for _, y in inside)
        row.append((v_b + s * u * w) / (v_b + t_b + s * u))
    return edges, [row]


def assert_close(ours: tuple[Tensor, Tensor], literal: tuple[Any, Any]) -> None:
    for mine, expected in zip(ours, literal, strict=True):
        torch.testing.assert_close(mine.double(), torch.tensor(expected).double(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("n", "bins", "strength"), [(1, 4, 4.0), (33, 4, 4.0), (200, 3, 0.5), (40, 1, 20.0)])
def test_correctness_trust_matches_literal_transcription(n: int, bins: int, strength: float) -> None:
    torch.manual_seed(n)
    torch.set_default_dtype(torch.float64)
    try:
        logits, targets = 2 * torch.randn(n, 5), torch.randint(0, 5, (n,))
        logits[torch.arange(n), targets] += 1
        ours = correctness_trust(logits, targets, bins, strength)
        assert_close(ours, literal_correctness(logits, targets, bins, strength))
        outputs, values = torch.randn(n, 1), torch.randn(n)
        values += outputs[:, 0] ** 3
        assert_close(
            skill_trust(outputs, values, 0.3, bins, strength), literal_skill(outputs, values, 0.3, bins, strength)
        )
    finally:
        torch.set_default_dtype(torch.float32)


held_out = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, 3), st.floats(0.1, 9.0)), min_size=0, max_size=40
)  # predicted class, target and height of the largest logit


def tensors(samples: Sequence[tuple[int, int, float]]) -> tuple[Tensor, Tensor]:
    logits = torch.zeros(len(samples), 4, dtype=torch.float64)
    for row, (predicted, _, height) in enumerate(samples):
        logits[row, predicted] = height
    return logits, torch.tensor([target for _, target, _ in samples], dtype=torch.int64)


@given(held_out, st.integers(1, 6), st.floats(0.1, 50.0))
def test_correctness_trust_is_between_0_and_1_and_ignores_order(
    samples: list[tuple[int, int, float]], bins: int, strength: float
) -> None:
    edges, weights = correctness_trust(*tensors(samples), bins, strength)
    assert edges.shape == (bins - 1,)
    assert weights.shape == (4, bins)
    assert ((weights > 0) & (weights < 1)).all()
    for one, other in zip((edges, weights), correctness_trust(*tensors(samples[::-1]), bins, strength), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@given(held_out.filter(len), st.data())
def test_correctness_trust_rises_with_correct_predictions(
    samples: list[tuple[int, int, float]], data: st.DataObject
) -> None:
    index = data.draw(st.integers(0, len(samples) - 1))
    predicted, _, height = samples[index]
    tables = []
    for target in ((predicted + 1) % 4, predicted):
        changed = [*samples[:index], (predicted, target, height), *samples[index + 1 :]]
        logits, targets = tensors(changed)
        edges, weights = correctness_trust(logits, targets)
        tables.append((weights, look_up_trust(logits[index : index + 1], edges, weights)))
    (wrong, of_wrong), (right, of_right) = tables
    assert (right >= wrong).all()
    assert of_right > of_wrong


def test_correctness_trust_one_more_correct_prediction_lowers_no_weight() -> None:
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(40, 4, generator=generator, dtype=torch.float64)
    logits[:, 0] += 1.5  # predictions of the other classes are rare
    predicted = logits.argmax(1)
    targets = torch.where(torch.rand(40, generator=generator) < 0.5, predicted, (predicted + 1) % 4)
    before = correctness_trust(logits, targets)[1]
    for index in (targets != predicted).nonzero()[:, 0]:
        changed = targets.clone()
        changed[index] = predicted[index]
        assert (correctness_trust(logits, changed)[1] >= before).all()


@given(held_out)
def test_correctness_trust_mean_is_near_accuracy(samples: list[tuple[int, int, float]]) -> None:
    logits, targets = tensors(samples * 50)
    if not samples:
        return
    edges, weights = correctness_trust(logits, targets, strength=1.0)
    accuracy = (logits.argmax(1) == targets).double().mean().item()
    # The prior of each of 16 cells moves the sum over its samples by at most its own weight, one sample.
    assert look_up_trust(logits, edges, weights).mean().item() == pytest.approx(accuracy, abs=16 / len(logits) + 1e-9)


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_trust_without_held_out_samples_is_one_half(task: str) -> None:
    empty = torch.empty(0, 3 if task == "classification" else 1)
    targets = torch.empty(0, dtype=torch.int64)
    edges, weights = (
        correctness_trust(empty, targets) if task == "classification" else skill_trust(empty, targets.float(), 0.0)
    )
    assert torch.equal(weights, torch.full((empty.shape[1], 4), 0.5, dtype=torch.float64))
    assert torch.equal(look_up_trust(torch.randn(6, empty.shape[1]), edges, weights), torch.full((6,), 0.5))


pairs = st.lists(st.tuples(st.floats(-9, 9), st.floats(-9, 9)), min_size=1, max_size=30)


@given(pairs, st.floats(-2, 2), st.data())
def test_skill_trust_does_not_fall_with_a_smaller_error(
    samples: list[tuple[float, float]], mean: float, data: st.DataObject
) -> None:
    # Targets are kept, and outputs keep their order: a monotone transformation does not move samples between bins.
    outputs, targets = (torch.tensor(values, dtype=torch.float64) for values in zip(*samples, strict=True))
    before = skill_trust(outputs[:, None], targets, mean, bins=1)[1]
    assert ((before >= 0) & (before <= 1)).all()
    share = data.draw(st.floats(0, 1))
    nearer = targets + share * (outputs - targets)
    assert (skill_trust(nearer[:, None], targets, mean, bins=1)[1] >= before - 1e-12).all()


def test_skill_trust_smaller_error_in_one_bin_lowers_no_weight() -> None:
    outputs = torch.arange(20, dtype=torch.float64)[:, None]
    targets = outputs[:, 0] + torch.randn(20, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 5
    before = skill_trust(outputs, targets, mean=10.0)[1]
    better = outputs.clone()
    better[6] += 0.4 * (targets[6] - outputs[6, 0]).sign()  # too little to change the bin
    after = skill_trust(better, targets, mean=10.0)[1]
    assert (after >= before).all()
    assert after[0, 1] > before[0, 1]


@given(pairs, st.floats(-2, 2), st.floats(0.01, 100))
def test_skill_trust_does_not_depend_on_unit(samples: list[tuple[float, float]], mean: float, unit: float) -> None:
    outputs, targets = (torch.tensor(values, dtype=torch.float64) for values in zip(*samples, strict=True))
    if (targets - mean).square().sum() < 1e-6:
        return
    one = skill_trust(outputs[:, None], targets, mean, bins=1)[1]
    other = skill_trust(unit * outputs[:, None], unit * targets, unit * mean, bins=1)[1]
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_skill_trust_mean_predictor_gets_one_half() -> None:
    targets = torch.randn(40, dtype=torch.float64)
    weights = skill_trust(torch.full((40, 1), 0.2, dtype=torch.float64), targets, mean=0.2)[1]
    torch.testing.assert_close(weights, torch.full_like(weights, 0.5))


def test_trust_leaves_out_samples_that_are_not_finite() -> None:
    torch.manual_seed(1)
    logits, targets = torch.randn(30, 3), torch.randint(0, 3, (30,))
    broken = torch.cat([logits, torch.tensor([[math.nan, 0.0, 1.0], [math.inf, 0.0, 0.0]])])
    with_broken = correctness_trust(broken, torch.cat([targets, torch.tensor([2, 0])]))
    for one, other in zip(correctness_trust(logits, targets), with_broken, strict=True):
        assert torch.equal(one, other)


def test_look_up_trust_is_detached_and_at_least_float32() -> None:
    edges, weights = correctness_trust(torch.randn(30, 3), torch.randint(0, 3, (30,)))
    output = torch.randn(5, 3, dtype=torch.bfloat16, requires_grad=True)
    found = look_up_trust(output, edges, weights)
    assert found.dtype == torch.float32
    assert not found.requires_grad
    assert look_up_trust(output.double(), edges, weights).dtype == torch.float64


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: correctness_trust(torch.zeros(3), torch.zeros(3)), r"logits: expected shape \(B, D\)"),
        (lambda: correctness_trust(torch.zeros(3, 2), torch.zeros(4)), r"targets: expected shape \(3,\)"),
        (lambda: correctness_trust(torch.zeros(3, 2), torch.zeros(3), bins=0), "bins, strength: expected at least 1"),
        (lambda: skill_trust(torch.zeros(3, 1), torch.zeros(3), 0.0, strength=0), "bins, strength"),
        (lambda: skill_trust(torch.zeros(3, 2), torch.zeros(3), 0.0), r"outputs: expected shape \(n, 1\)"),
        (lambda: look_up_trust(torch.zeros(3, 2), torch.zeros(3), torch.zeros(2, 3)), r"weights: expected shape"),
    ],
)
def test_trust_invalid_argument_raises_value_error(call: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()
