"""The paper's Figures 2, 3 and 4, and rankings drawn with their critical difference. Nothing is shown on a screen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import TYPE_CHECKING

import numpy as np

from fedekd.benchmark.measured import Measured, title
from fedekd.benchmark.statistics import LEVEL, Ranking
from fedekd.benchmark.tables import Panel, Table
from fedekd.reporting.figures import BLACK, BLUE, GREY

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: What Figure 2 shows, and at which alpha.
_SHOWN = ("fashionmnist", "cifar10", "retinamnist", "diabetic_retinopathy")
_SHOWN_ALPHA = 0.1
#: The alpha of Figures 3 and 4, and the default of both parameters, which the paper's sweeps leave out.
SWEEP_ALPHA, _DEFAULT = 0.5, 1.0


def scores(tables: Sequence[Table]) -> Figure:
    """Figure 2: mean accuracy and mean RMSE at alpha 0.1, ours beside the paper's, whiskers of one standard deviation.

    Args:
        tables: The report's; 8 and 9 hold what is drawn.
    """
    of_number = {table.number: table for table in tables}
    panels = [
        (panel, of_number[number].higher_is_better)
        for number in (8, 9)
        for panel in of_number[number].panels
        if panel.dataset in _SHOWN
    ]
    figure = _figure(11.0, 7.6)
    for axes, (panel, higher) in zip(np.ravel(figure.subplots(2, 2)), panels, strict=False):
        _score_bars(axes, panel, higher)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    return figure


def _score_bars(axes: Axes, panel: Panel, higher: bool) -> None:
    column = panel.alphas.index(_SHOWN_ALPHA)
    entries = {method: row[column] for method, row in panel.rows.items() if row[column].values or row[column].paper}
    for shift, colour, label in ((-0.2, BLUE, "measured here"), (0.2, GREY, "the paper (hatched: faulty)")):
        ours = shift < 0
        heights, errors, faded = [], [], []
        for entry in entries.values():
            source = entry if ours else entry.paper
            value, spread = (source.mean, source.std) if source is not None else (None, None)
            heights.append(np.nan if value is None else value)
            errors.append(np.nan if spread is None else spread)
            faded.append(bool(not ours and entry.paper and entry.paper.fault))
        places = np.arange(len(entries)) + shift
        bars = axes.bar(places, heights, 0.38, yerr=errors, color=colour, label=label, ecolor=BLACK, capsize=2)
        for bar, is_faded in zip(bars, faded, strict=True):
            if is_faded:
                bar.set(alpha=0.45, hatch="//", edgecolor=GREY)
    axes.set_xticks(range(len(entries)), list(entries), rotation=40, ha="right", fontsize=8)
    not_run = "" if any(entry.values for entry in entries.values()) else ": not run here"
    better = "higher is better" if higher else "lower is better"
    axes.set_title(f"{panel.title}, alpha {_SHOWN_ALPHA}{not_run}", fontsize=10)
    axes.set_ylabel(f"{'accuracy' if higher else 'RMSE'} ({better})", fontsize=9)
    axes.grid(axis="y", color="#E5E5E5", linewidth=0.8)
    axes.set_axisbelow(True)


def swept(measured: Measured, parameter: str) -> Mapping[str, Mapping[float, dict[int, float]]]:
    """Average Delta at alpha 0.5 by data set, value of a parameter and seed, the default 1 being FedeKD itself.

    The seeds are those that all values have, or a mean would be of other partitions than its neighbour.

    Args:
        measured: The results.
        parameter: `beta` or `lambda_kd`, as the labels of the sweeps begin.
    """
    found = {}
    for dataset in measured.datasets:
        values = {_DEFAULT: measured.values("delta_avg", "FedeKD", dataset, SWEEP_ALPHA)}
        for name in measured.methods(dataset, swept=True):
            swept_parameter, _, value = name.partition(" ")
            if swept_parameter == parameter and _is_number(value):
                values[float(value)] = measured.values("delta_avg", name, dataset, SWEEP_ALPHA)
        values = {value: of_seed for value, of_seed in values.items() if of_seed}
        seeds = set.intersection(*(set(of_seed) for of_seed in values.values())) if len(values) > 1 else set()
        if seeds:
            found[dataset] = {value: {seed: values[value][seed] for seed in sorted(seeds)} for value in sorted(values)}
    return found


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def sweep(measured: Measured, parameter: str) -> Figure | None:
    """Figures 3 and 4: average Delta over a parameter, one panel a data set; None if nothing was run.

    Args:
        measured: The results.
        parameter: `beta` (Figure 3) or `lambda_kd` (Figure 4).
    """
    data = swept(measured, parameter)
    if not data:
        return None
    figure = _figure(4.6 * len(data), 4.0)
    for axes, (dataset, by_value) in zip(np.ravel(figure.subplots(1, len(data))), data.items(), strict=True):
        places = range(len(by_value))
        middle = [mean(of_seed.values()) for of_seed in by_value.values()]
        spread = [stdev(of_seed.values()) if len(of_seed) > 1 else 0.0 for of_seed in by_value.values()]
        for seed in next(iter(by_value.values())):
            line = [of_seed[seed] for of_seed in by_value.values()]
            axes.plot(places, line, color=GREY, alpha=0.45, linewidth=0.8, marker=".", markersize=3)
        axes.errorbar(places, middle, yerr=spread, color=BLUE, marker="o", linewidth=2.2, capsize=3)
        axes.axhline(0.0, color=BLACK, linewidth=0.8, linestyle="--")
        axes.set_xticks(places, [f"{value:g}" for value in by_value])
        better = "higher" if measured.metric(dataset) == "accuracy" else "lower"
        seeds = len(next(iter(by_value.values())))
        axes.set_title(f"{title(dataset)}, alpha {SWEEP_ALPHA}, {seeds} seeds", fontsize=10)
        axes.set_xlabel(parameter)
        axes.set_ylabel(f"average Delta ({better} is better)", fontsize=9)
        axes.grid(axis="y", color="#E5E5E5", linewidth=0.8)
    return figure


def critical_difference(ranking: Ranking, heading: str) -> Figure:
    """A ranking as Demsar draws it: bars join methods that Nemenyi's test does not tell apart.

    Args:
        ranking: The ranking.
        heading: What is ranked.
    """
    names, ranks = list(ranking.mean_ranks), list(ranking.mean_ranks.values())
    count, groups = len(names), ranking.alike()
    half = -(-count // 2)
    bottom = 0.5 + 0.22 * len(groups)
    figure = _figure(8.0, 1.5 + 0.26 * half + 0.2 * len(groups))
    axes = figure.subplots()
    axes.set_xlim(0.3, count + 0.7)
    axes.set_ylim(bottom + 0.4 * half + 0.2, -0.9)
    axes.axis("off")
    axes.plot([1, count], [0, 0], color=BLACK, linewidth=1.2)
    for place in range(1, count + 1):
        axes.plot([place, place], [0, -0.1], color=BLACK, linewidth=1.0)
        axes.text(place, -0.18, str(place), ha="center", va="bottom", fontsize=8)
    for position, (name, at) in enumerate(zip(names, ranks, strict=True)):
        left = position < half
        row = position if left else count - 1 - position
        level, side = bottom + 0.4 * row, 0.75 if left else count + 0.25
        axes.plot([at, at, side], [0, level, level], color=BLUE if name == "FedeKD" else GREY, linewidth=1.0)
        text = f"{name}  {at:.2f}" if left else f"{at:.2f}  {name}"
        axes.text(side, level, f" {text} ", ha="right" if left else "left", va="center", fontsize=9)
    for place, group in enumerate(groups):
        ends = [ranking.mean_ranks[group[0]] - 0.04, ranking.mean_ranks[group[-1]] + 0.04]
        axes.plot(ends, [0.28 + 0.22 * place] * 2, color=BLACK, linewidth=3.2, solid_capstyle="butt")
    told = f"critical difference {ranking.critical_difference:.2f} at {LEVEL:.0%}, {ranking.repetitions} repetitions"
    axes.set_title(f"{heading}\n{told}, Friedman p = {ranking.p:.2g}", fontsize=10)
    return figure


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")
