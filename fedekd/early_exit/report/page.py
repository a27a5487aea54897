"""Rendering of an early-exit report as HTML, Markdown, CSV and PNG files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pandas as pd

from fedekd.early_exit.report import figures
from fedekd.early_exit.report.exit_report import ExitReport
from fedekd.early_exit.report.tables import report_tables
from fedekd.reporting.figures import save
from fedekd.reporting.pages import embedded, environment, write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class ReportFigure(NamedTuple):
    """A figure of the report.

    Attributes:
        name: Name of the PNG file without suffix.
        table: Name of the table below the figure.
        caption: Caption and alternative text.
        plot: Function that draws it.
    """

    name: str
    table: str
    caption: str
    plot: Callable[[ExitReport], Figure]


_FIGURES = (
    ReportFigure(
        "accuracy_against_cost",
        "policies",
        "Test accuracy against cost. Lines: one threshold for all exits. Circles: all images at one exit.",
        figures.accuracy_against_cost,
    ),
    ReportFigure(
        "validity",
        "validity",
        "Left: largest true error rate of an exit against the target risk. Right: rate of draws that exceed it.",
        figures.validity,
    ),
    ReportFigure(
        "reliability",
        "reliability",
        "Accuracy against confidence at each exit, over all test images.",
        figures.reliabilities,
    ),
    ReportFigure(
        "corruption",
        "corruption",
        "Largest error rate of an exit under image corruptions, where the guarantee does not apply.",
        figures.corruption,
    ),
)


def write_exit_report(report: ExitReport, folder: Path) -> list[Path]:
    """Write a report and replace an older one in the same folder.

    Args:
        report: The report.
        folder: Folder to write to; it is created.

    Returns:
        Paths of the files: index.html, report.md, tables/*.csv, figures/*.png.
    """
    tables = report_tables(report)
    names = {table.name for table in tables}
    shown = [figure for figure in _FIGURES if figure.table in names]
    pictures = {figure.name: folder / "figures" / f"{figure.name}.png" for figure in shown}
    for figure in shown:
        pictures[figure.name].parent.mkdir(parents=True, exist_ok=True)
        save(figure.plot(report), pictures[figure.name])
    frames = {table.name: table.frame for table in tables}
    frames["provenance"] = pd.DataFrame(report.provenance.items(), columns=["name", "value"])
    texts = {
        folder / "tables" / f"{name}.csv": frame.to_csv(index=False, lineterminator="\n")
        for name, frame in frames.items()
    }
    shared = {"report": report, "tables": tables, "figures": shown, "finding": finding(report)}
    templates = environment("fedekd.early_exit")
    texts[folder / "report.md"] = templates.get_template("exits.md").render(**shared)
    texts[folder / "index.html"] = templates.get_template("exits.html").render(**shared, pictures=embedded(pictures))
    for path, text in texts.items():
        write_text(path, text.rstrip() + "\n")
    return [*pictures.values(), *texts]


def finding(report: ExitReport) -> str:
    """Summarise the main result in one or two sentences."""
    distance = lambda result: abs(result.policy.target_risk - report.options.target_risk)  # noqa: E731
    result = min(report.policies, key=distance, default=None)
    if result is None:
        return "No policy was calibrated."
    metrics = result.metrics
    change = 100 * (metrics.point.accuracy - metrics.full_accuracy)
    sentence = (
        f"With an error rate of at most {result.policy.target_risk:.0%} guaranteed at each exit (confidence"
        f" {result.policy.confidence:g}), {1 - metrics.exit_shares[-1]:.1%} of the test images exit early and"
        f" {1 - metrics.point.cost:.1%} of the FLOPs are saved. Accuracy changes by {change:+.2f} points, from"
        f" {metrics.full_accuracy:.4f} to {metrics.point.accuracy:.4f}."
    )
    first, *others = report.networks
    ranges = {(round(network.curve[0].cost, 9), round(network.curve[-1].cost, 9)) for network in (first, *others[:1])}
    if others and len(ranges) == 1:  # areas over different ranges of budgets are not comparable
        sentence += (
            f" Over all budgets the accuracy of {first.name} differs by {100 * (first.area - others[0].area):+.2f}"
            f" points from that of {others[0].name} (area under accuracy against cost)."
        )
    return sentence
