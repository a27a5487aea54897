"""Results as one table: mean and standard deviation over seeds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import mean, stdev

from fedekd.benchmark.results import Row

#: What is told of each method, by the column of the results.
FIGURES = {"mean": "score", "delta_avg": "Delta avg", "delta_worst": "Delta worst", "delta_tail": "Delta P10/P90"}


def spread(values: Sequence[float], signed: bool) -> str:
    """Mean and sample standard deviation, or the value alone if there is but one.

    Example:
        >>> spread([0.1, 0.3], signed=True), spread([0.25], signed=False)
        ('+0.2000 ± 0.1414', '0.2500')
    """
    middle = f"{mean(values):{'+' if signed else ''}.4f}"
    return f"{middle} ± {stdev(values):.4f}" if len(values) > 1 else middle


def markdown_table(rows: Iterable[Row]) -> str:
    """A Markdown table with a line for each (data set, alpha, method), by data set and alpha, best Delta first.

    Local, which every run holds its clients against, is in it without a run of its own.

    Args:
        rows: Rows of results, as `read_results` gives them.
    """
    groups: dict[tuple[str, float, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["dataset"], float(row["alpha"]), row["method"]), []).append(row)
    for place, of_local in _local(groups).items():
        groups.setdefault((*place, "Local"), of_local)

    def rank(key: tuple[str, float, str]) -> tuple[str, float, float]:
        gain = mean(float(row["delta_avg"]) for row in groups[key])
        return key[0], key[1], -gain if groups[key][0]["metric"] == "accuracy" else gain

    lines = [
        f"| data set | alpha | method | {' | '.join(FIGURES.values())} | seeds |",
        f"| --- | --- | --- | {' | '.join('---' for _ in FIGURES)} | --- |",
    ]
    for key in sorted(groups, key=rank):
        dataset, alpha, method = key
        own = groups[key]
        cells = [spread([float(row[name]) for row in own], name != "mean") for name in FIGURES]
        if method == "Local":
            cells[1:] = ["0"] * (len(cells) - 1)
        metric = own[0]["metric"]
        lines.append(f"| {dataset}, {metric} | {alpha:g} | {method} | {' | '.join(cells)} | {len(own)} |")
    return "\n".join(lines)


def _local(groups: dict[tuple[str, float, str], list[Row]]) -> dict[tuple[str, float], list[Row]]:
    """Local's rows by data set and alpha, one a seed, out of those of the methods held against it."""
    found: dict[tuple[str, float], dict[str, Row]] = {}
    for (dataset, alpha, _), rows in groups.items():
        for row in rows:
            local = {**row, "mean": row["local_mean"], **dict.fromkeys(FIGURES.keys() - {"mean"}, "0")}
            found.setdefault((dataset, alpha), {}).setdefault(row["seed"], local)
    return {place: list(rows.values()) for place, rows in found.items()}
