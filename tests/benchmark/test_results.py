"""Results files: columns, exact round trips, and errors."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from fedekd.benchmark import numeric, read_results, write_results
from fedekd.benchmark.results import COLUMNS, COVERAGE, EVIDENCE, Row, exit_columns
from fedekd.errors import UserError

MakeRow = Callable[..., Row]
ToFrame = Callable[..., pd.DataFrame]
ROOT = Path(__file__).resolve().parents[2]
PERCENT = (5, 29, 35, 55, 100)  # 100 * 0.29 is less than 29


def exits(count: int) -> dict[str, Any]:
    return {
        "exits": [{"exit": e, "cost": e / count, "accuracy": 0.5 + e / 100} for e in range(1, count + 1)],
        "budgets": [{"budget": b / 100, "cost": b / 100 - 0.01, "accuracy": 0.1 + b / 150} for b in PERCENT],
    }


def test_to_row_with_exits_adds_their_columns(make_row: MakeRow) -> None:
    row, plain = make_row("with", **exits(2)), make_row("without")
    assert list(plain) == list(COLUMNS)
    assert {name for name in COLUMNS if row[name] != plain[name]} == {"key", "configuration", "method"}
    assert (plain["mean"], plain["delta_tail"], plain["clients"]) == ("0.75", "-0.05", "2")
    expected = {"exit_1": 0.51, "exit_1_flops": 0.5, "exit_2": 0.52, "exit_2_flops": 1.0}
    for percent in PERCENT:
        expected[f"budget_{percent}"] = 0.1 + percent / 150
        expected[f"budget_{percent}_flops"] = percent / 100 - 0.01
    further = {name: float(value) for name, value in row.items() if name not in COLUMNS}
    assert further == pytest.approx(expected, rel=1e-15)


def test_to_row_with_do_no_harm_adds_evidence(make_row: MakeRow) -> None:
    client = {"client": 0, "local": 0.5, "score": 0.6, "samples": 9, "p_value": 0.5, "deployed": "local", "train": 3}
    row = make_row(
        "a",
        clients=[client],
        deployed={"rule": {"confidence": 0.9}, "mean": 0.5, "delta": {"avg": 0.1, "worst": 0.0, "p10": 0.0}},
    )
    evidence = json.loads(row[EVIDENCE])
    assert evidence == {"rule": {"confidence": 0.9}, "clients": [{k: v for k, v in client.items() if k != "train"}]}


def test_exit_columns_are_sorted_by_kind_and_number() -> None:
    names = ["budget_100", "exit_10_flops", "exit_2", "budget_50_flops", "budget_50", "exit_10", "exit_2_flops"]
    others = ["exits", "exit_", "exit_1_cost", "my_exit_1"]
    assert exit_columns(pd.DataFrame(columns=[*names, *others])) == [
        *("exit_2", "exit_2_flops", "exit_10", "exit_10_flops", "budget_50", "budget_50_flops", "budget_100"),
    ]


def test_write_results_round_trip_is_byte_stable(make_row: MakeRow, to_frame: ToFrame, tmp_path: Path) -> None:
    coverage = [{"target_risk": 0.1 + 0.2, "share": 1 / 3, "zero": -0.0}]
    rows = [
        *(make_row("two", **exits(2)), make_row("none"), make_row("three", **exits(3))),
        {**make_row("diverged", **exits(2), mean=math.nan), "exit_1": "nan"},
        make_row("covered", coverage=coverage),
        make_row("other", dataset="blobs"),
    ]
    write_results(tmp_path, to_frame(*rows))
    content = (tmp_path / "digits.csv").read_bytes()
    header = content.decode().splitlines()[0].split(",")
    assert header == [*COLUMNS, *exit_columns(pd.DataFrame(rows)), COVERAGE]
    assert (tmp_path / "blobs.csv").read_text().splitlines()[0].split(",") == list(COLUMNS)
    frame = read_results(tmp_path)
    for row in rows:
        assert {name: value for name, value in frame.loc[row["key"]].items() if value} == row
    assert json.loads(frame.loc["covered", COVERAGE]) == coverage
    stamp = (tmp_path / "digits.csv").stat().st_mtime_ns
    write_results(tmp_path, frame.iloc[::-1])
    assert (tmp_path / "digits.csv").read_bytes() == content
    assert (tmp_path / "digits.csv").stat().st_mtime_ns == stamp


@pytest.mark.parametrize("folder", ["", "cafedistill", "certified", "do_no_harm", "hospital"])
def test_write_results_of_committed_results_is_byte_stable(folder: str, tmp_path: Path) -> None:
    source = ROOT / "results" / folder
    frame = read_results(source)
    assert len(frame)
    write_results(tmp_path, frame)
    for path in source.glob("*.csv"):
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def test_read_results_without_files_is_empty(tmp_path: Path) -> None:
    shutil.copy(ROOT / "results/exits/cifar10/exits.csv", tmp_path / "metrics.csv")  # another kind of CSV file
    for folder in (tmp_path, tmp_path / "missing"):
        frame = read_results(folder)
        assert frame.empty
        assert list(frame) == list(COLUMNS)


def test_numeric_converts_exactly(make_row: MakeRow, to_frame: ToFrame) -> None:
    frame = numeric(to_frame(make_row("a", mean=0.1 + 0.2, **exits(2)), make_row("b", mean=math.nan)))
    assert frame.loc["a", "mean"] == 0.1 + 0.2
    assert math.isnan(frame.loc["b", "mean"])
    assert math.isnan(frame.loc["b", "exit_1"])
    assert frame["seed"].dtype == int


HEADER = ",".join(COLUMNS)
GOOD = dict.fromkeys(COLUMNS, "0") | {"metric": "accuracy", "dataset": "digits", "key": "a"}


def line(**changes: str) -> str:
    return f"{HEADER}\n{','.join(GOOD.values())}\n{','.join({**GOOD, **changes}.values())}\n"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"key,dataset\na,digits\n", "line 2: configuration: expected a value"),
        (f"{HEADER}\na,b,digits\n".encode(), "line 2: seed: expected a value"),
        (line(mean="much").encode(), "line 3: mean: expected a number, got 'much'"),
        (line(seed="x").encode(), "line 3: seed: expected a whole number, got 'x'"),
        (line(metric="f1").encode(), "line 3: metric: expected accuracy or balanced_accuracy"),
        (b"\xff\xfe\x00", "expected a results file of `benchmark`"),
        (b"key\na\nb,c\n", "expected a results file of `benchmark`"),
    ],
)
def test_read_results_damaged_file_names_the_line(content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "digits.csv").write_bytes(content)
    with pytest.raises(UserError, match=words):
        read_results(tmp_path)


@pytest.mark.parametrize("column", ["exit_1", "exit_2_flops", "budget_35", "budget_100_flops"])
def test_read_results_bad_exit_column_names_the_line(
    column: str, make_row: MakeRow, to_frame: ToFrame, tmp_path: Path
) -> None:
    write_results(tmp_path, to_frame(make_row("none"), {**make_row("two", **exits(2)), column: "much"}))
    with pytest.raises(UserError, match=rf"digits\.csv, line 3: {column}: expected a number, got 'much'"):
        read_results(tmp_path)
