"""Run one cell of a grid in a worker process; images are cached between cells."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import yaml
from filelock import FileLock

from fedekd.atomic import atomic_file, seal_json, unseal_json
from fedekd.benchmark.grid import Cell
from fedekd.benchmark.provenance import code_digest, record_code, recorded_code, row_key, samples_of
from fedekd.benchmark.results import Row, to_row
from fedekd.configuration.options import build_parts, federation_parser, parse
from fedekd.data import Samples
from fedekd.early_exit.guarantee_coverage import federation_coverage
from fedekd.federation import Orchestrator, RunFolder, Sequential, SilentObserver


def provenance(trainer: Mapping[str, Any], commit: str, data: str) -> dict[str, Any]:
    """Return the columns that record how a row was computed, without its code."""
    on_cuda = trainer["accelerator"] == "cuda"
    return {
        "commit": commit,
        "device": torch.cuda.get_device_name() if on_cuda else "cpu",
        "precision": trainer["precision"],
        "threads": trainer["threads"],
        "data": data,
    }


def run_cell(cell: Cell, output: Path, trainer: Mapping[str, Any], baseline_dir: Path, commit: str) -> Row:
    """Run or resume one federated run and return its row of results.

    Args:
        cell: The cell.
        output: Folder of the runs. The run's folder in it has the key of the row, so that other data have another one;
            its checkpoints are removed when the run is finished.
        trainer: Options that replace those of the configuration.
        baseline_dir: Shared folder of local baselines.
        commit: Commit of the code.
    """
    samples = samples_of(cell.values)
    key = row_key(cell, samples.digest())
    folder = output / key
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "cell.lock"):  # waits for another grid that runs the same cell
        return _run_cell(cell, key, samples, folder, trainer, baseline_dir, commit)


def _run_cell(
    cell: Cell,
    key: str,
    samples: Samples,
    folder: Path,
    trainer: Mapping[str, Any],
    baseline_dir: Path,
    commit: str,
) -> Row:
    parser, code = federation_parser(), code_digest(cell.values)
    values = {**cell.values, "logger": None, "baseline_dir": str(baseline_dir)}
    values["trainer"] = {**values["trainer"], **trainer}
    request = folder / "request.yaml"
    request.write_text(yaml.safe_dump(values))
    config = parse(parser, ["--config", str(request)])

    def parts() -> dict[str, Any]:
        built = build_parts(parser, config)
        built["data"].adopt(samples)
        return built

    def orchestrator(**replaced: Any) -> Orchestrator:
        return Orchestrator(**(parts() | replaced), output=folder, baseline_dir=baseline_dir, observer=SilentObserver())

    run, made_by = RunFolder(folder, {}), folder / "provenance.json"
    summary = _finished(run, cell)
    if summary is None:
        record_code(folder, code)
        used = parts()["trainer"]
        resolved = {name: getattr(used, name) for name in ("accelerator", "precision", "threads")}
        run.reopen()  # first, so that a kill leaves no summary of another call
        with atomic_file(made_by) as file:
            file.write(seal_json(provenance(resolved, commit, samples.digest())))
        summary = orchestrator().run()
    coverage = _coverage(cell, folder / "coverage.json", orchestrator)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    columns = {**unseal_json(made_by.read_bytes()), "code": recorded_code(folder)}
    return to_row(key, cell.configuration, cell.method, summary, columns, coverage)


def _finished(run: RunFolder, cell: Cell) -> dict[str, Any] | None:
    """Return the summary of a finished run; None if its row lacks a file."""
    needed = [run.folder / "provenance.json"]
    if cell.coverage is not None and not run.checkpoints.has_any():
        needed.append(run.folder / "coverage.json")  # without checkpoints it cannot be computed
    try:
        run.require_intact("summary.json")
        for path in needed:
            unseal_json(path.read_bytes())
        return run.summary
    except (FileNotFoundError, ValueError):
        return None


def _coverage(cell: Cell, path: Path, orchestrator: Callable[..., Orchestrator]) -> list[dict[str, Any]] | None:
    """Calibrate the exits of all clients, if requested, and store the result."""
    if cell.coverage is None:
        return None
    values: list[dict[str, Any]]
    with suppress(FileNotFoundError, ValueError):  # a damaged file is computed again
        values = unseal_json(path.read_bytes())["results"]
        return values
    record_code(path.parent, code_digest(cell.values))
    results = federation_coverage(orchestrator(engine=Sequential()).load_clients(), cell.coverage, cell.seed)
    values = [result.as_values() for result in results]
    with atomic_file(path) as file:
        file.write(seal_json({"results": values}))
    return values
