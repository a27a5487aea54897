"""Logging of a run: `metrics.csv` and Lightning loggers."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from fedekd.atomic import atomic_file
from fedekd.reporting.rows import Row, Summary, column_order

if TYPE_CHECKING:
    from lightning.pytorch.loggers import Logger


def metrics_csv(history: Sequence[Row]) -> bytes:
    """Serialize one row per round; equal values give equal bytes.

    The first column is `round`, followed by the names of all rows in `column_order`. Floats are written in the fewest
    digits that read back as the same float. A name that a row lacks is an empty cell.

    Args:
        history: Rows in the order of the rounds.
    """
    columns = column_order({"round"}.union(*history))
    text = io.StringIO(newline="")
    table = csv.writer(text, lineterminator="\n")
    table.writerow(columns)
    table.writerows([_cell(row[name]) if name in row else "" for name in columns] for row in history)
    return text.getvalue().encode(errors="backslashreplace")  # a name of an earlier version may be a lone surrogate


def write_metrics_csv(history: Sequence[Row], path: str | os.PathLike[str]) -> None:
    """Write the bytes of `metrics_csv` to a file, atomically."""
    with atomic_file(path) as file:
        file.write(metrics_csv(history))


def read_metrics_csv(path: str | os.PathLike[str]) -> list[dict[str, float]]:
    """Read the rows that `metrics_csv` serialized, without empty cells."""
    with Path(path).open(newline="") as file:
        return [{name: _number(cell) for name, cell in row.items() if cell} for row in csv.DictReader(file)]


def _cell(value: float) -> str:
    # repr of a NumPy float is "np.float64(0.5)".
    return str(int(value)) if isinstance(value, Integral) else repr(float(value))


def _number(cell: str) -> float:
    return int(cell) if cell.lstrip("-").isdigit() else float(cell)


@runtime_checkable
class FederationLogger(Protocol):
    """Optional interface of a Lightning logger that continues a run after a resume."""

    def bind(self, run_dir: Path) -> None:
        """Set the run folder, before anything is logged."""

    def rounds_held(self) -> int:
        """Return the last round that the logger has stored; 0 if none."""

    def log_summary(self, summary: Summary) -> None:
        """Log the summary of the run."""

    def log_artifacts(self, folder: Path) -> None:
        """Log the checkpoints of the run, if the logger stores them."""

    def finish(self, status: str) -> None:
        """End the logger's run; Lightning's `finalize` is called after every fit."""


class Tracker:
    """Sends the rows of a run to Lightning loggers, each round once.

    A resumed run calls `replay` with the rows of its checkpoint. Each logger then gets the rounds that it lacks: a
    `FederationLogger` reports which rounds it has; any other starts a new file, and gets every round.

    Args:
        loggers: Lightning loggers, such as CSVLogger, TensorBoardLogger or `WandbRunLogger`.
        run_dir: Run folder, where a `FederationLogger` stores what a resume needs; None for a run without one.
    """

    def __init__(self, loggers: Sequence[Logger], run_dir: str | os.PathLike[str] | None) -> None:
        self.loggers = list(loggers)
        self._held: dict[int, int] = {}
        self._open = True
        for logger in self.loggers:
            if isinstance(logger, FederationLogger) and run_dir is not None:
                logger.bind(Path(run_dir))

    def log_config(self, config: Mapping[str, Any]) -> None:
        """Log the nested configuration of the run."""
        for logger in self.loggers:
            logger.log_hyperparams(dict(config))

    def log_round(self, row: Row) -> None:
        """Log a row, with its round as the step, to each logger that lacks it."""
        for index, logger in enumerate(self.loggers):
            if index not in self._held:
                self._held[index] = logger.rounds_held() if isinstance(logger, FederationLogger) else 0
            step = int(row["round"])
            if step > self._held[index]:
                logger.log_metrics(dict(row), step=step)
                logger.save()
                self._held[index] = step

    def replay(self, history: Sequence[Row]) -> None:
        """Log the rounds of a checkpoint to the loggers that lack them."""
        for row in history:
            self.log_round(row)

    def log_summary(self, summary: Summary) -> None:
        """Log the summary to each `FederationLogger`."""
        for logger in self.loggers:
            if isinstance(logger, FederationLogger):
                logger.log_summary(summary)

    def log_artifacts(self, folder: str | os.PathLike[str]) -> None:
        """Log the folder of checkpoints to each `FederationLogger`."""
        for logger in self.loggers:
            if isinstance(logger, FederationLogger):
                logger.log_artifacts(Path(folder))

    def close(self, status: str = "success") -> None:
        """Close every logger; a second call does nothing.

        Args:
            status: `success`, `failed` or `interrupted`.
        """
        if self._open:
            self._open = False
            for logger in self.loggers:
                logger.finalize(status)
                if isinstance(logger, FederationLogger):
                    logger.finish(status)
