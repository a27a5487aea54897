"""Command `benchmark`: run a grid; finished cells are not repeated."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fedekd.benchmark import Block, Cell, cells, method_table, parse_filter, read_results, require_valid, run_grid
from fedekd.benchmark.provenance import finished_rows, mixture, others
from fedekd.benchmark.results import Row
from fedekd.configuration.help import BriefHelp
from fedekd.configuration.options import parse
from fedekd.errors import UserError, print_warning, shorten, shorten_path
from fedekd.metrics import METRICS
from fedekd.modules import TrainerFactory
from fedekd.reporting.console import PlainConsole
from fedekd.reporting.document import markdown_table


def benchmark_parser() -> ArgumentParser:
    """Build the parser of `benchmark` and of a grid's YAML file."""
    parser = ArgumentParser(
        prog="orchestrator.py benchmark",
        usage="%(prog)s --config benchmark/quick.yaml [OPTIONS]",
        description="Run a grid: every combination of data sets, alphas, seeds and methods. Cells that are in the"
        " results are finished and not repeated.",
        formatter_class=BriefHelp,
        allow_abbrev=False,
        exit_on_error=False,
    )
    parser.add_argument("--config", action="config", help="YAML file of the grid: a path, or a name in configs/.")
    parser.add_argument(
        "--blocks", type=list[Block], help="Blocks of the grid: products of datasets, alphas, seeds and methods."
    )
    parser.add_argument("--output", type=str, default="runs/benchmark", help="Folder of the runs.")
    parser.add_argument(
        "--results", type=str | None, default=None, help="Folder of the CSV files (default: OUTPUT/results)."
    )
    parser.add_argument("--processes", type=int, default=1, help="Number of runs in parallel.")
    parser.add_argument("--filter", type=str, default="", help="Run some cells only: dataset=retinamnist,alpha=0.1")
    parser.add_argument(
        "--run", type=bool, default=True, help="false: print the table of finished cells and run nothing."
    )
    parser.add_argument("--accelerator", type=str, default="auto", help="Device: auto, cpu or cuda.")
    parser.add_argument("--precision", type=str, default="auto", help="Precision, as trainer.precision of `fit`.")
    parser.add_argument("--threads", type=str, default="1", help="CPU threads per run; auto uses all cores.")
    return parser


class GridDisplay:
    """Prints one line per finished cell, and a progress bar on a terminal."""

    def __init__(self) -> None:
        self.console = PlainConsole()
        self.progress = Progress(
            TextColumn("{task.description}", markup=False),
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
        """Print the number of cells and start the bar."""
        self.console.print(f"{total} cells, {done} of them finished")
        self.task = self.progress.add_task("runs", total=total)
        # Progress.advance would count finished cells into the speed.
        self.progress.tasks[0].completed = done
        self.progress.start()

    def cell_started(self, cell: Cell) -> None:
        """Show the running cell."""
        self.progress.update(self.task, description=_name(cell))

    def cell_finished(self, cell: Cell, row: Row) -> None:
        """Print the scores of a cell."""
        self.progress.advance(self.task)
        metric = METRICS[row["metric"]]
        average, worst = (metric.difference_text(float(row[f"delta_{name}"])) for name in ("avg", "worst"))
        scores = f"{metric.title} {metric.text(float(row['mean']))}  Delta avg {average} worst {worst}"
        self.console.print(f"{_name(cell)}  {scores}  {float(row['seconds']):.0f} s", soft_wrap=True)

    def cell_failed(self, cell: Cell, reason: str) -> None:
        """Print the reason."""
        self.progress.advance(self.task)
        print_warning(f"{_name(cell)} failed: {reason}")


def _name(cell: Cell) -> str:
    return f"{cell.clients} seed {cell.seed} {cell.method}"


def _trainer(config: Namespace) -> dict[str, Any]:
    """Return the trainer options of all cells.

    Raises:
        UserError: If an option is not valid on this machine.
    """
    if config.threads != "auto" and not (config.threads.isdecimal() and int(config.threads)):
        raise UserError(f"--threads: expected a whole number of at least 1, or auto, got {config.threads!r}.")
    threads = config.threads if config.threads == "auto" else int(config.threads)
    options = {"accelerator": config.accelerator, "precision": config.precision, "threads": threads}
    try:
        TrainerFactory(**options).resolve()
    except UserError as error:
        raise UserError(re.sub(r"(--)?trainer\.(?!device)", "--", str(error))) from error
    return options


def run(argv: Sequence[str]) -> int:
    """Run `benchmark`; the exit code is 1 if a cell failed."""
    config = parse(benchmark_parser(), argv)
    if not config.blocks:
        raise UserError("--blocks: expected a grid, got none. Example: benchmark --config benchmark/quick.yaml")
    if config.processes < 1:
        raise UserError(f"--processes: expected at least 1, got {config.processes}.")
    trainer = _trainer(config)
    grid = cells(config.blocks, parse_filter(config.filter))
    if not grid:
        raise UserError(
            f"--filter: expected a condition that a cell of the grid meets, got {shorten(repr(config.filter))}."
            if config.filter
            else "--blocks: expected at least one cell, got an empty list of datasets, alphas, seeds or methods."
        )
    output = Path(config.output)
    results = Path(config.results) if config.results else output / "results"
    for flag, folder in (("output", output), ("results", results)):
        if folder.exists() and not folder.is_dir():
            raise UserError(f"--{flag}: expected a directory, got the file {shorten_path(folder)}.")
    failures = []
    rows = read_results(results)
    done = finished_rows(rows, grid)
    if config.run:
        require_valid([cell for cell in grid if cell.key not in done], trainer)
    if text := others(rows, grid, done, trainer["precision"]):
        print_warning(text)
    if config.run:
        display = GridDisplay()
        with display.progress:
            failures = run_grid(grid, output / "runs", results, config.processes, trainer, display)
    rows = read_results(results)
    finished = rows.loc[list(finished_rows(rows, grid).values())]
    # rich would wrap the table.
    print(markdown_table(method_table(finished)) if len(finished) else "no cell of the grid is finished")
    if text := mixture(finished):
        print(f"\n{text}")
    print(f"\n{len(finished)} of {len(grid)} cells are in {results}")
    return 1 if failures else 0
