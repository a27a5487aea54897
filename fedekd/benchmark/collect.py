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
from fedekd.configuration.configs import shipped_folder
from fedekd.configuration.options import as_values, federation_parser, parse
from fedekd.errors import UserError


def measured_in(folders: Sequence[Path]) -> Measured:
    """The results of folders, those of other options than the paper's set apart.

    Raises:
        UserError: If there is a folder without any result, or a damaged file.
    """
    rows = collect(folders)
    datasets = DATASETS.keys() & {row["dataset"] for row in rows}
    return Measured(rows, {key for dataset in datasets for key in paper_grid(dataset)})


def collect(folders: Sequence[Path]) -> list[Row]:
    """The rows of folders: CSV files of `benchmark`, there or in `results/`, and finished runs of `fit` below.

    Raises:
        UserError: If there is a folder without any result, or a damaged file.
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
    """The cells of the paper's grid for a data set, by key; as shipped, whatever lies in the working folder."""
    blocks = [Block(**block) for block in _paper_blocks()]
    return {cell.key: cell for cell in cells(blocks, {"dataset": dataset}, shipped_folder())}


def _paper_blocks() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = yaml.safe_load((shipped_folder() / "benchmark/paper.yaml").read_text())["blocks"]
    return found


def _row_of_run(folder: Path) -> Row:
    """A finished run of `fit` as a row of results.

    Raises:
        UserError: If its files cannot be read; it names the folder.
    """
    parser = federation_parser()
    try:
        values = as_values(parser, parse(parser, ["--config", str(folder / "config.yaml")]))
        summary = json.loads((folder / "summary.json").read_text())
        trainer = values["trainer"]
        provenance = {
            "commit": "",
            "device": trainer["accelerator"],
            "precision": trainer["precision"],
            "threads": trainer["threads"],
        }
        keys = cell_key(values, parser), cell_key({**values, "seed": 0}, parser)
        return to_row(*keys, _label(values["method"]), summary, provenance)
    except (UserError, ValueError, KeyError, TypeError, StopIteration) as error:
        raise UserError(f"report: the run in {folder} cannot be read: {error}") from error


@cache
def _labels() -> Mapping[str, str]:
    """The labels of the paper's grid by what they mean: class and arguments that are not its defaults."""
    found: dict[str, str] = {}
    for block in _paper_blocks():
        for label, method in block["methods"].items():
            found.setdefault(_departures(method), label)
    return found


def _label(method: Mapping[str, Any]) -> str:
    """A method's name in the paper's grid, or its class and the arguments that differ from its defaults."""
    said = _departures(method)
    return _labels().get(said, said)


def _departures(method: Mapping[str, Any]) -> str:
    """As in `FedeKD, beta 3.0`."""
    path = method["class_path"]
    module, _, name = path.rpartition(".")
    parameters = inspect.signature(getattr(import_module(module or "fedekd.methods"), name)).parameters
    chosen = method.get("init_args") or {}
    departures = [
        f"{argument} {value['class_path'].rpartition('.')[2] if isinstance(value, Mapping) else value}"
        for argument, value in sorted(chosen.items())
        if argument in parameters and parameters[argument].default != value
    ]
    return ", ".join([name, *departures])
