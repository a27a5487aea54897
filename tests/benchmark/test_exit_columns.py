"""Runs with exits and runs without, in one file of results; and grids that begin elsewhere."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
from jsonargparse import Namespace

from fedekd.benchmark import Block, cells, parse_filter, read_results, write_results
from fedekd.benchmark.grid import _as_text
from fedekd.benchmark.results import COLUMNS, exit_columns, to_row
from fedekd.errors import UserError

PERCENT = (5, 29, 35, 55, 100)  # 100 * 0.29 is less than 29
PROVENANCE = {"commit": "abc", "device": "cpu", "precision": "32-true", "threads": 1}


def summary(**further: Any) -> dict[str, Any]:
    return {
        **{"dataset": "digits", "alpha": 0.1, "seed": 0, "task": "classification", "metric": "accuracy", "rounds": 2},
        **{"mean": 0.75, "worst": 0.5, "local_mean": 0.7, "delta": {"avg": 0.05, "worst": -0.1, "p10": -0.05}},
        **{"clients": [{}, {}], "seconds": 3.14, "bytes_up": 10, "bytes_down": 20},
        "versions": {"fedekd": "0.1.0", "torch": "2"},
        **further,
    }


def exits(count: int) -> dict[str, Any]:
    return {
        "exits": [{"exit": e, "cost": e / count, "accuracy": 0.5 + e / 100} for e in range(1, count + 1)],
        "budgets": [{"budget": b / 100, "cost": b / 100 - 0.01, "accuracy": 0.1 + b / 150} for b in PERCENT],
    }


def row(key: str, **further: Any) -> dict[str, str]:
    return to_row(key, f"of {key}", key, summary(**further), PROVENANCE)


def test_a_row_of_a_run_with_exits_has_all_their_numbers() -> None:
    found, plain = row("with", **exits(2)), row("without")
    assert list(plain) == list(COLUMNS)
    assert {name for name in COLUMNS if found[name] != plain[name]} == {"key", "configuration", "method"}
    further = {name: float(value) for name, value in found.items() if name not in COLUMNS}
    expected = {"exit_1": 0.51, "exit_1_flops": 0.5, "exit_2": 0.52, "exit_2_flops": 1.0}
    for percent in PERCENT:
        expected[f"budget_{percent}"] = 0.1 + percent / 150
        expected[f"budget_{percent}_flops"] = percent / 100 - 0.01
    assert further == pytest.approx(expected, rel=1e-15)


def test_columns_come_exits_first_by_number() -> None:
    names = ["budget_100", "exit_10_flops", "exit_2", "budget_50_flops", "budget_50", "exit_10", "exit_2_flops"]
    others = {"exits": "", "exit_": "", "exit_1_cost": "", "my_exit_1": "", None: ""}
    assert exit_columns([dict.fromkeys(names, "0"), others]) == [  # type: ignore[list-item]
        *("exit_2", "exit_2_flops", "exit_10", "exit_10_flops", "budget_50", "budget_50_flops", "budget_100"),
    ]
    assert exit_columns([]) == []


def test_rows_with_exits_and_without_go_through_one_file(tmp_path: Path) -> None:
    rows = [row("two", **exits(2)), row("none"), row("three", **exits(3)), row("diverged", **exits(2), mean=math.nan)]
    rows[3]["exit_1"] = "nan"
    write_results(tmp_path, rows)
    content = (tmp_path / "digits.csv").read_bytes()
    header = content.decode().splitlines()[0].split(",")
    assert header[: len(COLUMNS)] == list(COLUMNS)
    assert header[len(COLUMNS) :] == exit_columns(rows)
    back = read_results(tmp_path)
    for each in rows:
        found = back[each["key"]]
        assert {name: value for name, value in found.items() if value} == each
        assert all(found[name] == "" for name in header if name not in each)
    write_results(tmp_path, back.values())
    assert (tmp_path / "digits.csv").read_bytes() == content


def test_without_exits_the_file_is_what_it_always_was(tmp_path: Path) -> None:
    write_results(tmp_path, [row("none")])
    with (tmp_path / "digits.csv").open() as file:
        assert next(csv.reader(file)) == list(COLUMNS)
    assert read_results(tmp_path) == {"none": row("none")}


@pytest.mark.parametrize("column", ["exit_1", "exit_2_flops", "budget_35", "budget_100_flops"])
def test_a_bad_number_in_a_column_of_exits_is_told(column: str, tmp_path: Path) -> None:
    write_results(tmp_path, [row("none"), {**row("two", **exits(2)), column: "much"}])
    with pytest.raises(UserError, match=rf"digits\.csv, line 3: {column} is 'much', and must be a number") as told:
        read_results(tmp_path)
    assert "\n" not in str(told.value)


def test_labels_with_commas_can_be_filtered() -> None:
    assert parse_filter("seed=1,method=FedAvg, tuned,alpha=0.1") == {
        "seed": "1",
        "method": "FedAvg, tuned",
        "alpha": "0.1",
    }
    tuned = {"class_path": "FedAvg", "init_args": {"finetune_epochs": 1}}
    block = Block(["digits"], [0.1], [0, 1], {"FedAvg": {"class_path": "FedAvg"}, "FedAvg, tuned": tuned})
    grid = cells([block], parse_filter("method=fedavg, tuned,seed=1"))
    assert [(cell.method, cell.seed) for cell in grid] == [("FedAvg, tuned", 1)]
    for text in ("alpha=0.1,0.3", "dataset=digits, cifar10", "tuned,method=FedAvg"):
        with pytest.raises(UserError, match=r"is not NAME=VALUE"):
            parse_filter(text)


def test_a_block_says_with_which_configuration_it_begins(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    for name, batch in (("digits.yaml", 16), ("mine/digits.yaml", 48)):
        (tmp_path / name).write_text(f"data: {{dataset: digits, batch_size: {batch}}}\n")
    method = {"FedAvg": {"class_path": "FedAvg"}}
    plain, other = (
        cells([Block(["digits"], [0.1], [0], method, **given)], folder=tmp_path)[0]
        for given in ({}, {"config": "mine/{dataset}.yaml"})
    )
    assert [cell.values["data"]["batch_size"] for cell in (plain, other)] == [16, 48]
    assert plain.key != other.key
    with pytest.raises(UserError, match="nowhere/digits"):
        cells([Block(["digits"], [0.1], [0], method, config="nowhere/{dataset}.yaml")])


def test_options_of_a_grid_are_written_as_on_the_command_line() -> None:
    assert _as_text("adam") == "adam"
    assert json.loads(_as_text([1, 2, 3])) == [1, 2, 3]
    assert _as_text(None) == "null"
    spec = Namespace(class_path="a.B", init_args=Namespace(width=0.5))  # type: ignore[no-untyped-call]
    assert json.loads(_as_text(spec)) == {"class_path": "a.B", "init_args": {"width": 0.5}}
    assert json.loads(_as_text([spec])) == [{"class_path": "a.B", "init_args": {"width": 0.5}}]


def test_depths_decide_the_key_of_a_cell() -> None:
    def key(**options: Any) -> str:
        method = {"DepthFL": {"class_path": "DepthFL"}}
        return cells([Block(["digits"], [0.1], [0], method, options)])[0].key

    keys = [key(), key(**{"client.depths": [1, 2, 3]}), key(**{"client.depths": 2})]
    assert len(set(keys)) == 3
    assert key(**{"client.depths": None}) == keys[0]
