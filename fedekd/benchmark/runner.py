"""Runs a grid on several processes, keeps every finished cell, and repeats none."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, Protocol

from fedekd.benchmark.grid import Cell
from fedekd.benchmark.results import Row, read_results, write_results
from fedekd.benchmark.worker import run_cell
from fedekd.processes import die_with_parent
from fedekd.reporting.pages import current_commit

CellRunner = Callable[[Cell, Path, Mapping[str, Any], Path, str], Row]


class GridObserver(Protocol):
    """Is told how a grid goes."""

    def started(self, total: int, done: int) -> None:
        """So many cells there are, and so many are finished already."""
        ...

    def cell_started(self, cell: Cell) -> None:
        """A process takes a cell up."""
        ...

    def cell_finished(self, cell: Cell, row: Row) -> None:
        """A cell is in the results."""
        ...

    def cell_failed(self, cell: Cell, reason: str) -> None:
        """A cell has no result; the others go on."""
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

    The first cell of a group trains Local for all of it; the others of the group wait for it and then read.

    Args:
        grid: The cells.
        output: Folder of the runs; a cell that was stopped goes on from its checkpoint.
        results: Folder of the CSV files; rewritten after every finished cell.
        processes: How many run side by side.
        trainer: The trainer's options for all of them.
        observer: Is told how it goes.
        run: Runs one cell.

    Returns:
        The cells that failed, with the reason.
    """
    rows = read_results(results)
    waiting = [cell for cell in grid if cell.key not in rows]
    observer.started(len(grid), len(grid) - len(waiting))
    failures: list[tuple[Cell, str]] = []
    running: dict[Future[Row], Cell] = {}
    led: set[str] = set()  # groups whose Local is trained
    suspects: list[Cell] = []  # cells that were running when a process died; each is tried again alone
    commit = current_commit()
    pool = _pool(processes)
    try:
        while waiting or suspects or running:
            busy = {cell.group for cell in running.values()} - led
            for cell in suspects[:1] or list(waiting):
                if len(running) == (1 if suspects else processes):
                    break
                if cell.group in busy:
                    continue
                busy |= {cell.group} - led
                (suspects or waiting).remove(cell)
                observer.cell_started(cell)
                arguments = (cell, output / cell.key, trainer, output / "local", commit)
                running[pool.submit(run, *arguments)] = cell
            finished, _ = wait(running, return_when=FIRST_COMPLETED)
            lost: list[Cell] = []
            for future in finished:
                cell = running.pop(future)
                try:
                    row = future.result()
                except BrokenProcessPool:
                    lost.append(cell)
                except Exception as error:  # one bad cell must not stop the grid
                    failures.append((cell, " ".join(f"{type(error).__name__}: {error}".split())))
                    observer.cell_failed(*failures[-1])
                else:
                    led.add(cell.group)
                    rows[cell.key] = row
                    write_results(results, rows.values())
                    observer.cell_finished(cell, row)
            if lost:
                # All that ran in the pool went down with one process: alone, each shows whether it is to blame.
                lost += running.values()
                running.clear()
                pool.shutdown(wait=False, cancel_futures=True)
                pool = _pool(processes)
                if len(lost) == 1:
                    failures.append((lost[0], "its process died"))
                    observer.cell_failed(*failures[-1])
                else:
                    suspects += lost
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown()  # in peace: a pool that is left to the end of the program complains there
    return failures


def _pool(processes: int) -> ProcessPoolExecutor:
    # Forked processes cannot use CUDA, nor the parent's thread pools.
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(processes, mp_context=context, initializer=die_with_parent)
