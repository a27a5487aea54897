"""Metrics of a run: which are computed, which are reported, and their names."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from math import isnan

from torch import Tensor

from fedekd.errors import UserError, listed, nearest, require, shorten
from fedekd.metrics import registry
from fedekd.metrics.registry import MetricSpec, primary_metric
from fedekd.tasks import Task

#: Most classes for which a metric with one value per class is computed.
MAX_CLASSES = 256

#: Most classes for which such a metric is reported by default: each class has three columns per client.
_MAX_DEFAULT_CLASSES = 20

#: Longest part of a column's name that a class name takes.
_MAX_NAME = 32


def computed_metrics(task: Task, num_classes: int) -> list[MetricSpec]:
    """Return the metrics that every scoring of a client computes.

    Args:
        task: `classification` or `regression`.
        num_classes: Number of classes or grades; 0 for real-valued targets.

    Returns:
        All rows of the task that these targets allow, in the order of `METRICS`.
    """
    return [row for row in registry.METRICS.values() if row.task == task and not _problem(row, task, num_classes)]


def compute_metrics(outputs: Tensor, targets: Tensor, task: Task, num_classes: int) -> dict[str, float]:
    """Compute all metrics of a task on a whole split.

    Args:
        outputs: Logits, shape (N, C); for regression shape (N, 1) or (N,).
        targets: Labels, shape (N,); for regression real numbers, shape (N,).
        task: `classification` or `regression`.
        num_classes: Number of classes or grades; 0 for real-valued targets.

    Returns:
        The values by key, as in `metric_keys`; NaN where a metric is undefined.
    """
    values: dict[str, float] = {}
    for row in computed_metrics(task, num_classes):
        values |= row.values(outputs.detach(), targets.detach(), num_classes)
    return values


def select_metrics(names: Sequence[str] | None, task: Task, num_classes: int) -> list[MetricSpec]:
    """Return the metrics that a run reports, the primary one first.

    Args:
        names: Option `metrics`; None for the primary metric of the task and then the others. Of more than 20 classes,
            a metric with one value per class is reported only if it is named.
        task: `classification` or `regression`.
        num_classes: Number of classes or grades; 0 for real-valued targets.

    Raises:
        UserError: If a name is unknown, of the other task, given twice or not defined for the targets, or if the first
            metric has one value per class.

    Example:
        >>> [row.name for row in select_metrics(["auroc", "accuracy"], "classification", 2)]
        ['auroc', 'accuracy']
    """
    if names is None:
        rows = computed_metrics(task, num_classes)
        first = primary_metric(task)
        rows.sort(key=lambda row: row is not first)
        return [row for row in rows if not row.is_per_class or num_classes <= _MAX_DEFAULT_CLASSES]
    require(len(names) > 0, "metrics", "at least one metric, or null", names, "Name a metric, or remove the option")
    known = [row.name for row in computed_metrics(task, num_classes)]
    for name in names:
        if name not in registry.METRICS:
            raise UserError(f"metrics: expected metrics of {task}, got {shorten(repr(name))}. {nearest(name, known)}")
        if problem := _problem(registry.METRICS[name], task, num_classes):
            hint = f"Choose from: {listed(known)} (all of them: --metrics null)"
            raise UserError(f"metrics: {problem}, got {name!r}. {hint}")
        require(names.count(name) == 1, "metrics", "each metric once", names, f"Remove one {name!r}")
    rows = [registry.METRICS[name] for name in names]
    hint = f"Name another metric before it, such as {primary_metric(task).name}"
    require(not rows[0].is_per_class, "metrics", "first a metric with one value", names[0], hint)
    return rows


def metric_keys(rows: Iterable[MetricSpec], num_classes: int) -> dict[str, MetricSpec]:
    """Return the metric of each value by its key, such as `recall/0`."""
    return {key: row for row in rows for key in row.keys(num_classes)}


def column_names(rows: Iterable[MetricSpec], class_names: Sequence[str]) -> dict[str, str]:
    """Return the name of each value in logs and columns, by key.

    A class is named in letters, digits and ``_ . -``, with its number where two names would be equal.

    Args:
        rows: Metrics.
        class_names: Names of the classes or grades.

    Example:
        >>> column_names([registry.METRICS["recall"]], ["no finding", "oedema"])
        {'recall/0': 'recall/no_finding', 'recall/1': 'recall/oedema'}
    """
    plain = [re.sub(r"[^A-Za-z0-9_.-]+", "_", name)[:_MAX_NAME] for name in class_names]
    counts = Counter(plain)
    unique = [name if counts[name] == 1 and name.strip("_") else f"{name}_{i}" for i, name in enumerate(plain)]
    if len(set(unique)) < len(unique):  # such as "a b", "a/b" and "a_b_0"
        unique = [str(i) for i in range(len(unique))]
    return {
        key: f"{row.name}/{unique[label]}" if row.is_per_class else key
        for row in rows
        for label, key in enumerate(row.keys(len(class_names)))
    }


def is_undefined(key: str, task: Task, *scored: Mapping[str, float]) -> bool:
    """Return True if a split has no value of a metric, as where it lacks a class.

    That is the case if a network with finite outputs, for which the task's primary metric is a number, has no value of
    this metric. Networks with non-finite outputs are not considered.

    Args:
        key: Key of the metric's value.
        task: `classification` or `regression`.
        *scored: Values by key, of each network that was scored on the split.
    """
    first = primary_metric(task).name
    nan = float("nan")
    return any(isnan(values.get(key, nan)) and not isnan(values.get(first, nan)) for values in scored)


def missing_classes(task: Task, *scored: Mapping[str, float]) -> list[int]:
    """Return the classes without samples in a split, as metrics per class show."""
    rows = [row for row in registry.METRICS.values() if row.task == task and row.is_per_class]
    keys = {key for values in scored for key in values if any(key.startswith(f"{row.name}/") for row in rows)}
    return sorted({int(key.rpartition("/")[2]) for key in keys if is_undefined(key, task, *scored)})


def _problem(row: MetricSpec, task: Task, num_classes: int) -> str:
    """Return why a metric cannot be computed; empty if it can."""
    if row.task != task:
        return f"expected metrics of {task}"
    if row.needs_grades and not num_classes:
        return "expected metrics of real-valued targets"
    if row.is_per_class and num_classes > MAX_CLASSES:
        return f"expected metrics with one value for more than {MAX_CLASSES} classes, here {num_classes}"
    return ""
