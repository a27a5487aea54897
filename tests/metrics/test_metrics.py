from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
import torch
from sklearn import metrics as sklearn_metrics
from torch import Tensor

from fedekd.errors import LONGEST_ERROR, UserError
from fedekd.metrics import (
    METRICS,
    column_names,
    compute_metrics,
    is_undefined,
    missing_classes,
    negative_transfer,
    select_metrics,
)

CLASSES = 4


def outputs_and_labels(samples: int = 60) -> tuple[Tensor, Tensor]:
    torch.manual_seed(3)
    logits = torch.randn(samples, CLASSES).round(decimals=1)  # with ties
    return logits, torch.cat([torch.arange(CLASSES), torch.randint(CLASSES, (samples - CLASSES,))])


def slow_recall(logits: Tensor, labels: Tensor) -> list[float]:
    predicted = [row.index(max(row)) for row in logits.tolist()]
    pairs = list(zip(labels.tolist(), predicted, strict=True))
    of_class = [[guess for label, guess in pairs if label == c] for c in range(CLASSES)]
    return [sum(guess == c for guess in guesses) / len(guesses) for c, guesses in enumerate(of_class)]


def slow_macro_f1(logits: Tensor, labels: Tensor) -> float:
    pairs = list(zip(labels.tolist(), logits.argmax(1).tolist(), strict=True))
    total = 0.0
    for c in range(CLASSES):
        true = sum(label == c == guess for label, guess in pairs)
        false_positive = sum(label != c == guess for label, guess in pairs)
        false_negative = sum(label == c != guess for label, guess in pairs)
        total += 2 * true / (2 * true + false_positive + false_negative)
    return total / CLASSES


def slow_auroc(logits: Tensor, labels: Tensor) -> float:
    probabilities, areas = logits.double().softmax(1), []
    for c in range(CLASSES):
        positive, negative = probabilities[labels == c, c].tolist(), probabilities[labels != c, c].tolist()
        wins = [(p > n) + 0.5 * (p == n) for p, n in product(positive, negative)]
        areas.append(sum(wins) / len(wins))
    return sum(areas) / CLASSES


def slow_ece(logits: Tensor, labels: Tensor) -> float:
    bins: dict[int, list[tuple[float, bool]]] = {}
    for row, label in zip(logits.double().softmax(1).tolist(), labels.tolist(), strict=True):
        confidence = max(row)
        bins.setdefault(math.floor(15 * confidence), []).append((confidence, row.index(confidence) == label))
    gaps = [abs(sum(c for c, _ in items) - sum(right for _, right in items)) for items in bins.values()]
    return sum(gaps) / len(labels)


def slow_kappa(outputs: Tensor, grades: Tensor) -> float:
    predicted = [min(max(round(value), 0), CLASSES - 1) for value in outputs.tolist()]
    expected = [int(grade) for grade in grades.tolist()]
    n = len(expected)
    observed = sum((a - b) ** 2 for a, b in zip(expected, predicted, strict=True)) / n
    chance = sum((a - b) ** 2 for a, b in product(expected, predicted)) / n**2
    return 1 - observed / chance


def test_metrics_of_classification_equal_slow_reference() -> None:
    logits, labels = outputs_and_labels()
    values = compute_metrics(logits, labels, "classification", CLASSES)
    expected = {
        "accuracy": sum(logits.argmax(1) == labels).item() / len(labels),
        "balanced_accuracy": sum(slow_recall(logits, labels)) / CLASSES,
        "macro_f1": slow_macro_f1(logits, labels),
        "auroc": slow_auroc(logits, labels),
        **{f"recall/{c}": value for c, value in enumerate(slow_recall(logits, labels))},
        "ece": slow_ece(logits, labels),
    }
    assert values == pytest.approx(expected, rel=1e-12)
    assert list(values) == list(expected)


def test_metrics_of_classification_equal_scikit_learn() -> None:
    logits, labels = outputs_and_labels()
    predicted = logits.argmax(1)
    values = compute_metrics(logits, labels, "classification", CLASSES)
    assert values["balanced_accuracy"] == pytest.approx(sklearn_metrics.balanced_accuracy_score(labels, predicted))
    assert values["macro_f1"] == pytest.approx(sklearn_metrics.f1_score(labels, predicted, average="macro"))
    probabilities = logits.double().softmax(1)
    assert values["auroc"] == pytest.approx(
        sklearn_metrics.roc_auc_score(labels, probabilities, multi_class="ovr"), rel=1e-12
    )


def test_auroc_two_classes_is_that_of_one_score() -> None:
    torch.manual_seed(4)
    logits, labels = torch.randn(50, 2), torch.arange(50) % 2
    margin = (logits[:, 1] - logits[:, 0]).double()
    expected = sklearn_metrics.roc_auc_score(labels, margin)
    assert compute_metrics(logits, labels, "classification", 2)["auroc"] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("classes", [2, 3])
def test_auroc_ranks_samples_whose_probability_rounds_to_one(classes: int) -> None:
    torch.manual_seed(4)
    labels = torch.arange(200) % classes
    margin = 40 + 30 * torch.rand(200, dtype=torch.float64) + 10 * (labels == 0)
    logits = torch.stack([margin, *torch.zeros(classes - 1, 200, dtype=torch.float64)], dim=1)
    value = compute_metrics(logits, labels, "classification", classes)["auroc"]
    area = sklearn_metrics.roc_auc_score(labels == 0, margin)
    # The other classes have equal logits: their probabilities fall with the margin.
    areas = [area, *(sklearn_metrics.roc_auc_score(labels == c, -margin) for c in range(1, classes))]
    assert value == pytest.approx(sum(areas) / classes, rel=1e-12)


@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("decimals", [6, 0, -3])  # distinct, with ties, all equal
def test_auroc_equals_scikit_learn(classes: int, decimals: int) -> None:
    torch.manual_seed(8)
    logits, labels = torch.randn(80, classes).round(decimals=decimals), torch.arange(80) % classes
    is_class = torch.nn.functional.one_hot(labels, classes)
    scores = logits.double().softmax(1).round(decimals=12)  # equal logits in another order are a tie
    expected = sklearn_metrics.roc_auc_score(is_class, scores, average="macro")
    assert compute_metrics(logits, labels, "classification", classes)["auroc"] == pytest.approx(expected, rel=1e-12)


def test_metrics_of_regression_equal_slow_reference() -> None:
    torch.manual_seed(5)
    grades = torch.randint(CLASSES, (40,)).float()
    outputs = 2 * torch.randn(40, 1) + grades[:, None]
    predicted, expected = outputs[:, 0].double().numpy(), grades.double().numpy()
    errors = predicted - expected
    values = compute_metrics(outputs, grades, "regression", CLASSES)
    reference = {
        "rmse": np.sqrt(np.mean(errors**2)),
        "mae": np.mean(np.abs(errors)),
        "r2": 1 - np.sum(errors**2) / np.sum((expected - expected.mean()) ** 2),
        "quadratic_kappa": slow_kappa(outputs[:, 0], grades),
    }
    assert values == pytest.approx(reference, rel=1e-12)
    assert "quadratic_kappa" not in compute_metrics(outputs, grades, "regression", 0)


def test_metrics_missing_class_is_nan_only_where_it_counts() -> None:
    logits, labels = outputs_and_labels()
    kept = labels != 2
    values = compute_metrics(logits[kept], labels[kept], "classification", CLASSES)
    undefined = {key for key, value in values.items() if math.isnan(value)}
    assert undefined == {"balanced_accuracy", "macro_f1", "auroc", "recall/2"}
    assert missing_classes("classification", values, values) == [2]
    assert is_undefined("auroc", "classification", values)
    diverged = dict.fromkeys(values, math.nan)
    assert is_undefined("auroc", "classification", diverged, values)
    assert missing_classes("classification", diverged, values) == [2]


def test_metrics_equal_targets_leave_r2_and_kappa_undefined() -> None:
    values = compute_metrics(torch.ones(5, 1), torch.ones(5), "regression", 3)
    assert values["mae"] == 0.0
    assert math.isnan(values["r2"])
    assert math.isnan(values["quadratic_kappa"])
    assert compute_metrics(torch.zeros(5, 1), torch.ones(5), "regression", 3)["quadratic_kappa"] == 0.0


@pytest.mark.parametrize(("scale", "offset"), [(1e-4, 0.0), (1e-4, 1e4), (1.0, 1e8)])
def test_r2_small_scale_or_large_offset_equals_scikit_learn(scale: float, offset: float) -> None:
    torch.manual_seed(6)
    targets = offset + scale * torch.randn(30, dtype=torch.float64)
    outputs = targets + 0.5 * scale * torch.randn(30, dtype=torch.float64)
    expected = sklearn_metrics.r2_score(targets, outputs)
    assert 0.5 < expected < 0.9
    assert compute_metrics(outputs, targets, "regression", 0)["r2"] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("output", [math.inf, math.nan])
def test_metrics_non_finite_output_is_nan_and_not_undefined(output: float) -> None:
    logits, labels = outputs_and_labels()
    logits[3, 1] = output
    values = compute_metrics(logits, labels, "classification", CLASSES)
    assert all(math.isnan(value) for value in values.values())
    assert not any(is_undefined(key, "classification", values) for key in values)
    broken = compute_metrics(torch.tensor([[output], [0.0]]), torch.tensor([0.0, 1.0]), "regression", 2)
    assert all(math.isnan(value) for value in broken.values())


def test_select_metrics_default_is_primary_then_others() -> None:
    names = [row.name for row in select_metrics(None, "classification", 3)]
    assert names == ["accuracy", "balanced_accuracy", "macro_f1", "auroc", "recall", "ece"]
    assert [row.name for row in select_metrics(None, "regression", 0)] == ["rmse", "mae", "r2"]
    assert [row.name for row in select_metrics(None, "regression", 5)] == ["rmse", "mae", "r2", "quadratic_kappa"]
    assert "recall" not in [row.name for row in select_metrics(None, "classification", 21)]
    assert [row.name for row in select_metrics(["ece", "recall"], "classification", 21)] == ["ece", "recall"]


@pytest.mark.parametrize(
    ("names", "task", "classes", "message"),
    [
        ([], "classification", 3, "metrics: expected at least one metric, or null, got []. Name a metric, or remove"),
        (["acuracy"], "classification", 3, "got 'acuracy'. Did you mean 'accuracy'"),
        (["x"], "regression", 0, "metrics: expected metrics of regression, got 'x'. Choose from: mae, r2, rmse."),
        (
            ["auroc"],
            "regression",
            0,
            "metrics: expected metrics of regression, got 'auroc'. Choose from: rmse, mae, r2",
        ),
        (["quadratic_kappa"], "regression", 0, "of real-valued targets, got 'quadratic_kappa'. Choose from: rmse, mae"),
        (["rmse", "rmse"], "regression", 0, "each metric once, got ['rmse', 'rmse']. Remove one 'rmse'"),
        (["recall", "ece"], "classification", 3, "first a metric with one value, got 'recall'. Name another metric"),
        (["accuracy", "recall"], "classification", 300, "expected metrics with one value for more than 256 classes"),
    ],
)
def test_select_metrics_invalid_names_raise_one_line(names: list[str], task: str, classes: int, message: str) -> None:
    with pytest.raises(UserError) as error:
        select_metrics(names, task, classes)  # type: ignore[arg-type]
    text = str(error.value)
    assert message in text
    assert "\n" not in text
    assert len(text) <= LONGEST_ERROR


def test_column_names_of_classes_are_plain_and_distinct() -> None:
    names = column_names([METRICS["auroc"], METRICS["recall"]], ["a b", "a/b", "\u00e9", "x" * 99])
    assert names["auroc"] == "auroc"
    assert list(names.values())[1:] == ["recall/a_b_0", "recall/a_b_1", "recall/__2", f"recall/{'x' * 32}"]


def test_negative_transfer_metric_decides_direction() -> None:
    delta = negative_transfer([0.2, 0.5], [0.1, 0.1], "classification", METRICS["ece"])
    assert delta["worst"].item() == pytest.approx(0.4)
    assert "p90" in delta
