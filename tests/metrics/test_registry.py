from __future__ import annotations

import ast
import json
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, root_mean_squared_error
from torch import Tensor
from torchmetrics.classification import MulticlassAccuracy
from torchmetrics.functional.classification import multiclass_accuracy

import fedekd
from fedekd import metrics
from fedekd.cli import main
from fedekd.errors import UserError
from fedekd.metrics import METRICS, MetricSpec, build_metrics, negative_transfer, primary_metric, registry, score
from fedekd.tasks import TASKS, Task

#: Where accuracy is a column of early exits: the complement of an exit's error rate, not a score of `METRICS`.
OF_EXITS = (
    *("early_exit", "benchmark/results.py", "cli/calibrate_output.py"),
    *("reporting/run_report.py", "reporting/wandb_logger.py"),
)

#: The tests of do no harm have a registry of their own, `fedekd.do_no_harm.evidence.METRICS`.
OF_HARM = ("do_no_harm", "reporting/rows.py")


def test_accuracy_equals_two_other_libraries() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(101, 5), torch.randint(5, (101,))
    value = score(logits, labels, "classification")
    assert type(value) is float
    assert value == accuracy_score(labels.numpy(), logits.argmax(1).numpy())
    assert value == pytest.approx(multiclass_accuracy(logits, labels, 5, average="micro").item(), rel=1e-6)


def test_accuracy_any_dtype_is_float64_ratio() -> None:
    assert score(torch.eye(3), torch.tensor([0, 0, 0]), "classification") == 1 / 3
    assert score(torch.eye(3).bfloat16(), torch.tensor([0, 1, 0]), "classification") == 2 / 3


@pytest.mark.parametrize("shape", [(50,), (50, 1)])
def test_rmse_either_shape_equals_scikit_learn(shape: tuple[int, ...]) -> None:
    torch.manual_seed(1)
    outputs, targets = 1000 + torch.randn(50), 1000 + torch.randn(50)
    expected = root_mean_squared_error(targets.double().numpy(), outputs.double().numpy())
    value = score(outputs.reshape(shape), targets, "regression")
    assert type(value) is float
    assert value == pytest.approx(expected, rel=1e-12)
    assert score(outputs, targets.reshape(shape), "regression") == value


def test_rmse_accepts_integer_targets() -> None:
    assert score(torch.tensor([[1.0], [2.0]]), torch.tensor([4, 2]), "regression") == pytest.approx(np.sqrt(4.5))


def test_score_no_samples_is_nan() -> None:
    assert math.isnan(score(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long), "classification"))
    assert math.isnan(score(torch.zeros(0, 1), torch.zeros(0), "regression"))


@pytest.mark.parametrize("output", [math.inf, -math.inf, math.nan])
def test_score_non_finite_output_is_nan(output: float) -> None:
    assert math.isnan(score(torch.tensor([[output, 0.0], [0.0, 1.0]]), torch.tensor([0, 1]), "classification"))
    assert math.isnan(score(torch.tensor([[output], [0.0]]), torch.tensor([0.0, 1.0]), "regression"))


def test_primary_metric_is_accuracy_or_rmse() -> None:
    assert [primary_metric(task).name for task in TASKS] == ["accuracy", "rmse"]
    assert [primary_metric(task).tail for task in TASKS] == ["p10", "p90"]
    assert all(name == row.name for name, row in METRICS.items())


@pytest.mark.parametrize("task", TASKS)
def test_metric_torchmetric_equals_function(task: Task) -> None:
    row = primary_metric(task)
    torch.manual_seed(2)
    outputs = torch.randn(40, 3) if row.task == "classification" else torch.randn(40)
    targets = torch.randint(3, (40,)) if row.task == "classification" else torch.randn(40)
    metrics = build_metrics(row.task)
    for part in (slice(0, 32), slice(32, None)):
        metrics.update(outputs[part], targets[part])
    assert metrics.compute()[row.name].item() == pytest.approx(row.function(outputs, targets, 3), rel=1e-6)


def test_metric_spec_worst_follows_direction() -> None:
    assert primary_metric("classification").worst([0.5, 0.25]) == 0.25
    assert primary_metric("regression").worst([0.5, 0.25]) == 0.5
    assert math.isnan(primary_metric("regression").worst([0.5, math.nan]))


def test_score_invalid_shapes_or_task_raise() -> None:
    with pytest.raises(ValueError, match="RMSE: expected outputs"):
        score(torch.zeros(4, 2), torch.zeros(4), "regression")
    with pytest.raises(ValueError, match="RMSE: expected targets"):
        score(torch.zeros(4, 1), torch.zeros(3), "regression")
    with pytest.raises(ValueError, match="accuracy: expected logits"):
        score(torch.zeros(4, 2), torch.zeros(4, 1), "classification")
    with pytest.raises(UserError, match="Did you mean 'classification'"):
        score(torch.zeros(4, 2), torch.zeros(4), "clasification")  # type: ignore[arg-type]


def quoted_keys(path: Path) -> Iterator[str]:
    """String literals of a module that are a metric's key, or a path such as `client_0/accuracy` that ends in one."""
    for node in ast.walk(ast.parse(path.read_text())):
        is_text = isinstance(node, ast.Constant) and isinstance(node.value, str)
        if is_text and not METRICS.keys().isdisjoint(node.value.split("/")):
            yield f"{path}:{node.lineno}: {node.value!r}"


def test_metric_keys_are_quoted_in_the_registry_only() -> None:
    package = Path(fedekd.__file__).parent
    exempt = ("metrics", "benchmark/grid.py", *OF_EXITS, *OF_HARM)  # grid.py: values of stored rows, not of today
    modules = [path for path in package.rglob("*.py") if not str(path.relative_to(package)).startswith(exempt)]
    assert [line for path in modules for line in quoted_keys(path)] == []


def error_rate(logits: Tensor, labels: Tensor, num_classes: int) -> float:
    return 1.0 - registry.accuracy(logits, labels, num_classes)


def test_new_metric_takes_one_function_and_one_row(
    npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row = MetricSpec(
        "error_rate",
        "error rate",
        "classification",
        error_rate,
        higher_is_better=False,
        torchmetric=partial(MulticlassAccuracy, num_classes=None, average="micro"),
    )
    rows = {row.name: row, **METRICS}
    monkeypatch.setattr(registry, "METRICS", rows)
    monkeypatch.setattr(metrics, "METRICS", rows)
    monkeypatch.setattr("fedekd.methods.specification.METRICS", rows)
    monkeypatch.chdir(tmp_path)
    options = ["--data.num_clients=3", "--data.alpha=1", "--rounds=1", "--trainer.threads=1", "--logger=null"]
    assert main(["fit", f"--data.dataset={npz}", *options, "--output=run"]) == 0
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    scores = [client["score"] for client in summary["clients"]]
    assert (summary["metric"], summary["worst"]) == ("error_rate", max(scores))
    local = [client["local"] for client in summary["clients"]]
    expected = negative_transfer(scores, local, "classification")
    assert summary["delta"] == {name: expected[name].item() for name in ("avg", "worst", "p90")}
    header = (tmp_path / "run/metrics.csv").read_text().splitlines()[0]
    assert "client_0/error_rate" in header.split(",")
    assert "delta/accuracy/avg" in header.split(",")
    assert (tmp_path / "run/figures/error_rate_per_round.png").exists()
    assert "error rate" in capsys.readouterr().out
