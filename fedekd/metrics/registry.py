"""Registry of metrics: function, direction, unit and format of each.

No other package names a metric. The primary metric of a task is the score of a client's test split
(FedeKD Section 4.2: accuracy for classification, RMSE for regression).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torchmetrics import MeanSquaredError, Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy
from torchmetrics.functional import mean_squared_error

from fedekd.tasks import Task, require_task


@dataclass(frozen=True)
class MetricSpec:
    """One row of `METRICS`.

    Attributes:
        name: Key in logs, CSV files and `summary.json`.
        title: Name in tables and figures.
        task: The task whose outputs the metric scores.
        function: `(outputs, targets) -> float` over a whole split; NaN where the metric is undefined.
        higher_is_better: Direction: True if a larger value is better.
        torchmetric: Constructor of the same metric as a `torchmetrics.Metric`, which modules update batch by batch.
        unit: Unit of the value; empty for a ratio, `target` for the unit of the targets.
        format: Format of a printed value, as in `format(value, ".4f")`.
        range: Lowest and highest possible value; a site's score outside of it is rejected.
    """

    name: str
    title: str
    task: Task
    function: Callable[[Tensor, Tensor], float]
    higher_is_better: bool
    torchmetric: Callable[[], Metric]
    unit: str = ""
    format: str = ".4f"
    range: tuple[float, float] = (-math.inf, math.inf)

    def text(self, value: float) -> str:
        """Return a value as it is printed."""
        return format(value, self.format)

    def difference_text(self, value: float) -> str:
        """Return a difference of two values as it is printed, with its sign."""
        return format(value, f"+{self.format}")

    def worst(self, values: Sequence[float]) -> float:
        """Return the worst of the values; NaN if one of them is NaN."""
        if any(math.isnan(value) for value in values):
            return math.nan
        return min(values) if self.higher_is_better else max(values)

    @property
    def tail_percent(self) -> int:
        """Percentile of Delta at its harmful end: 10 or 90."""
        return 10 if self.higher_is_better else 90

    @property
    def tail(self) -> str:
        """Name of that percentile in summaries and logs: `p10` or `p90`."""
        return f"p{self.tail_percent}"


def accuracy(logits: Tensor, labels: Tensor) -> float:
    r"""Accuracy $\frac1N \sum_i 1[\hat y_i = y_i]$, in float64.

    Args:
        logits: Shape (N, C).
        labels: Class indices, shape (N,).

    Returns:
        A value in [0, 1]; NaN if there are no samples or a logit is not finite.

    Raises:
        ValueError: If the shapes do not match.
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(
            f"accuracy: expected logits (N, C) and labels (N,), got {tuple(logits.shape)} and {tuple(labels.shape)}"
        )
    if not torch.isfinite(logits).all():
        return math.nan  # argmax of NaN is class 0
    # torchmetrics divides in float32: 0.9338 would be 0.9337999820709229 in summary.json.
    return (logits.argmax(dim=1) == labels).to(torch.float64).mean().item()


def rmse(outputs: Tensor, targets: Tensor) -> float:
    r"""Root mean squared error $\sqrt{\frac1N \sum_i (\hat y_i - y_i)^2}$, in float64.

    Args:
        outputs: Shape (N, 1) or (N,).
        targets: Real numbers, shape (N,) or (N, 1).

    Returns:
        A value of at least 0 in the unit of the targets; NaN if there are no samples or an output is not finite.

    Raises:
        ValueError: If the shapes do not match.
    """
    n = len(outputs)
    for name, tensor in (("outputs", outputs), ("targets", targets)):
        if tensor.shape not in {(n,), (n, 1)}:
            raise ValueError(f"RMSE: expected {name} of shape ({n},) or ({n}, 1), got {tuple(tensor.shape)}")
    if n == 0 or not torch.isfinite(outputs).all():
        return math.nan
    predicted, expected = outputs.to(torch.float64).flatten(), targets.to(torch.float64).flatten()
    return mean_squared_error(predicted, expected, squared=False).item()


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
    )
}


def primary_metric(task: Task) -> MetricSpec:
    """Return the metric by which clients are scored and Delta is computed.

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
        >>> score(torch.tensor([[2.0, 1.0], [0.0, 3.0]]), torch.tensor([0, 0]), "classification")
        0.5
        >>> score(torch.tensor([[1.0], [7.0]]), torch.tensor([0.0, 0.0]), "regression")
        5.0
    """
    return primary_metric(task).function(outputs.detach(), targets.detach())
