"""Results as one table: mean and standard deviation over seeds."""

from __future__ import annotations

import math

import pandas as pd

from fedekd.benchmark.results import distinct_methods, numeric
from fedekd.metrics import METRICS
from fedekd.reporting.document import spread

#: Printed quantities by column of the results.
FIGURES = {"mean": "score", "delta_avg": "Delta avg", "delta_worst": "Delta worst", "delta_tail": "Delta P10/P90"}

#: Further quantities of runs with a control: the surplus over it, see `fedekd.federation.references`.
SURPLUS = {"surplus_avg": "surplus avg", "surplus_worst": "surplus worst"}


def method_table(results: pd.DataFrame) -> pd.DataFrame:
    """Return one row per data set, alpha and method, best average Delta first.

    The local baseline `Local` has a row without runs of its own, because every run trains it.

    Args:
        results: Rows as `read_results` returns them.

    Returns:
        Printed cells: data set, alpha, method, score, three summaries of Delta, number of seeds.
    """
    frame = distinct_methods(numeric(results))
    local = frame.assign(method="Local", mean=frame["local_mean"], delta_avg=0.0, delta_worst=0.0, delta_tail=0.0)
    figures = FIGURES | {name: title for name, title in SURPLUS.items() if name in frame}
    local = local.drop(columns=[name for name in SURPLUS if name in frame])
    frame = pd.concat([frame, local]).drop_duplicates(["dataset", "alpha", "method", "seed"])
    rows = []
    for (dataset, alpha, method), group in frame.groupby(["dataset", "alpha", "method"], dropna=False):
        metric = METRICS[group["metric"].iloc[0]]
        values = {
            column: group[column].dropna().tolist() if column in SURPLUS else group[column].tolist()
            for column in figures
        }
        cells = [spread(values[column], signed=column != "mean") if values[column] else "" for column in figures]
        if method == "Local":
            cells[1:] = ["0"] * (len(FIGURES) - 1) + [""] * (len(figures) - len(FIGURES))
        rank = (-1 if metric.higher_is_better else 1) * group["delta_avg"].mean()
        rows.append([f"{dataset}, {metric.name}", alpha, rank, method, *cells, len(group)])
    table = pd.DataFrame(rows, columns=["data set", "alpha", "rank", "method", *figures.values(), "seeds"])
    table = table.sort_values(["data set", "alpha", "rank"], kind="stable").drop(columns="rank")
    return table.assign(alpha=table["alpha"].map(alpha_text))


def alpha_text(alpha: float) -> str:
    """Return the concentration of a partition; empty for sites, whose value is NaN."""
    return "" if math.isnan(alpha) else f"{alpha:g}"
