"""Shared parts of reports: templates, CSV files, and the commit of the code."""

from __future__ import annotations

import csv
import io
import math
import os
import re
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedekd.atomic import atomic_file

if TYPE_CHECKING:
    from jinja2 import Environment


@cache
def environment() -> Environment:
    """Return the templates of the reports, with their filters."""
    from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

    templates = Environment(
        loader=PackageLoader("fedekd.reporting"),
        autoescape=select_autoescape(("html",)),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters |= {"minus": minus, "md": markdown_cell}
    return templates


def minus(text: str) -> str:
    """Replace the hyphens before numbers by minus signs.

    Example:
        >>> minus("signed-rank: -0.5") == "signed-rank: \N{MINUS SIGN}0.5"
        True
    """
    return re.sub(r"(?<!\w)-(?=\d)", "\N{MINUS SIGN}", text)


def markdown_cell(text: object) -> str:
    r"""Escape text for a cell of a Markdown table.

    Example:
        >>> print(markdown_cell("a|<b>"))
        a\|&lt;b>
    """
    return str(text).replace("|", r"\|").replace("<", "&lt;").replace("\n", " ")


def csv_text(columns: Sequence[str], lines: Iterable[Mapping[str, Any]]) -> str:
    """Format rows as CSV; None and NaN are empty cells."""
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, columns, lineterminator="\n")
    table.writeheader()
    for line in lines:
        unknown = {name for name, value in line.items() if isinstance(value, float) and math.isnan(value)}
        table.writerow({name: "" if name in unknown or value is None else value for name, value in line.items()})
    return text.getvalue()


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically; missing folders are created."""
    with atomic_file(path) as file:
        file.write(text.encode())


def current_commit() -> str:
    """Return the commit of the code, with a + if changed; empty if there is none.

    A copy of the tracked files has no repository: there the environment variable FEDEKD_COMMIT names the commit.
    """
    if commit := os.environ.get("FEDEKD_COMMIT"):
        return commit
    here = Path(__file__).resolve().parent.parent
    try:
        commit, changes = [
            subprocess.run(["git", *command], cwd=here, capture_output=True, text=True, check=True).stdout.strip()
            for command in (("rev-parse", "--short=12", "HEAD"), ("status", "--porcelain", "--", str(here)))
        ]
    except (OSError, subprocess.CalledProcessError):
        return ""
    return commit + ("+" if changes else "")
