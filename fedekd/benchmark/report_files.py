"""A report as one folder: a page, a Markdown file, CSV files and figures."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedekd.atomic import atomic_file
from fedekd.benchmark.comparisons import Comparison
from fedekd.benchmark.datasets import DatasetLine
from fedekd.benchmark.page import html_page, markdown_page
from fedekd.benchmark.report import Report
from fedekd.benchmark.tables import Table
from fedekd.reporting.figures import save


def write_report(report: Report, folder: Path) -> list[Path]:
    """Write a report; what is there of the same name is replaced.

    Args:
        report: The report.
        folder: Where to; made if it is missing.

    Returns:
        The files: index.html, report.md, tables/*.csv, figures/*.png.
    """
    pictures: dict[str, Path] = {}
    for drawing in report.drawings:
        pictures[drawing.name] = folder / "figures" / f"{drawing.name}.png"
        pictures[drawing.name].parent.mkdir(parents=True, exist_ok=True)
        save(drawing.figure, pictures[drawing.name])
    written = list(pictures.values())
    for name, columns, lines in _csv_tables(report):
        written.append(folder / "tables" / f"{name}.csv")
        _write(written[-1], csv_text(columns, lines))
    for name, text in (("report.md", markdown_page(report)), ("index.html", html_page(report, pictures))):
        written.append(folder / name)
        _write(written[-1], text)
    return written


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        file.write(text.encode())


def csv_text(columns: Sequence[str], lines: Iterable[Mapping[str, Any]]) -> str:
    """Lines as CSV; what is unknown is left empty."""
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, columns, lineterminator="\n")
    table.writeheader()
    for line in lines:
        unknown = {name for name, value in line.items() if isinstance(value, float) and math.isnan(value)}
        table.writerow({name: "" if name in unknown or value is None else value for name, value in line.items()})
    return text.getvalue()


_CELL_COLUMNS = (
    *("table", "dataset", "alpha", "method", "measure", "mean", "std", "seeds", "values", "best"),
    *("paper_mean", "paper_std", "p", "verdict", "fault"),
)
_TEST_COLUMNS = ("dataset", "alpha", "measure", "first", "second", "pairs", "difference", "p", "p_holm", "favours")


def _csv_tables(report: Report) -> list[tuple[str, Sequence[str], list[dict[str, Any]]]]:
    """Name, columns and lines of every CSV file."""
    facts = ("dataset", "task", "classes", "size", "channels", "samples", "splits", "per_class", "verdict", "missing")
    return [
        *((table.name, _CELL_COLUMNS, _cell_lines(table)) for table in report.tables),
        ("table03", facts, [_dataset_line(line) for line in report.datasets]),
        ("paired", _TEST_COLUMNS, [_test_line(comparison) for comparison in report.comparisons]),
        ("gate", _TEST_COLUMNS, [_test_line(comparison) for comparison in report.gate]),
    ]


def _cell_lines(table: Table) -> list[dict[str, Any]]:
    return [
        {
            "table": table.number,
            "dataset": panel.dataset,
            "alpha": alpha,
            "method": method,
            "measure": table.measure,
            "mean": entry.mean,
            "std": entry.std,
            "seeds": len(entry.values),
            "values": json.dumps(entry.values) if entry.values else None,
            "best": int(entry.best),
            "paper_mean": entry.paper and entry.paper.mean,
            "paper_std": entry.paper and entry.paper.std,
            "p": entry.p,
            "verdict": entry.verdict,
            "fault": entry.paper and entry.paper.fault,
        }
        for panel, method, alpha, entry in table.entries()
    ]


def _dataset_line(line: DatasetLine) -> dict[str, Any]:
    told: dict[str, Any] = {"dataset": line.name, "verdict": line.verdict, "missing": line.missing}
    facts = line.loaded or line.paper
    if facts is not None:
        told |= {"task": facts.task, "classes": facts.classes, "size": f"{facts.size[0]}x{facts.size[1]}"}
        told |= {"channels": facts.channels, "samples": facts.samples, "splits": " ".join(map(str, facts.splits))}
    return told | {"per_class": " ".join(map(str, line.per_class))}


def _test_line(comparison: Comparison) -> dict[str, Any]:
    favour = comparison.gain * comparison.test.difference
    return {
        "dataset": comparison.dataset,
        "alpha": comparison.alpha,
        "measure": comparison.measure,
        "first": comparison.first,
        "second": comparison.second,
        "pairs": comparison.test.pairs,
        "difference": comparison.test.difference,
        "p": comparison.test.p,
        "p_holm": comparison.adjusted,
        "favours": comparison.first if favour > 0 else comparison.second if favour < 0 else "neither",
    }
