"""The table of methods."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from fedekd.benchmark import method_table
from fedekd.benchmark.results import Row
from fedekd.reporting.document import markdown_table

ROOT = Path(__file__).resolve().parents[2]


def test_method_table_sorts_by_delta_and_adds_local(
    make_row: Callable[..., Row], to_frame: Callable[..., pd.DataFrame]
) -> None:
    def row(method: str, seed: int, delta: float, **more: object) -> Row:
        values = {"avg": delta, "worst": 2 * delta, "p10": 1.5 * delta}
        return make_row(f"{method}-{seed}-{len(more)}", method, seed=seed, mean=0.7 + delta, delta=values, **more)

    frame = to_frame(
        row("worse", 0, -0.1),
        row("better", 0, 0.1),
        row("better", 1, 0.3),
        row("better", 0, 0.2, dataset="grades", metric="rmse"),
        row("worse", 0, 0.3, dataset="grades", metric="rmse"),
    )
    lines = markdown_table(method_table(frame)).splitlines()
    assert lines[0] == "| data set | alpha | method | score | Delta avg | Delta worst | Delta P10/P90 | seeds |"
    better = "0.9000 ± 0.1414 | +0.2000 ± 0.1414 | +0.4000 ± 0.2828 | +0.3000 ± 0.2121 | 2"
    assert lines[2] == f"| digits, accuracy | 0.1 | better | {better} |"
    assert lines[3] == "| digits, accuracy | 0.1 | Local | 0.7000 ± 0.0000 | 0 | 0 | 0 | 2 |"
    # For RMSE the lowest Delta is best.
    assert [re.split(r" \| ", line)[2] for line in lines[4:]] == ["worse", "Local", "better", "worse"]


def test_method_table_keeps_configurations_of_one_label_apart(
    make_row: Callable[..., Row], to_frame: Callable[..., pd.DataFrame]
) -> None:
    rows = [make_row(f"{name}-{seed}", "FedeKD", seed=seed) for name in "ab" for seed in (0, 1)]
    rows = [row | {"configuration": 6 * row["key"][0] + "0123"} for row in rows]
    table = method_table(to_frame(*rows)).set_index("method")["seeds"]
    assert table.to_dict() == {"FedeKD (aaaaaa)": 2, "FedeKD (bbbbbb)": 2, "Local": 2}


def test_method_table_has_a_local_row_per_local_baseline(
    make_row: Callable[..., Row], to_frame: Callable[..., pd.DataFrame]
) -> None:
    def row(method: str, seed: int, local: float, metric: str = "accuracy") -> Row:
        return make_row(f"{method}-{seed}-{metric}", method, seed=seed, mean=local, local_mean=local, metric=metric)

    rows = [row("A", 0, 0.5), row("A", 1, 0.5), row("B", 1, 0.5), row("C", 0, 0.9), row("A", 0, math.nan, "auroc")]
    table = method_table(to_frame(*rows))
    seeds = {data: dict(zip(part["method"], part["seeds"], strict=True)) for data, part in table.groupby("data set")}
    assert seeds["digits, accuracy"] == {"A": 2, "B": 1, "C": 1, "Local of A and 1 more": 2, "Local of C": 1}
    assert seeds["digits, auroc"] == {"A": 1, "Local": 1}
    assert table.set_index("method")["score"]["Local of C"] == "0.9000"
    assert table[table["data set"] == "digits, auroc"]["score"].tolist() == ["-", "-"]


def test_method_table_has_one_row_of_a_grid_with_local(
    make_row: Callable[..., Row], to_frame: Callable[..., pd.DataFrame]
) -> None:
    rows = [make_row("a", "FedAvg", mean=0.8), make_row("c", "Local", mean=0.7, delta={"avg": 0, "worst": 0, "p10": 0})]
    rows += [make_row("b", "B", mean=0.8, local_mean=0.5)]
    table = method_table(to_frame(*rows)).set_index("method")
    assert sorted(table.index) == ["B", "FedAvg", "Local", "Local of B"]
    assert table.loc["Local", ["score", "Delta avg"]].tolist() == ["0.7000", "0"]
