"""Grids of data sets whose clients are sites: no alpha in cells, rows and tables."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from fedekd.benchmark import numeric, read_results, write_results
from fedekd.benchmark.grid import Block, cells
from fedekd.benchmark.grid_report import grid_sections
from fedekd.benchmark.table import method_table
from fedekd.benchmark.worker import run_cell
from fedekd.cli import main
from fedekd.cli.benchmark import benchmark_parser
from fedekd.configuration.options import parse
from fedekd.errors import UserError

FAST: dict[str, Any] = {"rounds": 1, "client.local_epochs": 1, "logger": None}
METHODS = {"A": {"class_path": "FedAvg"}}


@pytest.fixture
def hospitals(tmp_path: Path, write_blobs: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the configuration of two sites."""
    monkeypatch.chdir(tmp_path)
    Path("sites").mkdir()
    for seed, name in enumerate(("north", "south")):
        write_blobs(Path(f"sites/{name}.npz"), 40, seed=seed)
    Path("hospitals.yaml").write_text("data: {sites: sites}\n")
    return tmp_path


def test_cells_of_sites_have_no_alpha(hospitals: Path) -> None:
    [cell] = cells([Block(["hospitals"], None, [0], METHODS, FAST)], folder=hospitals)
    assert (cell.alpha, cell.clients) == (None, "hospitals")
    assert not {"alpha", "num_clients", "partition", "min_samples"} & set(cell.values["data"])
    with pytest.raises(UserError, match=r"alphas: expected none for 'hospitals', whose .*, got 0\.5"):
        cells([Block(["hospitals"], [0.5], [0], METHODS, FAST)], folder=hospitals)
    with pytest.raises(UserError, match="alphas: expected concentrations of the partition of 'digits', got none"):
        cells([Block(["digits"], None, [0], METHODS, FAST)])


def test_benchmark_of_sites_has_rows_with_empty_alpha(
    hospitals: Path, undrawn: None, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("grid.yaml").write_text(
        "blocks:\n- {datasets: [hospitals], seeds: [0], methods: {A: FedAvg}, config: hospitals.yaml,"
        " options: {rounds: 1, client.local_epochs: 1}}\n"
    )
    [cell] = cells(parse(benchmark_parser(), ["--config=grid.yaml"]).blocks)
    trainer = {"accelerator": "cpu", "precision": "32-true", "threads": 1}
    row = run_cell(cell, Path("out/runs"), trainer, Path("out/runs/local"), "abc")
    assert row["alpha"] == ""
    write_results(Path("out/results"), pd.DataFrame([row]))
    assert Path("out/results/sites.csv").exists()
    capsys.readouterr()
    assert main(["benchmark", "--config=grid.yaml", "--output=out", "--accelerator=cpu"]) == 0
    printed = capsys.readouterr()
    assert "1 cells, 1 of them finished" in printed.out
    assert "alpha" not in printed.err


def test_results_of_sites_and_of_partitions_are_in_one_table(
    make_row: Callable[..., Any], to_frame: Callable[..., pd.DataFrame], tmp_path: Path
) -> None:
    sites = {name: value for name, value in make_row("b").items() if name != "alpha"} | {"alpha": ""}
    frame = to_frame(make_row("a"), sites)
    write_results(tmp_path, frame)
    again = read_results(tmp_path)
    assert sorted(again["alpha"]) == ["", "0.1"]
    assert math.isnan(numeric(again)["alpha"]["b"])
    assert sorted(method_table(again)["alpha"]) == ["", "", "0.1", "0.1"]
    names = [picture.name for picture in grid_sections(again)[0].pictures]
    assert names == ["delta-digits-0.1", "delta-digits"]
