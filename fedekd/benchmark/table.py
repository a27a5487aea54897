"""The results of a grid as one table: mean and standard deviation over seeds."""

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

    Args:
        rows: Rows of results, as `read_results` gives them.
    """
    groups: dict[tuple[str, float, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["dataset"], float(row["alpha"]), row["method"]), []).append(row)

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
        metric = own[0]["metric"]
        lines.append(f"| {dataset}, {metric} | {alpha:g} | {method} | {' | '.join(cells)} | {len(own)} |")
    return "\n".join(lines)
