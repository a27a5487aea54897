"""Figures of an early-exit report; functions return a Figure."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from fedekd.data.corruptions import SEVERITIES
from fedekd.early_exit.report.exit_report import ExitReport
from fedekd.reporting.figures import BLACK, BLUE, CLIENT_COLOURS, GREY, MARKERS, VERMILLION

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def accuracy_against_cost(report: ExitReport) -> Figure:
    """Plot curves and single exits, and the policies of the first network."""
    figure = _figure(7.0, 4.8)
    axes = figure.subplots()
    for index, network in enumerate(report.networks):
        colour = CLIENT_COLOURS[index % len(CLIENT_COLOURS)]
        axes.plot(*zip(*network.curve, strict=True), color=colour, label=f"{network.name}: one threshold for all exits")
        points = zip(*network.points, strict=True)
        axes.plot(*points, "o", color=colour, mfc="white", label=f"{network.name}: all images at one exit")
    for index, result in enumerate(report.policies):
        marker = MARKERS[(index + 2) % len(MARKERS)]
        label = f"{report.networks[0].name}, calibrated: target risk {result.policy.target_risk:g}"
        axes.plot(*result.metrics.point, marker, color=VERMILLION, markersize=8, label=label)
    axes.axhline(report.policies[0].metrics.full_accuracy, color=GREY, linewidth=1.0, linestyle="--")
    axes.set(
        title=f"Accuracy against cost, {report.dataset}",
        xlabel="FLOPs per image / FLOPs of the plain network",
        ylabel="test accuracy",
    )
    _finish(figure, axes, columns=2)
    return figure


def validity(report: ExitReport) -> Figure:
    """Plot the largest true error rate per draw, and the rate of violations."""
    figure = _figure(10.0, 4.6)
    left, right = figure.subplots(1, 2)
    modes = list(dict.fromkeys(result.calibrator.mode for result in report.validity))
    for index, mode in enumerate(modes):
        results = [result for result in report.validity if result.calibrator.mode == mode]
        # Shifted, so that the error bars of the rules do not overlap.
        shift = 1.0 + 0.06 * (index - (len(modes) - 1) / 2)
        targets = np.asarray([result.calibrator.target_risk for result in results])
        # Draws in which no image takes an early exit count as risk 0.
        worst = [np.nan_to_num(result.risks).max(axis=1, initial=0.0) for result in results]
        median = np.asarray([np.median(risks) for risks in worst])
        quantiles = np.asarray([np.quantile(risks, (0.05, 0.95)) for risks in worst]).T
        style = {"color": CLIENT_COLOURS[index], "marker": MARKERS[index], "linestyle": "none", "capsize": 2}
        left.errorbar(targets * shift, median, np.abs(quantiles - median), **style, label=mode)
        rates = np.asarray([result.violation_rate for result in results])
        intervals = np.asarray([result.interval for result in results]).T
        right.errorbar(targets * shift, rates, np.abs(intervals - rates), **style)
    ticks = sorted({result.calibrator.target_risk for result in report.validity})
    left.plot(ticks, ticks, color=BLACK, linewidth=1.0, linestyle="--", label="target / allowed")
    right.axhline(1.0 - report.options.confidence, color=BLACK, linewidth=1.0, linestyle="--")
    draws = report.validity[0].draws
    left.set(title=f"Largest true error rate of an exit, {draws} draws", ylabel="median, 5% to 95%", yscale="log")
    right.set(title="Draws that violate the target", ylabel="rate, 95% interval", ylim=(-0.03, 1.03))
    for axes in (left, right):
        axes.set_xscale("log")
        axes.set_xticks(ticks, [f"{target:g}" for target in ticks])
        axes.minorticks_off()
        axes.set_xlabel("target risk (maximum error rate per exit)")
    _finish(figure, left, columns=6)
    _grid(right)
    return figure


def reliabilities(report: ExitReport) -> Figure:
    """Plot accuracy against confidence, one panel per exit."""
    count = len(report.reliabilities)
    figure = _figure(3.2 * count + 0.6, 3.8)
    panels = np.ravel(figure.subplots(1, count, sharey=True, squeeze=False))
    for axes, line in zip(panels, report.reliabilities, strict=True):
        axes.plot((0, 1), (0, 1), color=GREY, linewidth=1.0, linestyle="--")
        total = sum(each.count for each in line.bins)
        sizes = [12 + 240 * math.sqrt(each.count / total) for each in line.bins]
        confidences = [each.confidence for each in line.bins]
        axes.scatter(confidences, [each.accuracy for each in line.bins], sizes, color=BLUE, alpha=0.75)
        title = f"exit {line.exit}, ECE {line.error:.3f}, scaled {line.scaled_error:.3f}"
        axes.set(title=title, xlabel="confidence", xlim=(0, 1.03), ylim=(0, 1.03))
    panels[0].set_ylabel("accuracy (area: number of images)")
    return figure


def corruption(report: ExitReport) -> Figure:
    """Plot the largest error rate of an exit against severity, per corruption."""
    names = list(dict.fromkeys(result.corruption for result in report.corruptions))
    figure = _figure(10.0, 5.6)
    panels = np.ravel(figure.subplots(2, -(-len(names) // 2), sharex=True, sharey=True, squeeze=False))
    for axes, name in zip(panels, names, strict=False):
        results = [result for result in report.corruptions if result.corruption == name]
        severities = [result.severity for result in results]
        original = [result.original.worst_risk for result in results]
        recalibrated = [result.recalibrated.worst_risk for result in results]
        axes.plot(severities, original, "o-", color=VERMILLION, label="calibrated on clean images")
        axes.plot(severities, recalibrated, "s-", color=BLUE, label="calibrated on images with the same corruption")
        axes.axhline(report.options.target_risk, color=BLACK, linewidth=1.0, linestyle="--", label="target risk")
        axes.set_title(name, fontsize=10)
        axes.set_xticks(SEVERITIES)
        _grid(axes)
    for axes in panels[-(len(panels) // 2) :]:
        axes.set_xlabel("severity")
    for axes in panels[:: len(panels) // 2]:
        axes.set_ylabel("largest error rate of an exit")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _grid(axes: Axes) -> None:
    axes.grid(axis="y", color="#E5E5E5", linewidth=0.8)
    axes.set_axisbelow(True)


def _finish(figure: Figure, axes: Axes, columns: int) -> None:
    _grid(axes)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=8)
