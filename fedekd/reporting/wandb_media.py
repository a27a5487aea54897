"""Histogram, table and chart of the clients in Weights & Biases. Slow to import."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import wandb

from fedekd.reporting.rows import Row, Summary, client_series

#: Bins of the histogram of Delta: W&B draws those of all rounds as a heatmap.
HISTOGRAM_BINS = 32


def delta_histogram(row: Row) -> wandb.Histogram | None:
    """Return the histogram of Delta over the clients of a round.

    Args:
        row: Metrics of the round.

    Returns:
        The histogram of the finite values; None if there is none.
    """
    series = client_series([row], "delta")
    values = [value for _, (value,) in series.values() if math.isfinite(value)]
    return wandb.Histogram(np_histogram=_histogram(values)) if values else None


def _histogram(values: list[float]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Return counts and edges; one bin where floats are too coarse for more.

    NumPy raises an error for values that differ in the last bits, and for a range above the largest float.
    """
    low, high = min(values), max(values)
    edges = np.array([low, high])
    for margin in (0.0, 0.5):
        # Of halves: the difference of two floats may be infinite.
        candidate = 2 * np.linspace((low - margin) / 2, (high + margin) / 2, HISTOGRAM_BINS + 1)
        if (np.diff(candidate) > 0).all():
            edges = candidate
            break
    return np.histogram(values, edges)


def client_table(summary: Summary) -> wandb.Table:
    """Return one row per client, with every value of the summary.

    Classes are text. Another metric has the columns `OTHER`, `OTHER/local` and `OTHER/delta`.
    """
    rows = [_columns(client, summary.get("class_names")) for client in summary["clients"]]
    names = list(dict.fromkeys(name for row in rows for name in row))
    return wandb.Table(columns=names, data=[[row.get(name) for name in names] for row in rows])


def delta_chart(table: wandb.Table) -> Any:
    """Return the bar chart of Delta per client, drawn from the table of the clients."""
    label = "name" if "name" in table.columns else "client"
    return wandb.plot.bar(table, label, "delta", title="Delta per client")


def _columns(client: Mapping[str, Any], class_names: list[str] | None) -> dict[str, Any]:
    columns = dict(client)
    for name, values in columns.pop("metrics", {}).items():
        columns |= {name: values["score"], f"{name}/local": values["local"], f"{name}/delta": values["delta"]}
    for name, result in columns.pop("candidates", {}).items():
        columns[f"{name}/p_value"] = result["p_value"] if isinstance(result, Mapping) else None  # None: not tested
    if class_names and "classes" in columns:
        columns["classes"] = [class_names[label] for label in columns["classes"]]
    return {name: ", ".join(map(str, value)) if isinstance(value, list) else value for name, value in columns.items()}
