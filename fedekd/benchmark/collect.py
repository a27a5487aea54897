"""Finds the results that a report is about."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml

from fedekd.benchmark.grid import Block, Cell, cell_key, cells
from fedekd.benchmark.measured import Measured
from fedekd.benchmark.published import DATASETS
from fedekd.benchmark.results import Row, read_results, to_row
from fedekd.configuration.arguments import as_values, federation_parser, parse
from fedekd.configuration.configs import find_config
from fedekd.errors import UserError


def measured_in(folders: Sequence[Path]) -> Measured:
    """The results of folders, those of other options than the paper's set apart."""
    rows = collect(folders)
    datasets = DATASETS.keys() & {row["dataset"] for row in rows}
    return Measured(rows, {key for dataset in datasets for key in paper_grid(dataset)})


def collect(folders: Sequence[Path]) -> list[Row]:
    """The rows of folders: CSV files of `benchmark`, there or in `results/`, and finished runs of `fit` below.

    Args:
        folders: Where to look.

    Raises:
        UserError: If there is a folder without any result.
    """
    rows: dict[str, Row] = {}
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"report {folder}: there is no such folder")
        here = read_results(folder) | read_results(folder / "results")
        for path in sorted(folder.rglob("summary.json")):
            # The runs of a benchmark lie in folders named by their keys, and are in its results.
            if path.parent.name not in here and (path.parent / "config.yaml").is_file():
                row = _row_of_run(path.parent)
                here.setdefault(row["key"], row)
        if not here:
            raise UserError(f"report {folder}: there is no finished run, and no results of a benchmark")
        rows |= here
    return list(rows.values())


@cache
def paper_grid(dataset: str) -> Mapping[str, Cell]:
    """The cells of `configs/benchmark/paper.yaml` for a data set, by key."""
    blocks = [Block(**block) for block in yaml.safe_load(find_config("benchmark/paper.yaml").read_text())["blocks"]]
    return {cell.key: cell for cell in cells(blocks, {"dataset": dataset})}


def _row_of_run(folder: Path) -> Row:
    parser = federation_parser()
    values = as_values(parser, parse(parser, ["--config", str(folder / "config.yaml")]))
    summary = json.loads((folder / "summary.json").read_text())
    key = cell_key(values, parser)
    known = paper_grid(summary["dataset"])
    method = known[key].method if key in known else _label(values["method"])
    trainer = values["trainer"]
    provenance = {
        "commit": "",
        "device": trainer["accelerator"],
        "precision": trainer["precision"],
        "threads": trainer["threads"],
    }
    return to_row(key, method, summary, provenance)


def _label(method: Mapping[str, Any]) -> str:
    """A method's class and the arguments that differ from its defaults, as in `FedeKD, beta 3.0`."""
    module, _, name = method["class_path"].rpartition(".")
    parameters = inspect.signature(getattr(import_module(module), name)).parameters
    chosen = method.get("init_args") or {}
    departures = [
        f"{argument} {value['class_path'].rpartition('.')[2] if isinstance(value, Mapping) else value}"
        for argument, value in chosen.items()
        if argument in parameters and parameters[argument].default != value
    ]
    return ", ".join([name, *departures])
