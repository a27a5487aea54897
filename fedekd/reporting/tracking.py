"""Logging of a run: `metrics.csv` and Lightning loggers."""

from __future__ import annotations

import csv
import io
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from fedekd.atomic import atomic_file
from fedekd.errors import UserError, describe_error
from fedekd.reporting.rows import Row, Summary, column_order

if TYPE_CHECKING:
    from lightning.pytorch.loggers import Logger


def metrics_csv(history: Sequence[Row], clients: Sequence[str] = ()) -> bytes:
    """Serialize one row per round; equal values give equal bytes.

    The first column is `round`, followed by the names of all rows in `column_order`. Floats are written in the fewest
    digits that read back as the same float. A name that a row lacks is an empty cell.

    Args:
        history: Rows in the order of the rounds.
        clients: Titles of the clients in order. Default: numbers ascending.
    """
    columns = column_order({"round"}.union(*history), clients)
    text = io.StringIO(newline="")
    table = csv.writer(text, lineterminator="\n")
    table.writerow(columns)
    table.writerows([_cell(row[name]) if name in row else "" for name in columns] for row in history)
    return text.getvalue().encode()


def write_metrics_csv(history: Sequence[Row], path: str | os.PathLike[str], clients: Sequence[str] = ()) -> None:
    """Write the bytes of `metrics_csv` to a file, atomically."""
    with atomic_file(path) as file:
        file.write(metrics_csv(history, clients))


def read_metrics_csv(path: str | os.PathLike[str]) -> list[dict[str, float]]:
    """Read the rows that `metrics_csv` serialized, without empty cells."""
    with Path(path).open(newline="", encoding="utf-8") as file:
        return [{name: _number(cell) for name, cell in row.items() if cell} for row in csv.DictReader(file)]


def _cell(value: float) -> str:
    # repr of a NumPy float is "np.float64(0.5)".
    return str(int(value)) if isinstance(value, Integral) else repr(float(value))


def _number(cell: str) -> float:
    return int(cell) if cell.lstrip("-").isdigit() else float(cell)


@runtime_checkable
class FederationLogger(Protocol):
    """Optional interface of a Lightning logger that continues a run after a resume."""

    def bind(self, run_dir: Path | None, warn: Callable[[str], None]) -> None:
        """Set the run folder, if any, and where warnings go, before anything is logged."""

    def rounds_held(self) -> int:
        """Return the last round that the logger has stored; 0 if none."""

    def log_summary(self, summary: Summary) -> None:
        """Log the summary of the run."""

    def log_artifacts(self, folder: Path, names: Sequence[str], metadata: Callable[[], Mapping[str, Any]]) -> None:
        """Log files and folders of the finished run, if the logger stores them."""

    def finish(self, status: str) -> None:
        """End the logger's run; Lightning's `finalize` is called after every fit."""


class Tracker:
    """Sends the rows of a run to Lightning loggers, each round once.

    A resumed run calls `replay` with the rows of its checkpoint. Each logger then gets the rounds that it lacks: a
    `FederationLogger` reports which rounds it has; any other starts a new file, and gets every round.

    A logger that fails does not end the run: it gets a warning, and nothing more until it is closed. Only a `UserError`
    up to the end of `replay`, before anything is trained, is raised.

    Args:
        loggers: Lightning loggers, such as CSVLogger, TensorBoardLogger or `WandbRunLogger`.
        run_dir: Run folder, where a `FederationLogger` stores what a resume needs; None for a run without one.
        warn: Called with one line per failure. Default: a Python warning.
    """

    def __init__(
        self,
        loggers: Sequence[Logger],
        run_dir: str | os.PathLike[str] | None,
        warn: Callable[[str], None] = warnings.warn,
    ) -> None:
        self.loggers = list(loggers)
        self.warn = warn
        self._held: dict[Logger, int] = {}
        self._failed: set[Logger] = set()
        self._is_started, self._is_open = False, True
        folder = None if run_dir is None else Path(run_dir)
        self._call_federation_loggers(lambda logger: logger.bind(folder, warn))

    def log_config(self, config: Mapping[str, Any]) -> None:
        """Log the nested configuration of the run."""
        self._call_each(lambda logger: logger.log_hyperparams(dict(config)))

    def log_round(self, row: Row) -> None:
        """Log a row, with its round as the step, to each logger that lacks it."""
        step = int(row["round"])

        def log(logger: Logger) -> None:
            if step > self._rounds_held(logger):
                logger.log_metrics(dict(row), step=step)
                logger.save()
                self._held[logger] = step

        self._call_each(log)

    def replay(self, history: Sequence[Row]) -> None:
        """Start the loggers, and log the rounds of a checkpoint to those that lack them."""
        self._call_each(self._rounds_held)
        for row in history:
            self.log_round(row)
        self._is_started = True

    def log_summary(self, summary: Summary) -> None:
        """Log the summary to each `FederationLogger`."""
        self._call_federation_loggers(lambda logger: logger.log_summary(summary))

    def log_artifacts(
        self, folder: str | os.PathLike[str], names: Sequence[str], metadata: Callable[[], Mapping[str, Any]]
    ) -> None:
        """Log the finished run to each `FederationLogger`.

        Args:
            folder: Run folder.
            names: Its files and folders of the run; one may be missing.
            metadata: Returns JSON values that describe the run, with `rounds`. Called by a logger that stores them.
        """
        self._call_federation_loggers(lambda logger: logger.log_artifacts(Path(folder), names, metadata))

    def urls(self) -> list[str]:
        """Return the address of the run at each logger that has one (attribute `url`)."""
        urls: list[Any] = []
        self._call_each(lambda logger: urls.append(getattr(logger, "url", None)))
        return [url for url in urls if isinstance(url, str)]

    def close(self, status: str = "success") -> None:
        """Close every logger, also one that failed; a second call does nothing.

        Args:
            status: `success`, `failed` or `interrupted`.
        """
        if self._is_open:
            self._is_open, self._is_started = False, True  # an error before would hide the one that ends the run
            lightning_status = "success" if status == "success" else "failed"  # MLflow rejects any other
            self._call_each(lambda logger: logger.finalize(lightning_status), closes=True)
            self._call_federation_loggers(lambda logger: logger.finish(status), closes=True)

    def _rounds_held(self, logger: Logger) -> int:
        if logger not in self._held:
            self._held[logger] = logger.rounds_held() if isinstance(logger, FederationLogger) else 0
        return self._held[logger]

    def _call_federation_loggers(self, call: Callable[[FederationLogger], object], closes: bool = False) -> None:
        self._call_each(lambda logger: call(logger) if isinstance(logger, FederationLogger) else None, closes)

    def _call_each(self, call: Callable[[Logger], object], closes: bool = False) -> None:
        """Call a function with each logger, and catch its failure."""
        for logger in self.loggers:
            if logger in self._failed and not closes:
                continue
            try:
                call(logger)
            except Exception as error:
                if isinstance(error, UserError) and not self._is_started:
                    raise
                if logger not in self._failed:
                    self._failed.add(logger)
                    self.warn(
                        f"logger: {type(logger).__name__} failed and gets nothing more of this run"
                        f" ({describe_error(error)}). The rounds are in metrics.csv;"
                        " fit --resume logs the rest of an unfinished run."
                    )
