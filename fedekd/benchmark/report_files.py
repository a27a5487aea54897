"""A report as one folder: a page, a Markdown file, CSV files and figures."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from statistics import fmean
from typing import Any

from fedekd.benchmark.comparisons import Comparison, Standing
from fedekd.benchmark.datasets import DatasetLine
from fedekd.benchmark.exit_comparison import ExitComparison
from fedekd.benchmark.harm import HarmTable
from fedekd.benchmark.page import html_page, markdown_page
from fedekd.benchmark.promises import PromiseTable
from fedekd.benchmark.report import SWEPT, Report
from fedekd.benchmark.tables import Table
from fedekd.early_exit.client_report import ClientExitReport
from fedekd.reporting.figures import save
from fedekd.reporting.pages import csv_text, write_text

#: Names of what a report writes: an older report's leftovers are recognized by them, and nothing else is touched.
_OURS = (
    ("figures", r"(figure\d|ranking-.+|exits-.+|power-.+)\.png"),
    ("tables", r"(table\d\d|figure\d|paired|gate|rankings|exits|harm|promises)\.csv"),
)


def write_report(report: Report, folder: Path) -> list[Path]:
    """Write a report; an older one in the same folder is replaced.

    Args:
        report: The report.
        folder: Where to; made if it is missing.

    Returns:
        The files: index.html, report.md, tables/*.csv, figures/*.png.
    """
    pictures: dict[str, Path] = {}
    for drawing in report.drawings:
        if drawing.figure is not None:
            pictures[drawing.name] = folder / "figures" / f"{drawing.name}.png"
            pictures[drawing.name].parent.mkdir(parents=True, exist_ok=True)
            save(drawing.figure, pictures[drawing.name])
    written = list(pictures.values())
    for name, columns, lines in _csv_tables(report):
        written.append(folder / "tables" / f"{name}.csv")
        write_text(written[-1], csv_text(columns, lines))
    for name, text in (("report.md", markdown_page(report)), ("index.html", html_page(report, pictures))):
        written.append(folder / name)
        write_text(written[-1], text)
    for subfolder, pattern in _OURS:
        for path in (folder / subfolder).glob("*"):
            if path not in written and re.fullmatch(pattern, path.name):
                path.unlink()
    return written


_CELL_COLUMNS = (
    *("table", "dataset", "alpha", "method", "measure", "mean", "std", "seeds", "values", "best"),
    *("paper_mean", "paper_std", "p", "verdict", "fault"),
)


def _csv_tables(report: Report) -> list[tuple[str, Sequence[str], list[dict[str, Any]]]]:
    """Name, columns and lines of every CSV file."""
    figure2 = [line for table in report.tables if table.number in (8, 9) for line in _cell_lines(table)]
    return [
        *((table.name, _CELL_COLUMNS, _cell_lines(table)) for table in report.tables),
        ("table03", _FACT_COLUMNS, [_dataset_line(line) for line in report.datasets]),
        ("figure2", _CELL_COLUMNS, [line for line in figure2 if line["alpha"] == 0.1]),
        *((f"figure{n}", _SWEEP_COLUMNS, _sweep_lines(report.sweeps[name])) for n, (name, _) in SWEPT.items()),
        ("rankings", _RANK_COLUMNS, [line for standing in report.standings for line in _rank_lines(standing)]),
        ("paired", _TEST_COLUMNS, [_test_line(comparison) for comparison in report.comparisons]),
        ("gate", _TEST_COLUMNS, [_test_line(comparison) for comparison in report.gate]),
        *([("harm", _HARM_COLUMNS, _harm_lines(report.harm))] if report.harm else []),
        *([("promises", _PROMISE_COLUMNS, _promise_lines(report.promises))] if report.promises else []),
        *([("exits", _EXIT_COLUMNS, _exit_lines(report.exits))] if report.exits else []),
    ]


_HARM_COLUMNS = ("dataset", "alpha", "method", "rule", "taken", "seeds", "delta_avg", "delta_worst")


def _harm_lines(tables: Sequence[HarmTable]) -> list[dict[str, Any]]:
    return [
        {
            **{"dataset": table.dataset, "alpha": table.alpha, "method": line.method, "rule": line.rule},
            **{"taken": line.taken, "seeds": len(line.avg)},
            **{"delta_avg": fmean(line.avg), "delta_worst": fmean(line.worst)},
        }
        for table in tables
        for line in table.lines
    ]


_OF_LINE = tuple(name for name in [field.name for field in fields(ClientExitReport)] if name != "client")
_PROMISE_COLUMNS = (
    *("dataset", "alpha", "method", "seed", "rule", "target_risk", "confidence", "client", *_OF_LINE),
    *("draws", "violations", "pooled_violations", "union_violations"),
)


def _promise_lines(tables: Sequence[PromiseTable]) -> list[dict[str, Any]]:
    return [
        {
            **{"dataset": table.dataset, "alpha": table.alpha, "method": line.method, "seed": seed},
            **{"rule": promise.mode, "target_risk": promise.target_risk, "confidence": promise.confidence},
            **asdict(client.report),
            **{"draws": promise.draws, "violations": client.violations, "pooled_violations": client.pooled_violations},
            "union_violations": promise.union_violations,
        }
        for table in tables
        for line in table.lines
        for seed, promise in line.by_seed.items()
        for client in promise.clients
    ]


_EXIT_COLUMNS = ("dataset", "alpha", "method", "seeds", "kind", "number", "cost", "accuracy", "saved")


def _exit_lines(comparisons: Sequence[ExitComparison]) -> list[dict[str, Any]]:
    return [
        {
            **{"dataset": comparison.dataset, "alpha": comparison.alpha, "method": line.method},
            **{"seeds": len(line.seeds), "kind": kind, "number": number, **point._asdict(), "saved": line.saved},
        }
        for comparison in comparisons
        for line in comparison.lines
        for kind, points in (("exit", dict(enumerate(line.exits, start=1))), ("budget", line.budgets))
        for number, point in points.items()
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


_FACTS = ("task", "classes", "size", "channels", "samples", "splits")
_FACT_COLUMNS = ("dataset", *_FACTS, "per_class", *(f"paper_{name}" for name in _FACTS), "verdict", "missing")


def _dataset_line(line: DatasetLine) -> dict[str, Any]:
    told: dict[str, Any] = {"dataset": line.name, "per_class": " ".join(map(str, line.per_class))}
    for prefix, facts in (("", line.loaded), ("paper_", line.paper)):
        if facts is not None:
            values = (facts.task, facts.classes, f"{facts.size[0]}x{facts.size[1]}", facts.channels, facts.samples)
            told |= {f"{prefix}{name}": value for name, value in zip(_FACTS, values, strict=False)}
            told[f"{prefix}splits"] = " ".join(map(str, facts.splits))
    return told | {"verdict": line.verdict, "missing": line.missing}


_SWEEP_COLUMNS = ("dataset", "value", "seed", "delta_avg")


def _sweep_lines(sweep: Mapping[str, Mapping[float, dict[int, float]]]) -> list[dict[str, Any]]:
    return [
        {"dataset": dataset, "value": value, "seed": seed, "delta_avg": delta}
        for dataset, by_value in sweep.items()
        for value, of_seed in by_value.items()
        for seed, delta in of_seed.items()
    ]


_RANK_COLUMNS = ("dataset", "measure", "method", "mean_rank", "repetitions", "friedman_p", "critical_difference")


def _rank_lines(standing: Standing) -> list[dict[str, Any]]:
    ranking = standing.ranking
    shared = {"repetitions": ranking.repetitions, "friedman_p": ranking.p}
    shared |= {"critical_difference": ranking.critical_difference}
    return [
        {"dataset": standing.dataset, "measure": standing.measure, "method": name, "mean_rank": value, **shared}
        for name, value in ranking.mean_ranks.items()
    ]


_TEST_COLUMNS = ("dataset", "alpha", "measure", "first", "second", "pairs", "difference", "p", "p_holm", "favours")


def _test_line(comparison: Comparison) -> dict[str, Any]:
    return {
        **{name: getattr(comparison, name) for name in ("dataset", "alpha", "measure", "first", "second", "favours")},
        "pairs": comparison.test.pairs,
        "difference": comparison.test.difference,
        "p": comparison.test.p,
        "p_holm": comparison.adjusted,
    }
