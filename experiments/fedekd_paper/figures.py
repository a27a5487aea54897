"""Figures 2 to 4 of the paper, rankings, exit curves and power curves."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from experiments.fedekd_paper.do_no_harm_results import HarmTable
from experiments.fedekd_paper.exits import ExitComparison
from experiments.fedekd_paper.load import display_name
from experiments.fedekd_paper.statistics import LEVEL, Ranking
from fedekd.do_no_harm.power import acceptance_probability
from fedekd.metrics import METRICS
from fedekd.reporting.figures import BLACK, BLUE, CLIENT_COLOURS, GREY

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Data sets and alpha of Figure 2.
_DATASETS = ("fashionmnist", "cifar10", "retinamnist", "diabetic_retinopathy")
_ALPHA = 0.1
_GRID = {"axis": "y", "color": "#E5E5E5", "linewidth": 0.8}


def score_bars(cells: pd.DataFrame) -> Figure:
    """Figure 2: measured and published mean scores at alpha 0.1.

    Args:
        cells: As `paper_cells` returns them; Tables 8 and 9 are drawn.
    """
    shown = cells[cells["table"].isin([8, 9]) & (cells["alpha"] == _ALPHA)]
    figure = _figure(11.0, 7.6)
    for axes, dataset in zip(np.ravel(figure.subplots(2, 2)), _DATASETS, strict=True):
        _bars(axes, display_name(dataset), shown[shown["dataset"] == dataset])
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    return figure


def _bars(axes: Axes, name: str, cells: pd.DataFrame) -> None:
    positions = np.arange(len(cells))
    style = {"ecolor": BLACK, "capsize": 2}
    axes.bar(positions - 0.2, cells["mean"], 0.38, yerr=cells["std"], color=BLUE, label="measured here", **style)
    paper = {"color": GREY, "label": "the paper (hatched: faulty)"}
    bars = axes.bar(positions + 0.2, cells["paper_mean"], 0.38, yerr=cells["paper_std"], **paper, **style)
    for bar, fault in zip(bars, cells["fault"], strict=True):
        if fault:
            bar.set(alpha=0.45, hatch="//", edgecolor=GREY)
    axes.set_xticks(positions, list(cells["method"]), rotation=40, ha="right", fontsize=8)
    missing = "" if cells["mean"].notna().any() else ": no runs"
    axes.set_title(f"{name}, alpha {_ALPHA}{missing}", fontsize=10)
    metric = METRICS[cells["metric"].iloc[0]]
    axes.set_ylabel(f"{metric.title} ({'higher' if metric.higher_is_better else 'lower'} is better)", fontsize=9)
    axes.grid(**_GRID)
    axes.set_axisbelow(True)


def sweep_curves(parameter: str, data: dict[str, pd.DataFrame], higher: dict[str, bool], alpha: float) -> Figure | None:
    """Figures 3 and 4: average Delta over a parameter; None without runs.

    Args:
        parameter: Label of the x axis.
        data: As `sweep_values` returns it.
        higher: Direction of the metric by data set.
        alpha: Concentration of the partition.
    """
    if not data:
        return None
    figure = _figure(4.6 * len(data), 4.0)
    for axes, (dataset, frame) in zip(np.ravel(figure.subplots(1, len(data))), data.items(), strict=True):
        positions = range(frame.shape[1])
        for _, line in frame.iterrows():
            axes.plot(positions, line, color=GREY, alpha=0.45, linewidth=0.8, marker=".", markersize=3)
        error = frame.std().fillna(0.0)
        axes.errorbar(positions, frame.mean(), yerr=error, color=BLUE, marker="o", linewidth=2.2, capsize=3)
        axes.axhline(0.0, color=BLACK, linewidth=0.8, linestyle="--")
        axes.set_xticks(positions, [f"{value:g}" for value in frame.columns])
        axes.set_title(f"{display_name(dataset)}, alpha {alpha}, {len(frame)} seeds", fontsize=10)
        axes.set_xlabel(parameter)
        axes.set_ylabel(f"average Delta ({'higher' if higher[dataset] else 'lower'} is better)", fontsize=9)
        axes.grid(**_GRID)
    return figure


def critical_difference(ranking: Ranking, title: str) -> Figure:
    """Critical-difference diagram (Demsar 2006).

    Bars join methods that Nemenyi's test does not separate.
    """
    names, ranks = list(ranking.mean_ranks), list(ranking.mean_ranks.values())
    count, groups = len(names), ranking.groups()
    half = -(-count // 2)
    bottom = 0.5 + 0.22 * len(groups)
    figure = _figure(8.0, 1.5 + 0.26 * half + 0.2 * len(groups))
    axes = figure.subplots()
    axes.set_xlim(0.3, count + 0.7)
    axes.set_ylim(bottom + 0.4 * half + 0.2, -0.9)
    axes.axis("off")
    axes.plot([1, count], [0, 0], color=BLACK, linewidth=1.2)
    for tick in range(1, count + 1):
        axes.plot([tick, tick], [0, -0.1], color=BLACK, linewidth=1.0)
        axes.text(tick, -0.18, str(tick), ha="center", va="bottom", fontsize=8)
    for position, (name, mean_rank) in enumerate(zip(names, ranks, strict=True)):
        left = position < half
        row = position if left else count - 1 - position
        level, side = bottom + 0.4 * row, 0.75 if left else count + 0.25
        colour = BLUE if name == "FedeKD" else GREY
        axes.plot([mean_rank, mean_rank, side], [0, level, level], color=colour, linewidth=1.0)
        text = f"{name}  {mean_rank:.2f}" if left else f"{mean_rank:.2f}  {name}"
        axes.text(side, level, f" {text} ", ha="right" if left else "left", va="center", fontsize=9)
    for index, group in enumerate(groups):
        ends = [ranking.mean_ranks[group[0]] - 0.04, ranking.mean_ranks[group[-1]] + 0.04]
        axes.plot(ends, [0.28 + 0.22 * index] * 2, color=BLACK, linewidth=3.2, solid_capstyle="butt")
    test = f"critical difference {ranking.critical_difference:.2f} at {LEVEL:.0%}, {ranking.repetitions} runs"
    axes.set_title(f"{title}\n{test}, Friedman p = {ranking.p:.2g}", fontsize=10)
    return figure


def exit_curves(comparison: ExitComparison) -> Figure:
    """Accuracy against cost by method; dashed: the best method without exits."""
    figure = _figure(9.0, 5.4)
    axes = figure.subplots()
    budgets = comparison.points[comparison.points["kind"] == "budget"]
    for index, (method, points) in enumerate(budgets.groupby("method", sort=False)):
        style = ("-", "--", ":")[index // len(CLIENT_COLOURS) % 3]
        colour = CLIENT_COLOURS[index % len(CLIENT_COLOURS)]
        axes.plot(points["cost"], points["accuracy"], style, color=colour, label=method)
    if comparison.plain is not None:
        label, accuracy = comparison.plain
        axes.axhline(accuracy, color=BLACK, linewidth=0.9, linestyle="--")
        axes.annotate(label, (0.0, accuracy), xytext=(2, 3), textcoords="offset points", fontsize=8)
    axes.set_xlabel("mean FLOPs per image, share of the plain network's")
    axes.set_ylabel("mean accuracy of the clients")
    axes.set_xlim(0.0, 1.02)
    axes.set_title(comparison.name, fontsize=10)
    axes.grid(color="#E5E5E5", linewidth=0.8)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    return figure


def power_curves(table: HarmTable) -> Figure:
    """Exact probability that a client deploys the federated model, by its gain."""
    figure = _figure(9.6, 4.0)
    gains = [step / 1000 for step in range(-20, 31, 2)]
    for axes, margin in zip(figure.subplots(1, 2, sharey=True), (0.0, 0.01), strict=True):
        for colour, samples in zip(CLIENT_COLOURS, sorted({300, round(table.samples), 2300, 7000}), strict=False):
            rule = replace(table.rule, margin=margin)
            possible = [gain for gain in gains if abs(gain) <= table.differing]
            probabilities = [acceptance_probability(rule, gain, table.differing, samples) for gain in possible]
            axes.plot(possible, probabilities, color=colour, label=f"n = {samples:,}")
        axes.axhline(table.rule.level, color=BLACK, linewidth=0.8, linestyle="--")
        axes.axvline(-margin, color=BLACK, linewidth=0.8, linestyle=":")
        axes.set_title(f"margin {margin:g}, the models differ on {table.differing:.1%}", fontsize=10)
        axes.set_xlabel("true gain in accuracy")
        axes.grid(color="#E5E5E5", linewidth=0.8)
    figure.axes[0].set_ylabel("probability of deploying it")
    figure.axes[0].legend(frameon=False, fontsize=8)
    return figure


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")
