"""A report as a page and as Markdown: what the templates need to know, and nothing of how they look."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedekd.benchmark.comparisons import COMPARED
from fedekd.benchmark.exit_comparison import exit_lines_table
from fedekd.benchmark.harm import harm_lines
from fedekd.benchmark.measured import title
from fedekd.benchmark.promises import keeping_lines, promise_finding, saving_lines
from fedekd.benchmark.published import SEEDS, PublishedCell
from fedekd.benchmark.report import Report
from fedekd.benchmark.statistics import LEVEL, MIN_PAIRS, MIN_SEEDS
from fedekd.benchmark.tables import Entry, Table
from fedekd.reporting.pages import embedded, environment, minus

if TYPE_CHECKING:
    from jinja2 import Environment


def html_page(report: Report, pictures: Mapping[str, Path]) -> str:
    """One file with everything in it: it loads nothing, so that it can be sent and kept.

    Args:
        report: The report.
        pictures: PNG file of each drawing, by its name.
    """
    return _render("report.html", report, pictures=embedded(pictures))


def markdown_page(report: Report) -> str:
    """The same for a repository or a terminal; figures are linked in `figures/`."""
    return _render("report.md", report)


def _render(template: str, report: Report, **more: Any) -> str:
    constants = {"seeds": SEEDS, "level": f"{LEVEL:.0%}", "min_pairs": MIN_PAIRS, "min_seeds": MIN_SEEDS}
    text = _environment().get_template(template).render(report=report, **constants, **more)
    return text.rstrip() + "\n"


@cache
def _environment() -> Environment:
    found = environment("fedekd.benchmark")
    found.filters |= {"ours": ours, "theirs": theirs, "p": p_value}
    found.globals |= {
        "faults": faults,
        "title": title,
        "compared": COMPARED,
        "exit_lines": exit_lines_table,
        "harm_lines": harm_lines,
        "saving_lines": saving_lines,
        "keeping_lines": keeping_lines,
        "promise_finding": promise_finding,
    }
    return found


def _pair(mean: float, std: float | None, signed: bool) -> str:
    text = f"{mean:{'+' if signed else ''}.4f}"
    return minus(text if std is None else f"{text} ± {std:.4f}")


def ours(entry: Entry, table: Table) -> str:
    """Our mean and spread of a cell; empty if it was not run."""
    return "" if entry.mean is None else _pair(entry.mean, entry.std, table.measure != "mean")


def theirs(cell: PublishedCell, table: Table) -> str:
    """The paper's mean and spread."""
    return _pair(cell.mean, cell.std, table.measure != "mean")


def p_value(value: float | None) -> str:
    """A p-value in two digits; empty if there is none.

    Example:
        >>> p_value(0.0123), p_value(0.0000004), p_value(None)
        ('0.012', '<0.0001', '')
    """
    if value is None:
        return ""
    return "<0.0001" if value < 1e-4 else f"{value:.2g}"


def faults(table: Table) -> list[str]:
    """The reasons that speak against cells of a table, each once; their places number the footnotes."""
    found = [entry.paper.fault for _, _, _, entry in table.entries() if entry.paper is not None]
    return list(dict.fromkeys(filter(None, found)))
