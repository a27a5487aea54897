"""Run a grid in several processes; finished cells are kept and never repeated."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, Protocol

import pandas as pd
from filelock import FileLock

from fedekd.benchmark.grid import Cell
from fedekd.benchmark.provenance import finished_rows
from fedekd.benchmark.results import Row, read_results, write_results
from fedekd.benchmark.worker import run_cell
from fedekd.child_process import die_with_parent
from fedekd.errors import describe_error
from fedekd.federation.run_folder import LOCK_FILE
from fedekd.reporting.pages import current_commit

CellRunner = Callable[[Cell, Path, Mapping[str, Any], Path, str], Row]


class GridObserver(Protocol):
    """Receives the progress of a grid."""

    def started(self, total: int, done: int) -> None:
        """Called once with the number of cells and the number that are already finished."""
        ...

    def cell_started(self, cell: Cell) -> None:
        """Called when a process starts a cell."""
        ...

    def cell_finished(self, cell: Cell, row: Row) -> None:
        """Called when the row of a cell is in the results."""
        ...

    def cell_failed(self, cell: Cell, reason: str) -> None:
        """Called when a cell failed; the other cells continue."""
        ...


def run_grid(
    grid: Sequence[Cell],
    output: Path,
    results: Path,
    processes: int,
    trainer: Mapping[str, Any],
    observer: GridObserver,
    run: CellRunner = run_cell,
) -> list[tuple[Cell, str]]:
    """Run the cells that have no row in `results` yet.

    The first cell of a group trains the local baseline; the other cells of the group wait for it and reuse it.

    Args:
        grid: The cells.
        output: Folder of the runs; an interrupted cell resumes from its checkpoint.
        results: Folder of the CSV files; rewritten after every finished cell.
        processes: Number of cells that run in parallel.
        trainer: Trainer options of all cells.
        observer: Receives the progress.
        run: Function that runs one cell.

    Returns:
        The failed cells with the reasons.
    """
    rows = read_results(results)
    done = finished_rows(rows, grid)
    waiting = [cell for cell in grid if cell.key not in done]
    observer.started(len(grid), len(grid) - len(waiting))
    failures: list[tuple[Cell, str]] = []
    running: dict[Future[Row], Cell] = {}
    with_baseline: set[str] = set()  # groups whose local baseline is trained
    suspects: list[Cell] = []  # cells that were running when a process died; retried one at a time
    commit = current_commit()
    pool = _pool(processes)
    try:
        while waiting or suspects or running:
            broken = False
            busy = {cell.group for cell in running.values()} - with_baseline
            for cell in suspects[:1] or list(waiting):
                if len(running) == (1 if suspects else processes):
                    break
                if cell.group in busy:
                    continue
                try:
                    future = pool.submit(run, cell, output, trainer, output / "local", commit)
                except BrokenProcessPool:  # a process died after the last wait
                    broken = True
                    break
                busy |= {cell.group} - with_baseline
                (suspects or waiting).remove(cell)
                running[future] = cell
                observer.cell_started(cell)
            finished, _ = wait(running, return_when=FIRST_COMPLETED)
            lost: list[Cell] = []
            for future in finished:
                cell = running.pop(future)
                try:
                    row = future.result()
                except BrokenProcessPool:
                    lost.append(cell)
                except Exception as error:  # one bad cell must not stop the grid
                    failures.append((cell, describe_error(error, 1000)))
                    observer.cell_failed(*failures[-1])
                else:
                    with_baseline.add(cell.group)
                    _add_row(results, row)
                    observer.cell_finished(cell, row)
            if lost or broken:
                # A process that dies breaks the whole pool. Run these cells one at a time, to find the one that fails.
                lost += running.values()
                running.clear()
                pool.shutdown(wait=False, cancel_futures=True)
                pool = _pool(processes)
                if len(lost) == 1 and not broken:
                    failures.append((lost[0], "its process died"))
                    observer.cell_failed(*failures[-1])
                else:
                    suspects += lost
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown()  # explicitly, to avoid warnings at interpreter exit
    return failures


def _add_row(results: Path, row: Row) -> None:
    """Add a row to the files, to which another grid may have added rows."""
    results.mkdir(parents=True, exist_ok=True)
    with FileLock(results / LOCK_FILE):
        rows = read_results(results).drop(index=row["key"], errors="ignore")
        write_results(results, pd.concat([rows, pd.DataFrame([row], index=[row["key"]])]).fillna(""))


def _pool(processes: int) -> ProcessPoolExecutor:
    # Forked processes can use neither CUDA nor the parent's thread pools.
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(processes, mp_context=context, initializer=die_with_parent)
