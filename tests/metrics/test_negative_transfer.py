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
def test_both_conventions_equal_numpy(pairs: list[tuple[float, float]]) -> None:
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


def test_harm_is_a_loss_of_accuracy_but_a_gain_of_rmse() -> None:
    method, local = [0.9, 0.5, 0.7], [0.8, 0.7, 0.7]
    accuracy, rmse = (
        negative_transfer(method, local, "classification"),
        negative_transfer(method, local, "regression"),
    )
    assert accuracy["worst"].item() == pytest.approx(-0.2)
    assert accuracy["p10"].item() == pytest.approx(-0.16)
    assert rmse["worst"].item() == pytest.approx(0.1)
    assert rmse["p90"].item() == pytest.approx(0.08)


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_the_metric_is_its_functional_twin_however_clients_arrive(task: str) -> None:
    method, local = torch.rand(2, 6, dtype=torch.float64)
    expected = negative_transfer(method, local, task)  # type: ignore[arg-type]
    at_once, in_parts = NegativeTransfer(task), NegativeTransfer(task)  # type: ignore[arg-type]
    at_once.update(method, local)
    in_parts.update(method[:4].tolist(), local[:4].tolist())
    in_parts.update(method[4], local[4])
    in_parts.update(method[5:], local[5:])
    for metric in (at_once, in_parts):
        for name, value in metric.compute().items():
            assert torch.equal(value, expected[name])
    in_parts.reset()
    in_parts.update([1.0], [0.5])
    assert in_parts.compute()["client"].reshape(-1).tolist() == [0.5]


def test_scores_are_not_rounded_to_float32() -> None:
    metric = NegativeTransfer()
    metric.update([0.1 + 1e-12], [0.1])
    assert metric.compute()["avg"].item() == pytest.approx(1e-12, rel=1e-3)


def test_a_missing_score_is_not_dropped_silently() -> None:
    result = negative_transfer([0.5, float("nan")], [0.4, 0.3])
    assert all(result[name].isnan() for name in ("avg", "worst", "p10"))


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match=r"shape \(2,\) and local_scores \(3,\)"):
        negative_transfer([1.0, 2.0], [1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="at least one client"):
        negative_transfer([], [])
    with pytest.raises(ValueError, match="method_scores has shape"):
        NegativeTransfer().update([1.0], [1.0, 2.0])
    with pytest.raises(UserError, match="did you mean 'regression'"):
        NegativeTransfer(task="regresion")  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_a_metric_without_clients_has_nothing_to_compute() -> None:
    with pytest.raises(ValueError, match="at least one client"):
        NegativeTransfer().compute()
