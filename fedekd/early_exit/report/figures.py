"""The figures of a report on exits. Each function returns a Figure and shows nothing."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from fedekd.data.corruptions import LEVELS
from fedekd.early_exit.report.exit_report import ExitReport
from fedekd.reporting.figures import BLACK, BLUE, CLIENT_COLOURS, GREY, MARKERS, VERMILLION

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def accuracy_against_cost(report: ExitReport) -> Figure:
    """The curve of each network, its exits, and the calibrated policies of the first."""
    figure = _figure(7.0, 4.8)
    axes = figure.subplots()
    for place, (run, curve, points) in enumerate(zip(report.runs, report.curves, report.points, strict=True)):
        colour = CLIENT_COLOURS[place % len(CLIENT_COLOURS)]
        axes.plot(*zip(*curve, strict=True), color=colour, label=f"{run.name}: leave when sure enough")
        axes.plot(*zip(*points, strict=True), "o", color=colour, mfc="white", label=f"{run.name}: all at one exit")
    for place, line in enumerate(report.policies):
        marker = MARKERS[(place + 2) % len(MARKERS)]
        label = f"{report.runs[0].name}, calibrated: alpha {line.policy.alpha:g}"
        axes.plot(*line.evaluate_policy.point, marker, color=VERMILLION, markersize=8, label=label)
    axes.axhline(report.policies[0].evaluate_policy.full_accuracy, color=GREY, linewidth=1.0, linestyle="--")
    axes.set(
        title=f"Accuracy against cost, {report.dataset}",
        xlabel="FLOPs an image, over those of the plain network",
        ylabel="accuracy (fraction of test images)",
    )
    _finish(figure, axes, columns=2)
    return figure


def validity(report: ExitReport) -> Figure:
    """Risk against target: the worst true risk of each draw, and the share of draws that break the promise."""
    figure = _figure(10.0, 4.6)
    left, right = figure.subplots(1, 2)
    modes = list(dict.fromkeys(line.mode for line in report.validity))
    for place, mode in enumerate(modes):
        colour, marker = CLIENT_COLOURS[place], MARKERS[place]
        lines = [line for line in report.validity if line.mode == mode]
        # Side by side, or the bars of one rule hide those of another.
        shift = 1.0 + 0.06 * (place - (len(modes) - 1) / 2)
        alphas = np.asarray([line.alpha for line in lines])
        worst = [np.nan_to_num(np.nanmax(_or_nan(line.risks), axis=1)) for line in lines]
        middle = np.asarray([np.median(risks) for risks in worst])
        ends = np.asarray([np.quantile(risks, (0.05, 0.95)) for risks in worst]).T
        style = {"color": colour, "marker": marker, "linestyle": "none", "capsize": 2, "label": mode}
        left.errorbar(alphas * shift, middle, np.abs(ends - middle), **style)
        shares = np.asarray([line.share for line in lines])
        intervals = np.asarray([line.interval for line in lines]).T
        right.errorbar(alphas * shift, shares, np.abs(intervals - shares), **style)
    targets = sorted({line.alpha for line in report.validity})
    left.plot(targets, targets, color=BLACK, linewidth=1.0, linestyle="--", label="what was asked for")
    right.axhline(report.options.delta, color=BLACK, linewidth=1.0, linestyle="--")
    draws = report.validity[0].draws
    left.set(title=f"Worst exit's true error rate, {draws} draws", ylabel="median, 5% to 95%", yscale="log")
    right.set(title="Draws that break the promise", ylabel="share, 95% interval", ylim=(-0.03, 1.03))
    for axes in (left, right):
        axes.set_xscale("log")
        axes.set_xticks(targets, [f"{alpha:g}" for alpha in targets])
        axes.minorticks_off()
        axes.set_xlabel("alpha: the error rate asked for")
    _finish(figure, left, columns=6)
    right.grid(axis="y", color="#E5E5E5", linewidth=0.8)
    right.set_axisbelow(True)
    return figure


def _or_nan(
    risks: np.ndarray[tuple[int, ...], np.dtype[np.float64]],
) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """Risks with 0 where nobody leaves at any exit, so that a maximum is there."""
    nobody = np.isnan(risks).all(axis=1, keepdims=True)
    return np.where(nobody, 0.0, risks)


def reliabilities(report: ExitReport) -> Figure:
    """Accuracy against confidence, a panel an exit."""
    count = len(report.reliabilities)
    figure = _figure(3.2 * count + 0.6, 3.8)
    panels = np.ravel(figure.subplots(1, count, sharey=True, squeeze=False))
    for axes, line in zip(panels, report.reliabilities, strict=True):
        axes.plot((0, 1), (0, 1), color=GREY, linewidth=1.0, linestyle="--")
        total = sum(each.count for each in line.bins)
        sizes = [12 + 240 * math.sqrt(each.count / total) for each in line.bins]
        confidences = [each.confidence for each in line.bins]
        axes.scatter(confidences, [each.accuracy for each in line.bins], sizes, color=BLUE, alpha=0.75)
        axes.set(title=f"exit {line.exit}, ECE {line.error:.3f}", xlabel="confidence", xlim=(0, 1.03), ylim=(0, 1.03))
    panels[0].set_ylabel("accuracy (areas: how many)")
    return figure


def corruption(report: ExitReport) -> Figure:
    """The worst exit's risk over the levels of each corruption, kept and recalibrated."""
    names = list(dict.fromkeys(line.corruption for line in report.corrupted))
    figure = _figure(10.0, 5.6)
    panels = np.ravel(figure.subplots(2, -(-len(names) // 2), sharex=True, sharey=True, squeeze=False))
    for axes, name in zip(panels, names, strict=False):
        lines = [line for line in report.corrupted if line.corruption == name]
        levels = [line.level for line in lines]
        axes.plot(levels, [line.kept.worst_risk for line in lines], "o-", color=VERMILLION, label="calibrated on clean")
        again = [line.recalibrated.worst_risk for line in lines]
        axes.plot(levels, again, "s-", color=BLUE, label="calibrated on images corrupted alike")
        axes.axhline(report.options.alpha, color=BLACK, linewidth=1.0, linestyle="--", label="alpha")
        axes.set_title(name, fontsize=10)
        axes.set_xticks(LEVELS)
        axes.grid(axis="y", color="#E5E5E5", linewidth=0.8)
    for axes in panels[-(len(panels) // 2) :]:
        axes.set_xlabel("level")
    panels[0].set_ylabel("worst exit's error rate")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _finish(figure: Figure, axes: Axes, columns: int) -> None:
    axes.grid(axis="y", color="#E5E5E5", linewidth=0.8)
    axes.set_axisbelow(True)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=8)
