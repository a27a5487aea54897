from __future__ import annotations

import math
from dataclasses import FrozenInstanceError

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torchmetrics.functional.classification import multiclass_calibration_error

from fedekd.metrics import ReliabilityBin, expected_calibration_error, reliability

samples = st.lists(
    st.tuples(st.one_of(st.floats(0, 1), st.sampled_from([k / 10 for k in range(11)])), st.booleans()), max_size=40
)


def tensors(pairs: list[tuple[float, bool]]) -> tuple[Tensor, Tensor]:
    confidence, correct = zip(*pairs, strict=True) if pairs else ((), ())
    return torch.tensor(confidence, dtype=torch.float64), torch.tensor(correct, dtype=torch.bool)


def literal_bins(pairs: list[tuple[float, bool]], bins: int) -> list[ReliabilityBin]:
    found = []
    for m in range(1, bins + 1):
        low, high = (m - 1) / bins, m / bins
        members = [(c, right) for c, right in pairs if low < c <= high or (m == 1 and c == 0)]
        if members:
            n = len(members)
            mean, accuracy = sum(c for c, _ in members) / n, sum(right for _, right in members) / n
            found.append(ReliabilityBin(low, high, n, mean, accuracy))
    return found


@given(pairs=samples, bins=st.integers(1, 20))
def test_bins_equal_the_literal_definition(pairs: list[tuple[float, bool]], bins: int) -> None:
    filled, expected = reliability(*tensors(pairs), bins), literal_bins(pairs, bins)
    assert [(part.low, part.high, part.count) for part in filled] == [(e.low, e.high, e.count) for e in expected]
    assert [part.accuracy for part in filled] == [e.accuracy for e in expected]
    assert [part.confidence for part in filled] == pytest.approx([e.confidence for e in expected], abs=1e-15)
    error = expected_calibration_error(*tensors(pairs), bins)
    if not pairs:
        assert math.isnan(error)
        return
    weighted = sum(e.count / len(pairs) * abs(e.accuracy - e.confidence) for e in expected)
    assert error == pytest.approx(weighted, abs=1e-14)
    assert type(error) is float
    assert 0 <= error <= 1


@pytest.mark.parametrize("classes", [2, 5, 100])
@pytest.mark.parametrize("bins", [1, 10, 15])
@pytest.mark.parametrize("sharpness", [0.5, 3.0])
def test_equals_torchmetrics_away_from_the_edges(classes: int, bins: int, sharpness: float) -> None:
    torch.manual_seed(classes)
    logits, labels = sharpness * torch.randn(500, classes), torch.randint(classes, (500,))
    labels[::2] = logits[::2].argmax(dim=1)
    probabilities = logits.softmax(dim=1)
    confidence, predicted = probabilities.max(dim=1)
    away = ((confidence * bins - (confidence * bins).round()).abs() > 1e-5).nonzero().squeeze(1)
    assert len(away) > 400
    theirs = multiclass_calibration_error(probabilities[away], labels[away], classes, n_bins=bins, norm="l1")
    ours = expected_calibration_error(confidence[away], (predicted == labels)[away], bins)
    assert ours == pytest.approx(theirs.item(), abs=1e-6)  # theirs is summed in float32


def test_an_edge_belongs_to_the_bin_below_as_in_the_paper_and_not_above_as_in_torchmetrics() -> None:
    probabilities = torch.tensor([[0.75, 0.25], [0.875, 0.125]])
    labels, confidence = torch.tensor([0, 1]), torch.tensor([0.75, 0.875])
    correct = torch.tensor([True, False])
    assert [part.high for part in reliability(confidence, correct, bins=4)] == [0.75, 1.0]
    assert expected_calibration_error(confidence, correct, bins=4) == (0.25 + 0.875) / 2
    together = multiclass_calibration_error(probabilities, labels, 2, n_bins=4, norm="l1").item()
    assert together == abs(1 / 2 - (0.75 + 0.875) / 2)


def test_the_ends_have_a_bin() -> None:
    low, high = reliability(torch.tensor([0.0, 1.0]), torch.tensor([False, True]))
    assert low == ReliabilityBin(0.0, 1 / 15, 1, 0.0, 0.0)
    assert high == ReliabilityBin(14 / 15, 1.0, 1, 1.0, 1.0)
    with pytest.raises(FrozenInstanceError):
        low.count = 2  # type: ignore[misc]


def test_a_calibrated_classifier_has_no_error_and_a_boaster_what_it_boasts() -> None:
    torch.manual_seed(0)
    confidence = torch.rand(200_000, dtype=torch.float64)
    correct = torch.rand(200_000, dtype=torch.float64) < confidence
    assert expected_calibration_error(confidence, correct) < 0.01
    assert expected_calibration_error(confidence, correct.logical_not()) == pytest.approx(0.5, abs=0.01)
    assert expected_calibration_error(confidence.sqrt(), correct) == pytest.approx(2 / 3 - 1 / 2, abs=0.01)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_means_are_taken_in_double_precision(dtype: torch.dtype) -> None:
    confidence = torch.full((1000,), 0.3, dtype=dtype, requires_grad=True)
    (only,) = reliability(confidence, torch.arange(1000) < 300)
    assert only.confidence == pytest.approx(confidence[0].item(), abs=1e-12)
    assert only.accuracy == 0.3


def test_a_missing_confidence_is_not_dropped_silently() -> None:
    confidence, correct = torch.tensor([0.2, math.nan]), torch.tensor([True, True])
    assert math.isnan(expected_calibration_error(confidence, correct))
    assert sum(part.count for part in reliability(confidence, correct)) == 2


def test_no_samples_have_no_error() -> None:
    none = torch.zeros(0)
    assert reliability(none, none.bool()) == []
    assert math.isnan(expected_calibration_error(none, none.bool()))


def test_mistakes_are_named() -> None:
    half, right = torch.full((4,), 0.5), torch.ones(4, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"confidence \(4,\), correct \(3,\)"):
        expected_calibration_error(half, right[:3])
    with pytest.raises(ValueError, match=r"shapes differ"):
        expected_calibration_error(half, right[:, None])
    with pytest.raises(ValueError, match=r"must have shape \(N,\), but has \(4, 1\)"):
        reliability(half[:, None], right[:, None])
    with pytest.raises(ValueError, match=r"correct must be bool, but is torch.int64"):
        reliability(half, right.long())
    with pytest.raises(ValueError, match="bins must be at least 1, but is 0"):
        reliability(half, right, bins=0)
    with pytest.raises(ValueError, match=r"confidence must lie in \[0, 1\], but spans 0.5 to 1.5"):
        reliability(torch.tensor([0.5, 1.5]), right[:2])
