"""Histogram, table and chart of the clients in Weights & Biases. Slow to import."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

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
    return wandb.Histogram(values, num_bins=HISTOGRAM_BINS) if values else None


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
    if class_names and "classes" in columns:
        columns["classes"] = [class_names[label] for label in columns["classes"]]
    return {name: ", ".join(map(str, value)) if isinstance(value, list) else value for name, value in columns.items()}
