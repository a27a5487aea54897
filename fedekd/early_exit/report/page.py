"""Sections of a report on early exits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import pandas as pd

from fedekd.early_exit.report import figures
from fedekd.early_exit.report.exit_report import ExitReport
from fedekd.early_exit.report.tables import report_tables
from fedekd.early_exit.statement import exit_guarantee, percent
from fedekd.reporting.document import Picture, Section

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class ReportFigure(NamedTuple):
    """A figure of the report.

    Attributes:
        name: Name of the PNG file without suffix.
        table: Name of the table next to the figure.
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


def exit_sections(report: ExitReport) -> list[Section]:
    """Return the sections of a report: one per table, and the provenance.

    Args:
        report: The report.
    """
    first, *others = report.networks
    compared = f", compared with {', '.join(network.name for network in others)}" if others else ""
    text = (
        f"{report.client[0].upper()}{report.client[1:]} of {first.name}{compared}: a network with"
        f" {first.network.num_exits} exits and {first.costs.full:,} FLOPs per image without early exits."
    )
    sections = [
        Section(
            name=table.name,
            title=table.title,
            text=[table.description],
            tables={"": table.printed()},
            pictures=[Picture(one.name, one.caption, one.plot(report)) for one in _FIGURES if one.table == table.name],
            data={table.name: table.frame},
        )
        for table in report_tables(report)
    ]
    provenance = pd.DataFrame(report.provenance.items(), columns=["name", "value"])
    sections[0] = replace(sections[0], text=[text, *sections[0].text])
    return [
        *sections,
        Section("exit-provenance", "Provenance of the exits", tables={"": provenance}, data={"provenance": provenance}),
    ]


def finding(report: ExitReport) -> str:
    """Summarise the main result, with the guarantee of its policy."""
    distance = lambda result: abs(result.policy.target_risk - report.options.target_risk)  # noqa: E731
    result = min(report.policies, key=distance, default=None)
    if result is None:
        return "No policy was calibrated."
    metrics = result.metrics
    change = 100 * (metrics.point.accuracy - metrics.full_accuracy)
    early = 1 - metrics.exit_shares[-1]
    sentence = (
        f"{report.provenance.get('client', 'Exits')}, by a policy calibrated for this page: {early:.1%} of the test"
        f" images exit early and {percent(1 - metrics.point.cost)} of the FLOPs are saved at target risk"
        f" {result.policy.target_risk:g}. Accuracy changes by {change:+.2f} points, from {metrics.full_accuracy:.4f} to"
        f" {metrics.point.accuracy:.4f}. {exit_guarantee(result.policy)}"
    )
    first, *others = report.networks
    ranges = {(round(network.curve[0].cost, 9), round(network.curve[-1].cost, 9)) for network in (first, *others[:1])}
    if others and len(ranges) == 1:  # areas over different ranges of budgets are not comparable
        sentence += (
            f" Over all budgets the accuracy of {first.name} differs by {100 * (first.area - others[0].area):+.2f}"
            f" points from that of {others[0].name} (area under accuracy against cost)."
        )
    return sentence
