"""Tables 1, 2 and 4-10 of the paper: measured and published values, cell by cell."""

from __future__ import annotations

import json
import math
from statistics import fmean, stdev
from typing import NamedTuple

import pandas as pd

from experiments.fedekd_paper.load import display_name
from experiments.fedekd_paper.missing import UNSETTLED, missing_runs, runs_text
from experiments.fedekd_paper.published import CELL, DATASETS, SEEDS, published
from experiments.fedekd_paper.statistics import LEVEL, MIN_SEEDS, welch
from fedekd.metrics import primary_metric
from fedekd.reporting.document import Section
from fedekd.tasks import Task


class Plan(NamedTuple):
    """One table of the paper."""

    number: int
    title: str
    measure: str
    task: Task


PLANS = (
    Plan(1, "Average Delta, classification", "delta_avg", "classification"),
    Plan(2, "Average Delta, regression", "delta_avg", "regression"),
    Plan(4, "Worst Delta, classification", "delta_worst", "classification"),
    Plan(5, "Worst Delta, regression", "delta_worst", "regression"),
    Plan(6, "P10 of Delta, classification", "delta_tail", "classification"),
    Plan(7, "P90 of Delta, regression", "delta_tail", "regression"),
    Plan(8, "Mean accuracy", "mean", "classification"),
    Plan(9, "Mean RMSE", "mean", "regression"),
    Plan(10, "Average Delta by energy, classification", "delta_avg", "classification"),
)

#: Rows of Table 10, and of the other tables; further measured methods follow by name.
_ENERGY_ROWS = ("No gating", "Entropy", "Margin", "LogSumExp", "Feature", "FedeKD", "Shuffled gate")
_ROWS = ("Local", "FedDyn", "FedProx", "FedAvg", "FedType, FedProx", "FedType", "FedeKD")
_ABLATIONS = ("Entropy", "Margin", "LogSumExp", "Feature")


def paper_cells(results: pd.DataFrame) -> pd.DataFrame:
    """Compare all cells of the paper with the measured values.

    Args:
        results: As `load` returns them.

    Returns:
        One row per cell that is published or measured: table, dataset, alpha, method, measure, values (by seed), mean,
        std, paper_mean, paper_std, fault, derived, metric, higher (its direction), p (Welch's test), verdict, best (of
        its column); and for a cell without a test what it would take: runs, device, hours, see `missing_runs`.
    """
    measured = results[results["sweep"] == ""]
    local = measured.assign(method="Local", mean=measured["local_mean"]).drop_duplicates([*CELL, "seed"])
    frames = []
    for plan in PLANS:
        runs = measured[measured["method"] != "Local"]
        runs = pd.concat([runs, local]) if plan.measure == "mean" else runs
        rows = _ENERGY_ROWS if plan.number == 10 else _ROWS
        wanted = runs["method"].isin(rows) if plan.number == 10 else ~runs["method"].isin(_ABLATIONS)
        runs = runs[wanted & (runs["metric"] == primary_metric(plan.task).name)].sort_values("seed")
        values = runs.groupby(CELL)[["seed", plan.measure]].apply(lambda group: dict(group.itertuples(index=False)))
        paper = published().query("table == @plan.number").rename(columns={"mean": "paper_mean", "std": "paper_std"})
        # `apply` on an empty frame returns a frame, which has no name.
        ours = values.rename("values").reset_index() if len(runs) else pd.DataFrame(columns=[*CELL, "values"])
        cells = paper.drop(columns=["table", "measure"]).merge(ours.astype({"alpha": float}), how="outer", on=CELL)
        metric = primary_metric(plan.task)
        cells = cells.assign(table=plan.number, measure=plan.measure)
        cells = cells.assign(metric=metric.name, higher=metric.higher_is_better)
        frames.append(_in_order(cells, rows))
    cells = pd.concat(frames, ignore_index=True)
    cells["values"] = [value if isinstance(value, dict) else {} for value in cells["values"]]
    cells["fault"], cells["derived"] = cells["fault"].fillna(""), cells["derived"].eq(True)
    cells["mean"] = [fmean(value.values()) if value else math.nan for value in cells["values"]]
    cells["std"] = [_std(list(value.values())) for value in cells["values"]]
    cells["p"] = [
        welch(list(row["values"].values()), row["paper_mean"], row["paper_std"], SEEDS)
        if len(row["values"]) >= MIN_SEEDS and row["mean"] == row["mean"] and row["paper_std"] == row["paper_std"]
        else math.nan
        for row in cells.to_dict("records")
    ]
    cells["verdict"] = [_verdict(row) for row in cells.to_dict("records")]
    best = cells.groupby(["table", "dataset", "alpha"], sort=False, group_keys=False)[
        ["values", "mean", "higher"]
    ].apply(_best)
    missing = missing_runs(cells, results).drop(columns="tables")
    return cells.assign(best=best).merge(missing, how="left", on=CELL)


def _in_order(cells: pd.DataFrame, rows: tuple[str, ...]) -> pd.DataFrame:
    """Sort by data set (measured ones first) and by row, in the paper's order."""
    run = set(cells.loc[cells["values"].notna(), "dataset"])
    datasets = sorted(cells["dataset"].unique(), key=lambda name: (name not in run, name not in DATASETS))
    datasets.sort(key=lambda name: (name not in run, list(DATASETS).index(name) if name in DATASETS else math.inf))
    methods = [*rows, *sorted(set(cells["method"]) - set(rows))]
    keys = {"dataset": datasets.index, "method": methods.index, "alpha": float}
    return cells.sort_values(["dataset", "method", "alpha"], key=lambda column: column.map(keys[str(column.name)]))


def _std(values: list[float]) -> float:
    return stdev(values) if len(values) > 1 and not any(map(math.isnan, values)) else math.nan


def _verdict(cell: dict[str, object]) -> str:
    values, p = cell["values"], cell["p"]
    assert isinstance(values, dict)
    if not values:
        return "not run"
    if any(map(math.isnan, values.values())):
        return "diverged"
    if cell["paper_mean"] != cell["paper_mean"]:
        return "not in the paper"
    if len(values) < MIN_SEEDS:
        return "too few seeds"
    if p != p:
        return "no spread in the paper"
    return "agrees" if p > LEVEL else "differs"  # type: ignore[operator]


def _best(column: pd.DataFrame) -> pd.Series:
    """Mark the best mean of a column among the methods with the most seeds."""
    seeds = column["values"].map(tuple).where(column["mean"].notna(), ())
    most = max(seeds, key=len)
    means = column["mean"].where(seeds.map(lambda own: own == most))
    if len(most) < MIN_SEEDS or means.notna().sum() < 2:
        return means.eq(math.nan)
    return means.eq(means.max() if column["higher"].iloc[0] else means.min())


def counts(cells: pd.DataFrame) -> pd.Series:
    """Return the number of printed cells of the paper by verdict, largest first."""
    return cells.loc[cells["paper_mean"].notna() & ~cells["derived"], "verdict"].value_counts()


def verdict_sentence(cells: pd.DataFrame) -> str:
    """Return the counts as a sentence: `Of the paper's 456 cells: not run 330, ...`."""
    faulty = int((cells["verdict"].eq("differs") & cells["fault"].ne("")).sum())
    number = counts(cells)
    parts = [
        f"{verdict} {count}" + (f" ({faulty} of them marked as faulty)" if verdict == "differs" and faulty else "")
        for verdict, count in number.items()
    ]
    return f"Of the paper's {number.sum()} cells: {', '.join(parts)}."


def table_section(plan: Plan, cells: pd.DataFrame) -> Section:
    """Return one table of the paper as a section, with one panel per data set."""
    cells = cells[cells["table"] == plan.number]
    faults = [fault for fault in cells["fault"].unique() if fault]
    text = [_text(row, plan, faults) for row in cells.to_dict("records")]
    panels = {}
    for dataset, panel in cells.assign(text=text).groupby("dataset", sort=False):
        wide = panel.pivot(index="method", columns="alpha", values="text").fillna("")
        wide = wide.loc[panel["method"].unique()].rename(columns=lambda alpha: f"alpha {alpha:g}")
        panels[display_name(str(dataset))] = wide.rename_axis(columns=None).reset_index()
    data = cells.assign(seeds=cells["values"].map(len), best=cells["best"].astype(int))
    data["values"] = data["values"].map(json.dumps)
    columns = ["table", *CELL, "measure", "mean", "std", "seeds", "values", "best", "paper_mean", "paper_std", "p"]
    missing = ["runs", "device", "hours"]
    direction = "higher" if primary_metric(plan.task).higher_is_better else "lower"
    name = f"table{plan.number:02d}"
    return Section(
        name=name,
        title=f"Table {plan.number}. {plan.title}",
        text=[f"A {direction} value is better.", *(f"⚑{i} {fault}." for i, fault in enumerate(faults, start=1))],
        tables=panels,
        data={name: data[[*columns, "verdict", "fault", *missing]]},
    )


def _text(cell: dict[str, object], plan: Plan, faults: list[str]) -> str:
    """Return the printed lines of a cell: measured, published, verdict."""
    lines, sign = [], "" if plan.measure == "mean" else "+"
    values, p = cell["values"], cell["p"]
    assert isinstance(values, dict)
    if values:
        star = " \N{BLACK STAR}" if cell["best"] else ""
        lines.append(f"{_pair(cell['mean'], cell['std'], sign)} ({len(values)}){star}")
    if cell["paper_mean"] == cell["paper_mean"]:
        fault = f" ⚑{faults.index(str(cell['fault'])) + 1}" if cell["fault"] else ""
        derived = " (derived)" if cell["derived"] else ""
        lines.append(f"paper {_pair(cell['paper_mean'], cell['paper_std'], sign)}{derived}{fault}")
    lines.append(f"{cell['verdict']}{f', p {p_text(p)}' if p == p else ''}")  # type: ignore[arg-type]
    if cell["verdict"] in UNSETTLED and not cell["derived"]:
        lines.append(runs_text(cell["runs"], cell["device"], cell["hours"]))  # type: ignore[arg-type]
    return "\n".join(lines)


def _pair(mean: object, std: object, sign: str) -> str:
    text = format(mean, f"{sign}.4f")
    return text if std != std else f"{text} ± {std:.4f}"


def p_text(value: float) -> str:
    """Return a p-value with two digits; empty for NaN.

    Example:
        >>> p_text(0.0123), p_text(0.0000004), p_text(float("nan"))
        ('0.012', '<0.0001', '')
    """
    return "" if math.isnan(value) else "<0.0001" if value < 1e-4 else f"{value:.2g}"
