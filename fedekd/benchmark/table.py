"""Results as one table: mean and standard deviation over seeds."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

from fedekd.benchmark.results import distinct_methods, numeric
from fedekd.metrics import METRICS
from fedekd.reporting.document import spread

#: Printed quantities by column of the results.
FIGURES = {"mean": "score", "delta_avg": "Delta avg", "delta_worst": "Delta worst", "delta_tail": "Delta P10/P90"}

#: Further quantities of runs with a control: the surplus over it, see `fedekd.federation.references`.
SURPLUS = {"surplus_avg": "surplus avg", "surplus_worst": "surplus worst"}

#: Rows of one table, in which methods are compared.
_CELL = ("dataset", "alpha", "metric")

_LOCAL = "Local"


def method_table(results: pd.DataFrame) -> pd.DataFrame:
    """Return one row per data set, alpha, metric and method, best mean Delta first.

    The local baseline `Local` has a row without runs of its own, because every run trains it; methods with other
    training options have another one.

    Args:
        results: Rows as `read_results` returns them.

    Returns:
        Printed cells: data set, alpha, method, score, three summaries of Delta, number of seeds.
    """
    frame = distinct_methods(numeric(results))
    figures = FIGURES | {name: title for name, title in SURPLUS.items() if name in frame}
    frame = pd.concat([_local_rows(frame), frame.assign(is_local=False)]).drop_duplicates([*_CELL, "method", "seed"])
    rows = []
    for (dataset, alpha, name, method), group in frame.groupby([*_CELL, "method"], dropna=False):
        metric = METRICS[name]
        values = {
            column: group[column].dropna().tolist() if column in SURPLUS else group[column].tolist()
            for column in figures
        }
        cells = [spread(values[column], signed=column != "mean") if values[column] else "" for column in figures]
        if group["is_local"].any():
            cells[1:] = ["0"] * (len(FIGURES) - 1) + [""] * (len(figures) - len(FIGURES))
        rank = (-1 if metric.higher_is_better else 1) * group["delta_avg"].mean()
        rows.append([f"{dataset}, {metric.name}", alpha, rank, method, *cells, len(group)])
    table = pd.DataFrame(rows, columns=["data set", "alpha", "rank", "method", *figures.values(), "seeds"])
    table = table.sort_values(["data set", "alpha", "rank"], kind="stable").drop(columns="rank")
    return table.assign(alpha=table["alpha"].map(alpha_text))


def _local_rows(frame: pd.DataFrame) -> pd.DataFrame:
    """Return a row per seed of each local baseline; methods with equal ones share it."""
    rows: list[dict[str, Any]] = []
    for cell, group in frame.groupby(list(_CELL), dropna=False):
        baselines: list[tuple[list[str], dict[float, float]]] = []
        for method, runs in group.groupby("method"):
            scores = dict(zip(runs["seed"], runs["local_mean"], strict=True))
            for methods, known in baselines:
                if all(repr(known.get(seed, score)) == repr(score) for seed, score in scores.items()):  # NaN is equal
                    methods.append(method)
                    known.update(scores)
                    break
            else:
                baselines.append(([method], scores))
        for methods, scores in baselines:
            more = f" and {len(methods) - 1} more" if len(methods) > 1 else ""
            label = _LOCAL if len(baselines) == 1 or _LOCAL in methods else f"{_LOCAL} of {methods[0]}{more}"
            values = dict(zip(_CELL, cell, strict=True)) | {"method": label, "delta_avg": 0.0, "is_local": True}
            rows += [{**values, "seed": seed, "mean": score} for seed, score in scores.items()]
    return pd.DataFrame(rows)


def alpha_text(alpha: float) -> str:
    """Return the concentration of a partition; empty for sites, whose value is NaN."""
    return "" if math.isnan(alpha) else f"{alpha:g}"
