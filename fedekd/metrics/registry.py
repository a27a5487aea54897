"""Registry of metrics: function, direction, unit and format of each.

Tables, figures and logs take the name, format and direction of a metric from its row. The primary metric of a task is
the score of a client's test split (FedeKD Section 4.2: accuracy for classification, RMSE for regression), unless a run
chooses another one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor
from torchmetrics import MeanSquaredError, Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from fedekd.metrics.classification import accuracy, auroc, balanced_accuracy, ece, macro_f1, recall
from fedekd.metrics.regression import mae, quadratic_kappa, r2, rmse
from fedekd.tasks import Task, require_task


@dataclass(frozen=True)
class MetricSpec:
    """One row of `METRICS`.

    Attributes:
        name: Key in logs, CSV files and `summary.json`.
        title: Name in tables and figures.
        task: The task whose outputs the metric scores.
        function: `(outputs, targets, num_classes)` of a whole split to a value, or to one value per class; NaN where
            the metric is undefined.
        higher_is_better: Direction: True if a larger value is better.
        torchmetric: Constructor of the same metric as a `torchmetrics.Metric`, which modules update batch by batch;
            the first row of a task needs one.
        unit: Unit of the value; empty for a ratio, `target` for the unit of the targets.
        format: Format of a printed value, as in `format(value, ".4f")`.
        range: Lowest and highest possible value; a site's score outside of it is rejected.
        is_per_class: True if there is one value per class, whose keys are `NAME/0`, `NAME/1`, ...
        needs_grades: True if the targets must be grades 0..C-1.
    """

    name: str
    title: str
    task: Task
    function: Callable[[Tensor, Tensor, int], float | Sequence[float]]
    higher_is_better: bool
    torchmetric: Callable[[], Metric] | None = None
    unit: str = ""
    format: str = ".4f"
    range: tuple[float, float] = (-math.inf, math.inf)
    is_per_class: bool = False
    needs_grades: bool = False

    def text(self, value: float | None) -> str:
        """Return a value as it is printed; `-` for None and NaN."""
        return "-" if value is None or math.isnan(value) else format(value, self.format)

    def difference_text(self, value: float | None) -> str:
        """Return a signed difference as it is printed; `-` for None and NaN."""
        return "-" if value is None or math.isnan(value) else format(value, f"+{self.format}")

    def worst(self, values: Sequence[float]) -> float:
        """Return the worst of the values; NaN if there is none or one of them is NaN."""
        if not values or any(math.isnan(value) for value in values):
            return math.nan
        return min(values) if self.higher_is_better else max(values)

    def keys(self, num_classes: int) -> list[str]:
        """Return the keys of the metric's values: its name, or one per class."""
        return [f"{self.name}/{label}" for label in range(num_classes)] if self.is_per_class else [self.name]

    def values(self, outputs: Tensor, targets: Tensor, num_classes: int) -> dict[str, float]:
        """Compute the metric of a whole split.

        Args:
            outputs: Logits, shape (N, C); for regression shape (N, 1) or (N,).
            targets: Labels, shape (N,); for regression real numbers, shape (N,) or (N, 1).
            num_classes: Number of classes or grades; 0 for real-valued targets.

        Returns:
            The values by key.
        """
        value = self.function(outputs, targets, num_classes)
        values = [value] if isinstance(value, float) else value
        return dict(zip(self.keys(num_classes), values, strict=True))

    @property
    def tail_percent(self) -> int:
        """Percentile of Delta at its harmful end: 10 or 90."""
        return 10 if self.higher_is_better else 90

    @property
    def tail(self) -> str:
        """Name of that percentile in summaries and logs: `p10` or `p90`."""
        return f"p{self.tail_percent}"


#: Metrics by name; the first row of a task is its primary metric. A new metric is one function and one row.
METRICS: dict[str, MetricSpec] = {
    row.name: row
    for row in (
        MetricSpec(
            "accuracy",
            "accuracy",
            "classification",
            accuracy,
            higher_is_better=True,
            torchmetric=partial(MulticlassAccuracy, num_classes=None, average="micro"),
            range=(0.0, 1.0),
        ),
        MetricSpec(
            "balanced_accuracy", "balanced accuracy", "classification", balanced_accuracy, True, range=(0.0, 1.0)
        ),
        MetricSpec("macro_f1", "macro F1", "classification", macro_f1, True, range=(0.0, 1.0)),
        MetricSpec("auroc", "AUROC", "classification", auroc, True, range=(0.0, 1.0)),
        MetricSpec("recall", "recall", "classification", recall, True, range=(0.0, 1.0), is_per_class=True),
        MetricSpec("ece", "expected calibration error", "classification", ece, False, range=(0.0, 1.0)),
        MetricSpec(
            "rmse",
            "RMSE",
            "regression",
            rmse,
            higher_is_better=False,
            torchmetric=partial(MeanSquaredError, squared=False),
            unit="target",
            format=".4g",
            range=(0.0, math.inf),
        ),
        MetricSpec("mae", "MAE", "regression", mae, False, unit="target", format=".4g", range=(0.0, math.inf)),
        MetricSpec("r2", "R2", "regression", r2, True, range=(-math.inf, 1.0)),
        MetricSpec(
            "quadratic_kappa",
            "quadratic kappa",
            "regression",
            quadratic_kappa,
            True,
            range=(-1.0, 1.0),
            needs_grades=True,
        ),
    )
}


def primary_metric(task: Task) -> MetricSpec:
    """Return the metric by which clients are scored and Delta is computed by default.

    Args:
        task: `classification` or `regression`.

    Returns:
        The first row of `METRICS` for the task.

    Raises:
        UserError: If `task` is unknown.

    Example:
        >>> primary_metric("regression").name
        'rmse'
    """
    known = require_task(task)
    return next(row for row in METRICS.values() if row.task == known)


def build_metrics(task: Task) -> MetricCollection:
    """Return the primary metric of a task as a torchmetrics collection.

    Args:
        task: `classification` or `regression`.

    Raises:
        UserError: If `task` is unknown.

    Example:
        >>> list(build_metrics("regression"))
        ['rmse']
    """
    metric = primary_metric(task)
    assert metric.torchmetric is not None, f"METRICS: {metric.name}: the first row of a task needs a torchmetric"
    return MetricCollection({metric.name: metric.torchmetric()})


def score(outputs: Tensor, targets: Tensor, task: Task) -> float:
    """Score a whole split by the primary metric of a task, in float64.

    Args:
        outputs: Logits, shape (N, C); for regression shape (N, 1) or (N,).
        targets: Labels, shape (N,); for regression real numbers, shape (N,) or (N, 1).
        task: `classification` or `regression`.

    Returns:
        The value of the primary metric; NaN if there are no samples or an output is not finite.

    Raises:
        UserError: If `task` is unknown.
        ValueError: If the shapes do not match.

    Example:
        >>> import torch
        >>> score(torch.tensor([[2.0, 1.0], [0.0, 3.0]]), torch.tensor([0, 0]), "classification")
        0.5
        >>> score(torch.tensor([[1.0], [7.0]]), torch.tensor([0.0, 0.0]), "regression")
        5.0
    """
    metric = primary_metric(task)
    num_classes = outputs.shape[1] if outputs.ndim > 1 and metric.task == "classification" else 0
    return metric.values(outputs.detach(), targets.detach(), num_classes)[metric.name]
