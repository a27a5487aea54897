"""Metrics other than the primary one, in the tables of a run."""

from __future__ import annotations

from collections.abc import Callable
from io import StringIO
from typing import Any

import pytest
from rich.console import Console

from fedekd.reporting import result_tables
from fedekd.reporting.console import other_metrics_table, round_line
from fedekd.reporting.rows import value_title
from fedekd.reporting.run_report import other_metrics_table as report_table


@pytest.fixture
def summary(make_summary: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    """A summary of two clients with AUROC, recall and calibration error; client 1 has no AUROC."""
    content = make_summary((0.5, 0.6), (0.7, 0.6))
    empty = {"score": None, "local": None, "delta": None}
    figures = {"mean": 0.9, "worst": 0.8, "local_mean": 0.85, "clients": 2}
    up, down = {"avg": 0.1, "worst": -0.2, "p10": -0.1}, {"avg": 0.01, "worst": 0.02, "p90": 0.015}
    content["class_names"] = ["no finding", "oedema", *"cdef"]
    content["metrics"] = {
        "auroc": {**figures, "clients": 1, "delta": up},
        "recall/no_finding": {**figures, "delta": up},
        "recall/oedema": {**figures, "mean": None, "delta": dict.fromkeys(up)},
        "ece": {**figures, "delta": down},
    }
    for client, auroc in zip(content["clients"], ({"score": 0.9, "local": 0.8, "delta": 0.1}, empty), strict=True):
        client["metrics"] = {
            "auroc": auroc,
            "recall/no_finding": {"score": 0.25, "local": 0.5, "delta": -0.25},
            "recall/oedema": empty,
            "ece": {"score": 0.2, "local": 0.1, "delta": 0.1},
        }
    return content


def printed(table: Any) -> str:
    console = Console(file=StringIO(), width=160)
    console.print(table)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return text


def test_other_metrics_table_shows_value_and_delta_or_a_dash(summary: dict[str, Any]) -> None:
    lines = [
        [cell.strip() for cell in line.split("│")[1:-1]] for line in printed(other_metrics_table(summary)).split("\n")
    ]
    rows = {line[0]: line[1:] for line in lines if line}
    assert rows["0"] == ["0.9000 (+0.1000)", "0.2500 (-0.2500)", "-", "0.2000 (+0.1000)"]
    assert rows["1"][0] == "-"
    assert rows["mean"] == ["0.9000 (+0.1000)", "0.9000 (+0.1000)", "-", "0.9000 (+0.0100)"]
    assert rows["P10/P90"] == ["(-0.1000)", "(-0.1000)", "-", "(+0.0150)"]


def test_other_metrics_table_harm_is_red(summary: dict[str, Any]) -> None:
    table = other_metrics_table(summary)
    assert table is not None
    styles = [[cell.style for cell in list(column.cells)[:1]] for column in table.columns[1:]]  # type: ignore[union-attr]
    assert styles == [[""], ["red"], [""], ["red"]]


def test_result_tables_show_other_metrics_only_where_chosen(summary: dict[str, Any]) -> None:
    assert len(result_tables(summary)) == 1
    assert len(result_tables(summary, ["accuracy", "auroc"])) == 2
    del summary["metrics"]
    assert len(result_tables(summary, ["accuracy"])) == 1


def test_value_title_names_the_class(summary: dict[str, Any]) -> None:
    assert [value_title(name, summary) for name in summary["metrics"]] == [
        "AUROC",
        "recall of no finding",
        "recall of oedema",
        "expected calibration error",
    ]


def test_round_line_has_the_primary_metric_only() -> None:
    row = {"round": 1, "ece/mean": 0.2, "delta/avg": 0.1, "auroc/mean": 0.9, "delta/auroc/avg": 0.3}
    assert round_line(row, 2) == "round 1/2  ece 0.2000  delta avg +0.1000"


def test_report_table_has_a_row_per_metric(summary: dict[str, Any]) -> None:
    frame = report_table(summary)
    assert frame["metric"].tolist()[:2] == ["AUROC", "recall of no finding"]
    assert frame["clients"].tolist() == [1, 2, 2, 2]
    assert frame["mean"].tolist() == ["0.9000", "0.9000", "", "0.9000"]
    assert frame["Delta P10/P90"].tolist() == ["-0.1000", "-0.1000", "", "+0.0150"]
