from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedekd.metrics import ReliabilityBin, expected_calibration_error, reliability

samples = st.lists(
    st.tuples(st.one_of(st.floats(0, 1), st.sampled_from([k / 10 for k in range(11)])), st.booleans()), max_size=40
)


def tensors(pairs: list[tuple[float, bool]]) -> tuple[Tensor, Tensor]:
    confidence, correct = zip(*pairs, strict=True) if pairs else ((), ())
    return torch.tensor(confidence, dtype=torch.float64), torch.tensor(correct, dtype=torch.bool)


def literal_bins(pairs: list[tuple[float, bool]], bins: int) -> list[ReliabilityBin]:
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64).tolist()
    expected = []
    for low, high in pairwise(edges):
        members = [(c, right) for c, right in pairs if low <= c < high or c == high == 1]
        if members:
            n = len(members)
            mean, accuracy = sum(c for c, _ in members) / n, sum(right for _, right in members) / n
            expected.append(ReliabilityBin(low, high, n, mean, accuracy))
    return expected


@given(pairs=samples, bins=st.integers(1, 20))
def test_reliability_and_error_equal_literal_definition(pairs: list[tuple[float, bool]], bins: int) -> None:
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


def test_inner_edge_belongs_to_bin_above_and_one_to_last_bin() -> None:
    confidence, correct = torch.tensor([0.0, 0.75, 0.875, 1.0]), torch.tensor([False, True, False, True])
    first, last = reliability(confidence, correct, bins=4)
    assert first == ReliabilityBin(0.0, 0.25, 1, 0.0, 0.0)
    assert last == ReliabilityBin(0.75, 1.0, 3, 0.875, 2 / 3)
    assert expected_calibration_error(confidence, correct, bins=4) == pytest.approx(3 / 4 * (0.875 - 2 / 3), abs=1e-15)


def test_error_calibrated_classifier_is_zero_and_overconfident_is_its_gap() -> None:
    torch.manual_seed(0)
    confidence = torch.rand(200_000, dtype=torch.float64)
    correct = torch.rand(200_000, dtype=torch.float64) < confidence
    assert expected_calibration_error(confidence, correct) < 0.01
    assert expected_calibration_error(confidence, correct.logical_not()) == pytest.approx(0.5, abs=0.01)
    assert expected_calibration_error(confidence.sqrt(), correct) == pytest.approx(2 / 3 - 1 / 2, abs=0.01)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_reliability_low_precision_input_means_in_float64(dtype: torch.dtype) -> None:
    confidence = torch.full((1000,), 0.3, dtype=dtype, requires_grad=True)
    (only,) = reliability(confidence, torch.arange(1000) < 300)
    assert only.confidence == pytest.approx(confidence[0].item(), abs=1e-12)
    assert only.accuracy == 0.3


def test_nan_confidence_gives_nan_error_and_is_counted() -> None:
    confidence, correct = torch.tensor([0.2, math.nan]), torch.tensor([True, True])
    assert math.isnan(expected_calibration_error(confidence, correct))
    assert sum(part.count for part in reliability(confidence, correct)) == 2


def test_no_samples_give_no_bins_and_nan_error() -> None:
    none = torch.zeros(0)
    assert reliability(none, none.bool()) == []
    assert math.isnan(expected_calibration_error(none, none.bool()))


def test_invalid_arguments_raise_value_error() -> None:
    half, right = torch.full((4,), 0.5), torch.ones(4, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"confidence \(4,\), correct \(3,\)"):
        expected_calibration_error(half, right[:3])
    with pytest.raises(ValueError, match=r"confidence \(4,\), correct \(4, 1\)"):
        expected_calibration_error(half, right[:, None])
    with pytest.raises(ValueError, match=r"expected shape \(N,\), got \(4, 1\)"):
        reliability(half[:, None], right[:, None])
    with pytest.raises(ValueError, match=r"correct: expected bool, got torch.int64"):
        reliability(half, right.long())
    with pytest.raises(ValueError, match="bins: expected at least 1, got 0"):
        reliability(half, right, bins=0)
    with pytest.raises(ValueError, match=r"confidence: expected values in \[0, 1\], got 0.5 to 1.5"):
        reliability(torch.tensor([0.5, 1.5]), right[:2])
