from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, root_mean_squared_error
from torchmetrics.functional.classification import multiclass_accuracy

from fedekd.errors import UserError
from fedekd.metrics import METRICS, primary_metric, score
from fedekd.tasks import TASKS


def test_accuracy_equals_two_other_libraries() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(101, 5), torch.randint(5, (101,))
    value = score(logits, labels, "classification")
    assert type(value) is float
    assert value == accuracy_score(labels.numpy(), logits.argmax(1).numpy())
    assert value == pytest.approx(multiclass_accuracy(logits, labels, 5, average="micro").item(), rel=1e-6)


def test_accuracy_is_a_ratio_in_double_precision() -> None:
    assert score(torch.eye(3), torch.tensor([0, 0, 0]), "classification") == 1 / 3
    assert score(torch.eye(3).bfloat16(), torch.tensor([0, 1, 0]), "classification") == 2 / 3


@pytest.mark.parametrize("shape", [(50,), (50, 1)])
def test_rmse_equals_scikit_learn_whatever_the_column(shape: tuple[int, ...]) -> None:
    torch.manual_seed(1)
    outputs, targets = 1000 + torch.randn(50), 1000 + torch.randn(50)
    expected = root_mean_squared_error(targets.double().numpy(), outputs.double().numpy())
    value = score(outputs.reshape(shape), targets, "regression")
    assert type(value) is float
    assert value == pytest.approx(expected, rel=1e-12)
    assert score(outputs, targets.reshape(shape), "regression") == value


def test_rmse_takes_integer_targets() -> None:
    assert score(torch.tensor([[1.0], [2.0]]), torch.tensor([4, 2]), "regression") == pytest.approx(np.sqrt(4.5))


def test_no_samples_have_no_score() -> None:
    assert math.isnan(score(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long), "classification"))
    assert math.isnan(score(torch.zeros(0, 1), torch.zeros(0), "regression"))


@pytest.mark.parametrize("output", [math.inf, -math.inf, math.nan])
def test_a_model_that_has_diverged_has_no_score(output: float) -> None:
    assert math.isnan(score(torch.tensor([[output, 0.0], [0.0, 1.0]]), torch.tensor([0, 1]), "classification"))
    assert math.isnan(score(torch.tensor([[output], [0.0]]), torch.tensor([0.0, 1.0]), "regression"))


def test_primary_metric_is_accuracy_or_rmse() -> None:
    assert [primary_metric(task).name for task in TASKS] == ["accuracy", "rmse"]
    assert all(name == row.name for name, row in METRICS.items())


def test_metric_spec_worst_follows_direction() -> None:
    assert primary_metric("classification").worst([0.5, 0.25]) == 0.25
    assert primary_metric("regression").worst([0.5, 0.25]) == 0.5
    assert math.isnan(primary_metric("regression").worst([0.5, math.nan]))


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="RMSE needs outputs"):
        score(torch.zeros(4, 2), torch.zeros(4), "regression")
    with pytest.raises(ValueError, match="RMSE needs targets"):
        score(torch.zeros(4, 1), torch.zeros(3), "regression")
    with pytest.raises(ValueError, match="accuracy needs"):
        score(torch.zeros(4, 2), torch.zeros(4, 1), "classification")
    with pytest.raises(UserError, match="did you mean 'classification'"):
        score(torch.zeros(4, 2), torch.zeros(4), "clasification")  # type: ignore[arg-type]
