"""`benchmark`: run a grid of federations, several side by side; what is finished is never run again."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fedekd.benchmark import Block, Cell, cells, markdown_table, parse_filter, read_results, require_valid, run_grid
from fedekd.benchmark.results import Row
from fedekd.configuration.options import parse
from fedekd.errors import UserError
from fedekd.modules import TrainerFactory


def benchmark_parser() -> ArgumentParser:
    """The parser of `benchmark`, and of a grid's YAML file."""
    parser = ArgumentParser(
        prog="orchestrator.py benchmark",
        usage="%(prog)s --config benchmark/quick.yaml [OPTIONS]",
        description="Run a grid of federations; a cell whose key is in the results counts as finished.",
        allow_abbrev=False,
        exit_on_error=False,
    )
    parser.add_argument("--config", action="config", help="The grid, by path or by its name in configs/.")
    parser.add_argument("--blocks", type=list[Block], help="Products of datasets, alphas, seeds and methods.")
    parser.add_argument("--output", type=str, default="runs/benchmark", help="The folder of the runs.")
    parser.add_argument(
        "--results", type=str | None, default=None, help="Folder of the CSV files (default: OUTPUT/results)."
    )
    parser.add_argument("--processes", type=int, default=1, help="How many federations run side by side.")
    parser.add_argument("--filter", type=str, default="", help="Some cells only: dataset=retinamnist,alpha=0.1")
    parser.add_argument("--run", type=bool, default=True, help="false: tabulate what is finished, and run nothing.")
    parser.add_argument("--accelerator", type=str, default="auto", help="auto, cpu or cuda.")
    parser.add_argument("--precision", type=str, default="auto", help="As trainer.precision of fit.")
    parser.add_argument(
        "--threads", type=str, default="1", help="CPU threads of each federation; auto takes all (default: 1)."
    )
    return parser


class GridDisplay:
    """A bar with the time left on a terminal; a line for each finished cell everywhere."""

    def __init__(self) -> None:
        self.console = Console()
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            disable=not self.console.is_interactive,
            speed_estimate_period=24 * 3600,
        )

    def started(self, total: int, done: int) -> None:
        """Tell how much there is to do."""
        self.console.print(f"{total} cells, {done} of them finished", highlight=False)
        self.task = self.progress.add_task("federations", total=total)
        # Progress.advance would take what was done before for speed.
        self.progress.tasks[0].completed = done
        self.progress.start()

    def cell_started(self, cell: Cell) -> None:
        """Show what runs."""
        self.progress.update(self.task, description=_name(cell))

    def cell_finished(self, cell: Cell, row: Row) -> None:
        """Tell the cell's figures."""
        self.progress.advance(self.task)
        figures = f"{row['metric']} {float(row['mean']):.4f}  delta avg {float(row['delta_avg']):+.4f}"
        line = f"{_name(cell)}  {figures} worst {float(row['delta_worst']):+.4f}  {float(row['seconds']):.0f} s"
        self.console.print(line, highlight=False, soft_wrap=True)

    def cell_failed(self, cell: Cell, reason: str) -> None:
        """Tell why there is no result."""
        self.progress.advance(self.task)
        print(f"warning: {_name(cell)} failed: {reason}", file=sys.stderr, flush=True)


def _name(cell: Cell) -> str:
    return f"{cell.dataset} alpha {cell.alpha:g} seed {cell.seed} {cell.method}"


def _trainer(config: Namespace) -> dict[str, Any]:
    """The options of all trainers, held to what this machine has.

    Raises:
        UserError: If one is not valid, or the device is not there.
    """
    if config.threads != "auto" and not (config.threads.isdecimal() and int(config.threads)):
        raise UserError(f"--threads is {config.threads!r}, and must be a whole number of at least 1, or auto")
    threads = config.threads if config.threads == "auto" else int(config.threads)
    options = {"accelerator": config.accelerator, "precision": config.precision, "threads": threads}
    try:
        TrainerFactory(**options).resolve()
    except UserError as error:
        raise UserError(re.sub(r"(--)?trainer\.(?!device)", "--", str(error))) from error
    return options


def _tell_of_other_precisions(kept: Mapping[str, Row], grid: Sequence[Cell], wanted: str) -> None:
    """That finished cells stay as they are, where another precision is asked for than they had."""
    had = Counter(kept[cell.key]["precision"] for cell in grid if cell.key in kept)
    others = {precision: count for precision, count in had.items() if precision != wanted}
    if wanted != "auto" and others:
        told = ", ".join(f"{count} in {precision}" for precision, count in sorted(others.items()))
        print(
            f"warning: --precision is {wanted}, and of the finished cells were run {told}; they are not run again: give"
            " another --results for that",
            file=sys.stderr,
        )


def run(argv: Sequence[str]) -> int:
    """Run `benchmark` with its options; the exit code is 1 if a cell failed."""
    config = parse(benchmark_parser(), argv)
    if not config.blocks:
        raise UserError("benchmark needs a grid, as in: benchmark --config benchmark/quick.yaml")
    if config.processes < 1:
        raise UserError(f"processes is {config.processes}, and must be at least 1")
    trainer = _trainer(config)
    grid = cells(config.blocks, parse_filter(config.filter))
    if not grid:
        told = f"--filter {config.filter} leaves no cell of the grid"
        raise UserError(told if config.filter else "the grid has no cells")
    output = Path(config.output)
    results = Path(config.results) if config.results else output / "results"
    for flag, folder in (("output", output), ("results", results)):
        if folder.exists() and not folder.is_dir():
            raise UserError(f"--{flag} {folder} is no folder")
    failures = []
    if config.run:
        kept = read_results(results)
        require_valid([cell for cell in grid if cell.key not in kept], trainer)
        _tell_of_other_precisions(kept, grid, trainer["precision"])
        display = GridDisplay()
        with display.progress:
            failures = run_grid(grid, output / "runs", results, config.processes, trainer, display)
    kept = read_results(results)
    finished = [kept[cell.key] for cell in grid if cell.key in kept]
    # Not by rich, which would wrap it: so it can go into a file as it is.
    print(markdown_table(finished) if finished else "no cell of the grid is finished")
    print(f"\n{len(finished)} of {len(grid)} cells are in {results}")
    return 1 if failures else 0
