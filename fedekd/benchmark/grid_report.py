"""Report of a grid's results: methods over seeds, and all runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from fedekd.benchmark.provenance import mixture
from fedekd.benchmark.results import distinct_methods, numeric
from fedekd.benchmark.table import alpha_text, method_table
from fedekd.metrics import METRICS
from fedekd.reporting.document import Picture, Section
from fedekd.reporting.figures import BLACK, BLUE, GREY

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def grid_sections(results: pd.DataFrame) -> list[Section]:
    """Return the sections of a report of results: methods, and runs.

    Args:
        results: Rows as `read_results` returns them.
    """
    frame = distinct_methods(numeric(results))
    text = [
        "Mean ± standard deviation over seeds. Delta is the score of a client minus the score of its local baseline; a"
        " positive Delta is better where a higher score is. Delta P10/P90 is the percentile at the harmful end."
    ]
    text += filter(None, [mixture(results)])
    pictures = [
        Picture(
            "-".join(filter(None, ["delta", str(dataset), alpha_text(alpha)])),
            f"{dataset}{f', alpha {alpha:g}' if alpha_text(alpha) else ''}: average Delta per run.",
            delta_by_method(runs),
        )
        for (dataset, alpha), runs in frame.groupby(["dataset", "alpha"], dropna=False)
    ]
    runs = pd.DataFrame({name: results[name] for name in ("dataset", "alpha", "method", "seed", "rounds", "clients")})
    metrics = results["metric"].map(METRICS)
    for column, head in (("mean", "score"), ("local_mean", "local")):
        runs[head] = [metric.text(value) for metric, value in zip(metrics, frame[column], strict=True)]
    for column in ("delta_avg", "delta_worst", "delta_tail"):
        values = zip(metrics, frame[column], strict=True)
        runs[column.replace("delta_", "Delta ")] = [metric.difference_text(value) for metric, value in values]
    runs = runs.assign(seconds=results["seconds"], device=results["device"], commit=results["commit"])
    return [
        Section("methods", "Methods", text, tables={"": method_table(results)}, pictures=pictures),
        # Not "runs": a report may also have the section of `run_sections` with that name.
        Section("grid", "Runs of the grid", tables={"": runs}, data={"grid": results}),
    ]


def delta_by_method(runs: pd.DataFrame) -> Figure:
    """Draw the average Delta of each run and its mean by method, best method first.

    Args:
        runs: Numeric results of one data set and alpha.
    """
    from matplotlib.figure import Figure

    metric = METRICS[runs["metric"].iloc[0]]
    means = runs.groupby("method")["delta_avg"].mean().sort_values(ascending=not metric.higher_is_better)
    figure = Figure(figsize=(6.4, 1.2 + 0.32 * len(means)), layout="constrained")
    axes = figure.subplots()
    for position, method in enumerate(means.index):
        values = runs.loc[runs["method"] == method, "delta_avg"]
        axes.scatter(values, np.full(len(values), position), color=GREY, s=14)
    axes.scatter(means, range(len(means)), color=BLUE, marker="D", s=36, zorder=3)
    axes.axvline(0.0, color=BLACK, linewidth=0.8, linestyle="--")
    axes.set_yticks(range(len(means)), list(means.index), fontsize=8)
    axes.invert_yaxis()
    better = "higher" if metric.higher_is_better else "lower"
    axes.set_xlabel(f"average Delta of {metric.title} ({better} is better)", fontsize=9)
    axes.grid(axis="x", color="#E5E5E5", linewidth=0.8)
    axes.set_axisbelow(True)
    return figure
