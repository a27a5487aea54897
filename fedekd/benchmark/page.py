"""A report as a page and as Markdown: what the templates need to know, and nothing of how they look."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedekd.benchmark.comparisons import COMPARED
from fedekd.benchmark.measured import title
from fedekd.benchmark.published import SEEDS, PublishedCell
from fedekd.benchmark.report import Report
from fedekd.benchmark.statistics import LEVEL, MIN_PAIRS, MIN_SEEDS
from fedekd.benchmark.tables import Entry, Table

if TYPE_CHECKING:
    from jinja2 import Environment


def html_page(report: Report, pictures: Mapping[str, Path]) -> str:
    """One file with everything in it: it loads nothing, so that it can be sent and kept.

    Args:
        report: The report.
        pictures: PNG file of each drawing, by its name.
    """
    data = {name: base64.b64encode(path.read_bytes()).decode() for name, path in pictures.items()}
    return _render("report.html", report, pictures=data)


def markdown_page(report: Report) -> str:
    """The same for a repository or a terminal; figures are linked in `figures/`."""
    return _render("report.md", report)


def _render(template: str, report: Report, **more: Any) -> str:
    constants = {"seeds": SEEDS, "level": f"{LEVEL:.0%}", "min_pairs": MIN_PAIRS, "min_seeds": MIN_SEEDS}
    text = _environment().get_template(template).render(report=report, **constants, **more)
    return text.rstrip() + "\n"


@cache
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

    environment = Environment(
        loader=PackageLoader("fedekd.benchmark"),
        autoescape=select_autoescape(("html",)),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"ours": ours, "theirs": theirs, "p": p_value, "minus": minus, "md": markdown_cell}
    environment.globals |= {"faults": faults, "title": title, "compared": COMPARED}
    return environment


def _pair(mean: float, std: float | None, signed: bool) -> str:
    text = f"{mean:{'+' if signed else ''}.4f}"
    return minus(text if std is None else f"{text} ± {std:.4f}")


def minus(text: str) -> str:
    """Text with real minus signs before numbers.

    Example:
        >>> minus("signed-rank: -0.5") == "signed-rank: \N{MINUS SIGN}0.5"
        True
    """
    return re.sub(r"(?<!\w)-(?=\d)", "\N{MINUS SIGN}", text)


def markdown_cell(text: object) -> str:
    r"""Text as it may stand in a Markdown table.

    Example:
        >>> print(markdown_cell("a|<b>"))
        a\|&lt;b>
    """
    return str(text).replace("|", r"\|").replace("<", "&lt;")


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
