"""A report on exits as one folder: a page, a Markdown file, CSV files and figures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from fedekd.early_exit.report import figures as exit_figures
from fedekd.early_exit.report.exit_report import ExitReport
from fedekd.early_exit.report.tables import report_tables
from fedekd.reporting.figures import save
from fedekd.reporting.pages import csv_text, embedded, environment, write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Drawing(NamedTuple):
    """A figure, and beside which table it stands.

    Attributes:
        name: Of its file.
        sheet: The table's name.
        told: What it shows.
        figure: The drawing.
    """

    name: str
    sheet: str
    told: str
    figure: Figure


def write_exit_report(report: ExitReport, folder: Path) -> list[Path]:
    """Write a report; an older one in the same folder is replaced.

    Returns:
        The files: index.html, report.md, tables/*.csv, figures/*.png.
    """
    drawings = _drawings(report)
    pictures = {drawing.name: folder / "figures" / f"{drawing.name}.png" for drawing in drawings}
    for drawing in drawings:
        pictures[drawing.name].parent.mkdir(parents=True, exist_ok=True)
        save(drawing.figure, pictures[drawing.name])
    made = report_tables(report)
    tables = {folder / "tables" / f"{sheet.name}.csv": csv_text(sheet.columns, sheet.lines) for sheet in made}
    provenance = [{"name": name, "value": value} for name, value in report.provenance.items()]
    tables[folder / "tables" / "provenance.csv"] = csv_text(("name", "value"), provenance)
    shared = {"report": report, "report_tables": made, "drawings": drawings, "finding": finding(report)}
    templates = environment("fedekd.early_exit")
    pages = {
        folder / "report.md": templates.get_template("exits.md").render(**shared),
        folder / "index.html": templates.get_template("exits.html").render(**shared, pictures=embedded(pictures)),
    }
    for path, text in (tables | pages).items():
        write_text(path, text.rstrip() + "\n")
    return [*pictures.values(), *tables, *pages]


def finding(report: ExitReport) -> str:
    """The outcome in two sentences."""
    line = min(report.policies, key=lambda line: abs(line.policy.alpha - report.options.alpha), default=None)
    if line is None:
        return "No policy was asked for."
    found = line.evaluate_policy
    change = 100 * (found.point.accuracy - found.full_accuracy)
    told = (
        f"With at most {line.policy.alpha:.0%} errors promised at each exit, {1 - found.shares[-1]:.1%} of the test"
        f" images leave early and {1 - found.point.cost:.1%} of the FLOPs are saved; accuracy changes by {change:+.2f}"
        f" points, from {found.full_accuracy:.4f} to {found.point.accuracy:.4f}."
    )
    ranges = {(round(curve[0].cost, 9), round(curve[-1].cost, 9)) for curve in report.curves[:2]}
    if len(report.runs) > 1 and len(ranges) == 1:  # a mean over other budgets is no comparison
        gain = report.areas[0] - report.areas[1]
        told += (
            f" Over all budgets {report.runs[0].name} is {100 * gain:+.2f} points from {report.runs[1].name}"
            " (area under accuracy against cost)."
        )
    return told


def _drawings(report: ExitReport) -> list[Drawing]:
    drawn = [
        Drawing(
            "accuracy_against_cost",
            "policies",
            "Accuracy against cost. Lines: the same threshold at all exits; rings: all images at one exit.",
            exit_figures.accuracy_against_cost(report),
        ),
        Drawing(
            "validity",
            "validity",
            "Left: the worst exit's true error rate against the one asked for. Right: how often that was broken.",
            exit_figures.validity(report),
        ),
        Drawing(
            "reliability",
            "reliability",
            "Accuracy against confidence at each exit, over all test images.",
            exit_figures.reliabilities(report),
        ),
    ]
    if report.corrupted:
        told = "The worst exit's error rate under corruption, where nothing is promised."
        drawn.append(Drawing("corruption", "corruption", told, exit_figures.corruption(report)))
    return drawn
