"""Methods with early exits: accuracy per exit and budget, and FLOPs saved."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean

import pandas as pd

from experiments.fedekd_paper.load import display_name
from experiments.fedekd_paper.statistics import t_interval
from fedekd.benchmark.results import exit_columns
from fedekd.early_exit.cost_curves import Point, cost_of
from fedekd.metrics import primary_metric
from fedekd.reporting.document import spread

#: Printed budgets, in percent of the plain network's FLOPs.
BUDGETS = (25, 50, 75)

#: Budget at which a method is compared with the best one without exits: CAFEDistill claims at least 30% fewer FLOPs.
COMPARED = 70


@dataclass(frozen=True)
class ExitComparison:
    """The methods with exits in one setting.

    Attributes:
        name: Data set, alpha, number of clients and of rounds, as printed.
        plain: Label and mean accuracy of the best method without exits; None if there is none.
        points: One row per method (best first), kind (`exit` or `budget`) and number: cost and accuracy, means over
            seeds; `saved` is the share of FLOPs that the method saves at the accuracy of `plain` (NaN if it does not
            reach it or there is no `plain`).
        accuracies: Accuracies at the last exit by method, one per seed.
        differences: By method the accuracy within the budget `COMPARED` minus that of `plain`, one per common seed.
    """

    name: str
    plain: tuple[str, float] | None
    points: pd.DataFrame
    accuracies: dict[str, list[float]]
    differences: dict[str, list[float]]

    @property
    def finding(self) -> str:
        """Return the FLOPs saved at the accuracy of the best method without exits."""
        if self.plain is None:
            return "There is no run without exits to compare with."
        saved = self.points.groupby("method", sort=False)["saved"].first()
        reached = "; ".join(f"{name} {value:.0%}" for name, value in saved.dropna().sort_values()[::-1].items())
        missed = "; ".join(saved.index[saved.isna()])
        text = f"Best method without exits: {self.plain[0]}, {self.plain[1]:.4f}."
        text += f" FLOPs saved at that accuracy: {reached or 'none'}."
        return f"{text} Not reached by: {missed}." if missed else text


def exit_comparisons(results: pd.DataFrame) -> list[ExitComparison]:
    """Return a comparison per setting that has a method with exits.

    A setting is a data set, alpha, number of clients and number of rounds.
    """
    if "exit_2" not in results:
        return []
    runs = results[(results["metric"] == primary_metric("classification").name) & results["mean"].notna()]
    return [
        _comparison(f"{display_name(dataset)}, alpha {alpha:g}, {clients} clients, {rounds} rounds", group)
        for (dataset, alpha, clients, rounds), group in runs.groupby(["dataset", "alpha", "clients", "rounds"])
        if group["exit_2"].notna().any()
    ]


def _comparison(name: str, runs: pd.DataFrame) -> ExitComparison:
    with_exits = runs["exit_2"].notna()
    static = runs[~with_exits]
    # All methods that train as many rounds share their local baseline; the first run of a seed counts.
    local = static.assign(method="Local, without exits", mean=static["local_mean"]).drop_duplicates("seed")
    scores = pd.concat([static, local]).pivot(index="seed", columns="method", values="mean")
    plain = None
    if len(scores.columns):
        # Only means over the same seeds are comparable: those of the method with most seeds.
        seeds = scores[scores.notna().sum().idxmax()].dropna().index
        means = scores.loc[seeds].mean(skipna=False).dropna()
        plain = str(means.idxmax()), float(means.max())
    frames, accuracies, differences = [], {}, {}
    groups = sorted(runs[with_exits].groupby("method", sort=False), key=lambda item: -item[1]["mean"].mean())
    for method, group in groups:
        points, saved, within = _points(group), math.nan, f"budget_{COMPARED}"
        common = group[group["seed"].isin(scores[plain[0]].dropna().index)] if plain else group[:0]
        if plain and len(common):
            curve = _points(common).query("kind == 'budget'")
            accuracy = scores.loc[common["seed"], plain[0]].mean()
            saved = 1.0 - cost_of(
                accuracy, [Point(*point) for point in zip(curve["cost"], curve["accuracy"], strict=True)]
            )
            if within in common:
                paired = common.set_index("seed")[within] - scores[plain[0]]
                differences[str(method)] = paired.dropna().tolist()
        frames.append(points.assign(method=method, saved=saved))
        accuracies[str(method)] = group.sort_values("seed")["mean"].tolist()
    return ExitComparison(name, plain, pd.concat(frames, ignore_index=True), accuracies, differences)


def _points(runs: pd.DataFrame) -> pd.DataFrame:
    """Return mean cost and accuracy of the exits and budgets that all runs have."""
    names = [name for name in exit_columns(runs) if not name.endswith("_flops") and runs[name].notna().all()]
    rows = [(*name.split("_"), runs[f"{name}_flops"].mean(), runs[name].mean()) for name in names]
    return pd.DataFrame(rows, columns=["kind", "number", "cost", "accuracy"]).astype({"number": int})


def with_interval(differences: Sequence[float]) -> str:
    """Return the mean of differences with its 95% interval.

    Of one difference it is the value, and without any it is empty.
    """
    text = f"{mean(differences):+.4f}" if differences else ""
    if len(differences) < 2:
        return text
    low, high = t_interval(differences)
    return f"{text} ({low:+.4f} to {high:+.4f})"


def exit_table(comparison: ExitComparison) -> pd.DataFrame:
    """Return the printed cells of a comparison."""
    rows, difference = {}, f"budget {COMPARED}%, difference to the best without exits (95% interval)"
    for method, points in comparison.points.groupby("method", sort=False):
        accuracies = comparison.accuracies[str(method)]
        row = {"method": method, "accuracy": spread(accuracies)}
        for point in points.itertuples():
            if point.kind == "exit":
                row[f"exit {point.number}"] = f"{point.accuracy:.4f} ({point.cost:.0%})"
            elif point.number in BUDGETS:
                row[f"budget {point.number}%"] = f"{point.accuracy:.4f} ({point.cost:.0%})"
        saved = points["saved"].iloc[0]
        missing = "" if comparison.plain is None else "not reached"
        row["FLOPs saved"] = f"{saved:.1%}" if saved == saved else missing
        row[difference] = with_interval(comparison.differences.get(str(method), []))
        rows[method] = row | {"seeds": len(accuracies)}
    table = pd.DataFrame(list(rows.values())).fillna("")
    last = ["FLOPs saved", difference, "seeds"]
    return table[[*(name for name in table if name not in last), *last]]
