"""Grid and comparisons of the experiment on trust."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from experiments.hospital_runs import store
from experiments.trust.__main__ import COLUMNS, METHODS, comparisons, grid, key_of, to_result, unfinished
from fedekd.modules.losses import GATES


def make_row(gate: str, seed: int, delta: float, cross_fit: bool = False) -> dict[str, Any]:
    return dict(zip(COLUMNS, ["cifar10 alpha 0.5", gate, cross_fit, seed, delta, 2 * delta, "abc"], strict=True))


def test_grid_has_every_setting_gate_and_number_of_proxies(tmp_path: Path) -> None:
    runs = grid(10, tmp_path)
    assert len({cell.key for cell in runs}) == len(runs) == 2 * 2 * 2 * len(GATES)
    assert {cell.clients for cell in runs} == {
        f"{name} alpha {alpha:g}" for name in ("cifar10", "fashionmnist") for alpha in (0.1, 0.5)
    }
    assert {cell.group.rsplit(" ", 1)[1] for cell in runs} == {"10"}
    assert all(cell.values["data"]["max_samples"] == 3000 for cell in runs)


def test_stored_runs_are_not_repeated_and_replace_their_row(tmp_path: Path) -> None:
    runs, path = grid(11, tmp_path), tmp_path / "trust" / "rows.csv"
    assert unfinished(runs, path) == runs
    values = {"delta_avg": "0.25", "delta_worst": "-0.5", "commit": "abc"}
    for cell in runs[:3]:
        store(key_of(cell), [to_result(values)], path)
    store(key_of(runs[0]), [to_result({**values, "delta_avg": "0.75"})], path)
    assert unfinished(runs, path) == runs[3:]
    rows = pd.read_csv(path)
    assert list(rows.columns) == COLUMNS
    assert len(rows) == 3
    gate, cross_fit = METHODS[runs[0].method]
    [row] = rows[(rows["gate"] == gate) & (rows["cross_fit"] == cross_fit)].to_dict("records")
    assert (row["setting"], row["seed"], row["delta"], row["worst"]) == (runs[0].clients, 11, 0.75, -0.5)


def test_comparisons_are_paired_by_seed() -> None:
    rows = [make_row("reversed", seed, 0.02 + 0.01 * seed) for seed in range(8)]
    rows += [make_row("reversed_shuffled", seed, 0.01 * seed) for seed in range(1, 8)]
    rows += [make_row("reversed", seed, 0.0, cross_fit=True) for seed in (0, 1)]
    found = comparisons(pd.DataFrame(rows)).set_index("comparison")
    assert set(found.index) == {"reversed - reversed_shuffled", "reversed, cross-fit - reversed"}
    ranking = found.loc["reversed - reversed_shuffled"]
    assert (ranking["seeds"], ranking["better"]) == (7, 7)
    assert ranking["delta"] == pytest.approx(0.02)
    assert ranking["worst"] == pytest.approx(0.04)
    assert ranking["standard_error"] == pytest.approx(0, abs=1e-12)
    assert ranking["p_value"] == pytest.approx(2 / 2**7)
    crossed = found.loc["reversed, cross-fit - reversed"]
    assert (crossed["seeds"], crossed["better"]) == (2, 0)
    assert crossed["delta"] == pytest.approx(-0.025)
    assert math.isnan(crossed["p_value"])
