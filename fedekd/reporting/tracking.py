"""A run's numbers on their way out: to `metrics.csv` and to any Lightning loggers."""

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


def write_metrics_csv(history: Sequence[Row], path: str | os.PathLike[str]) -> None:
    """Write a row a round, atomically; the bytes depend on the numbers alone.

    The first column is `round_idx`, then come the names of all rows in `column_order`. A float is written in the
    fewest digits that read back as the same float, an integer as one; a name that a row lacks is an empty
    cell.

    Args:
        history: The rows, in the order of the rounds.
        path: The file to write.
    """
    columns = column_order({"round"}.union(*history))
    text = io.StringIO(newline="")
    table = csv.writer(text, lineterminator="\n")
    table.writerow(columns)
    table.writerows([_cell(row[name]) if name in row else "" for name in columns] for row in history)
    with atomic_file(path) as file:
        file.write(text.getvalue().encode())


def read_metrics_csv(path: str | os.PathLike[str]) -> list[dict[str, float]]:
    """The rows that `write_metrics_csv` wrote, number for number; an empty cell is a name the row lacks."""
    with Path(path).open(newline="") as file:
        return [{name: _number(cell) for name, cell in row.items() if cell} for row in csv.DictReader(file)]


def _cell(value: float) -> str:
    # NumPy's own repr would write "np.float64(0.5)".
    return str(int(value)) if isinstance(value, Integral) else repr(float(value))


def _number(cell: str) -> float:
    return int(cell) if cell.lstrip("-").isdigit() else float(cell)


@runtime_checkable
class FederationLogger(Protocol):
    """What a Lightning logger may offer beyond `log_metrics`, to follow a federation through resumes."""

    def bind(self, run_dir: Path) -> None:
        """Learn the run's folder, before anything is logged."""

    def rounds_held(self) -> int:
        """The last round that lies safely with the logger already; 0 for none."""

    def log_summary(self, summary: Summary) -> None:
        """Take the run's final numbers."""

    def log_artifacts(self, folder: Path) -> None:
        """Take the run's checkpoints, if the logger was told to keep them."""

    def finish(self, status: str) -> None:
        """End what the logger began. Lightning's own `finalize` comes after every fit, this once a run."""


class Tracker:
    """Sends a federation's numbers to Lightning loggers: one call a round, each round once.

    A resumed run calls `replay` with the rows of its checkpoint. Each logger is then given what it lacks: a
    `FederationLogger` says itself which rounds it holds; any other starts anew on disk (a new `version_N`
    folder, or the old file replaced), so it is given every round.

    Args:
        loggers: Lightning loggers, such as CSVLogger, TensorBoardLogger or `WandbRunLogger`.
        run_dir: The run's folder; a `FederationLogger` keeps there what must outlive a stop. None for a run that
            keeps nothing.
    """

    def __init__(self, loggers: Sequence[Logger], run_dir: str | os.PathLike[str] | None) -> None:
        self.loggers = list(loggers)
        self._held: dict[int, int] = {}
        self._open = True
        for logger in self.loggers:
            if isinstance(logger, FederationLogger) and run_dir is not None:
                logger.bind(Path(run_dir))

    def log_config(self, config: Mapping[str, Any]) -> None:
        """Log the run's configuration, nested as it is."""
        for logger in self.loggers:
            logger.log_hyperparams(dict(config))

    def log_round(self, row: Row) -> None:
        """Log one round's row with `round_idx` as the step, to each logger that does not hold that round yet."""
        for place, logger in enumerate(self.loggers):
            if place not in self._held:
                self._held[place] = logger.rounds_held() if isinstance(logger, FederationLogger) else 0
            step = int(row["round"])
            if step > self._held[place]:
                logger.log_metrics(dict(row), step=step)
                logger.save()
                self._held[place] = step

    def replay(self, history: Sequence[Row]) -> None:
        """After a resume: log the rounds of the checkpoint that a logger does not hold."""
        for row in history:
            self.log_round(row)

    def log_summary(self, summary: Summary) -> None:
        """Give the final numbers to the loggers that keep a summary."""
        for logger in self.loggers:
            if isinstance(logger, FederationLogger):
                logger.log_summary(summary)

    def log_artifacts(self, folder: str | os.PathLike[str]) -> None:
        """Give the folder of checkpoints to the loggers that keep artifacts."""
        for logger in self.loggers:
            if isinstance(logger, FederationLogger):
                logger.log_artifacts(Path(folder))

    def close(self, status: str = "success") -> None:
        """Close every logger, once; a second call does nothing.

        Args:
            status: `success`, or what else became of the run, such as `failed` or `interrupted`.
        """
        if self._open:
            self._open = False
            for logger in self.loggers:
                logger.finalize(status)
                if isinstance(logger, FederationLogger):
                    logger.finish(status)
