from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedekd.errors import UserError
from fedekd.metrics import NegativeTransfer, negative_transfer

scores = st.lists(st.tuples(st.floats(0, 2), st.floats(0, 2)), min_size=1, max_size=12)


@given(scores)
def test_negative_transfer_either_task_equals_numpy(pairs: list[tuple[float, float]]) -> None:
    method, local = (list(column) for column in zip(*pairs, strict=True))
    delta = np.array(method) - np.array(local)
    for task, name, percent, worst in (
        ("classification", "p10", 10, delta.min()),
        ("regression", "p90", 90, delta.max()),
    ):
        result = negative_transfer(method, local, task)  # type: ignore[arg-type]
        assert set(result) == {"avg", "worst", name, "client"}
        assert all(value.dtype == torch.float64 for value in result.values())
        np.testing.assert_array_equal(result["client"].numpy(), delta)
        assert result["worst"].item() == worst
        assert result["avg"].item() == pytest.approx(delta.mean(), abs=1e-15)
        assert result[name].item() == pytest.approx(np.percentile(delta, percent), abs=1e-15)


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_metric_updated_in_parts_equals_function(task: str) -> None:
    method, local = torch.rand(2, 6, dtype=torch.float64)
    expected = negative_transfer(method, local, task)  # type: ignore[arg-type]
    single_update, several_updates = NegativeTransfer(task), NegativeTransfer(task)  # type: ignore[arg-type]
    single_update.update(method, local)
    several_updates.update(method[:4].tolist(), local[:4].tolist())
    several_updates.update(method[4], local[4])
    several_updates.update(method[5:], local[5:])
    for metric in (single_update, several_updates):
        for name, value in metric.compute().items():
            assert torch.equal(value, expected[name])
    several_updates.reset()
    several_updates.update([1.0], [0.5])
    assert several_updates.compute()["avg"].tolist() == 0.5


def test_metric_keeps_scores_in_float64() -> None:
    metric = NegativeTransfer()
    metric.update([0.1 + 1e-12], [0.1])
    assert metric.compute()["avg"].item() == pytest.approx(1e-12, rel=1e-3)


def test_negative_transfer_nan_score_makes_every_summary_nan() -> None:
    result = negative_transfer([0.5, float("nan")], [0.4, 0.3])
    assert all(result[name].isnan() for name in ("avg", "worst", "p10"))


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_invalid_scores_or_task_raise() -> None:
    with pytest.raises(ValueError, match=r"shape \(2,\) and local_scores of shape \(3,\)"):
        negative_transfer([1.0, 2.0], [1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="method_scores of shape"):
        NegativeTransfer().update([1.0], [1.0, 2.0])
    for empty in (lambda: negative_transfer([], []), NegativeTransfer().compute):
        with pytest.raises(ValueError, match="at least one client"):
            empty()
    with pytest.raises(UserError, match="Did you mean 'regression'"):
        NegativeTransfer(task="regresion")  # type: ignore[arg-type]
