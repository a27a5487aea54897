"""The table of methods."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from fedekd.benchmark import method_table, read_results
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


def test_method_table_of_committed_results_has_a_row_per_method() -> None:
    frame = read_results(ROOT / "results")
    frame = frame[frame["dataset"].isin(["fashionmnist", "retinamnist", "cifar10"])]
    table = method_table(frame[~frame["method"].str.match("(beta|lambda_kd) ")])
    assert len(table) == 57
    first = table[table["data set"] == "fashionmnist, accuracy"].iloc[0].astype(str).tolist()
    assert first[1:4] == ["0.1", "FedeKD", "0.9513 ± 0.0178"]
    assert first[4:] == ["+0.0017 ± 0.0032", "-0.0053 ± 0.0140", "-0.0024 ± 0.0076", "10"]
