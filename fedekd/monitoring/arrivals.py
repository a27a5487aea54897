"""The growing CSV file of arrivals: its checks, and what is computed of each row."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from fedekd.errors import UserError, listed, shorten, shorten_path
from fedekd.monitoring.columns import MODEL_DIGITS
from fedekd.monitoring.start import SAMPLE_DIGITS, MonitorStart

Array = npt.NDArray[Any]

#: Column of the true labels or values, which `predict` does not write.
TARGET = "target"


@dataclass(frozen=True, eq=False)
class Arrivals:
    """Checked arrivals of a file, in order.

    Attributes:
        rows: Number of complete rows, n.
        size: Bytes of header and complete rows.
        sha256: Their hash.
        exits: Exit of each sample, from 1, shape (n,).
        values: By quantity, numbers of shape (n,): errors of `exit`, excess losses of `do_no_harm`, omissions of
            `coverage`, and the columns of drift tests.
    """

    rows: int
    size: int
    sha256: str
    exits: Array
    values: dict[str, Array] = field(default_factory=dict)


def read_header(path: Path) -> list[str]:
    """Return the names of the columns of a file of arrivals.

    Raises:
        UserError: The file does not exist or has no header.
    """
    content = _complete_lines(path)
    return [str(name) for name in _frame(content[: content.index(b"\n") + 1], path).columns]


def read_arrivals(path: Path, start: MonitorStart, size: int = 0, sha256: str = "") -> Arrivals:
    """Read and check a file of arrivals.

    A last line without its end is left for the next call, because it may be unfinished.

    Args:
        path: CSV file: what `predict --monitoring true` writes, with a column `target` if the monitor is labelled. An
            optional column `time` (numbers or ISO 8601) must not decrease.
        start: Settings of the monitor.
        size: Bytes that an earlier call has read.
        sha256: Their hash.

    Raises:
        UserError: The file shrank or changed, a column or cell is missing or invalid, a sample occurs twice, was used
            in training or calibration, or was predicted by another model, or the rows are out of order.
    """
    content, label = _complete_lines(path), f"--arrivals: {shorten_path(path)}"
    if len(content) < size:
        raise UserError(
            f"{label}: expected at least the {size} bytes of the last call, got {len(content)}. Restore the file; rows"
            " are only appended"
        )
    if size and hashlib.sha256(content[:size]).hexdigest() != sha256:
        raise UserError(
            f"{label}: expected the first {size} bytes of the last call, got others. Restore the file; rows are only"
            " appended"
        )
    table = _Table(_frame(content, path), label)
    _check_samples(table, start)
    exits = table.numbers("exit")
    table.require((exits >= 1) & (exits == np.floor(exits)), "exit", "a number from 1")
    values = _labelled(table, start) if start.is_labelled else {}
    for quantity in start.quantities:
        if quantity.kind == "drift":
            values[quantity.name] = table.numbers(quantity.name)
    return Arrivals(len(table), len(content), hashlib.sha256(content).hexdigest(), exits.astype(np.int64), values)


class _Table:
    """Cells of a file, with the line of the file in errors."""

    def __init__(self, frame: pd.DataFrame, label: str) -> None:
        self.frame, self.label = frame, label

    def __len__(self) -> int:
        return len(self.frame)

    def column(self, name: str) -> pd.Series:
        """Return the cells of a column.

        Raises:
            UserError: It is missing, or a cell is empty.
        """
        if name not in self.frame:
            remedy = "Append the true labels" if name == TARGET else "Write it with: predict --monitoring true"
            raise UserError(f"{self.label}: expected a column {name!r}, got {listed(self.frame.columns)}. {remedy}")
        cells = self.frame[name].str.strip()
        self.require((cells != "").to_numpy(), name, "a label" if name == TARGET else "a value")
        return cells

    def numbers(self, name: str) -> Array:
        """Return the numbers of a column, float64.

        Raises:
            UserError: It is missing, or a cell is not a finite number.
        """
        cells = self.column(name)
        values: Array = pd.to_numeric(cells, errors="coerce").to_numpy(dtype=np.float64)
        self.require(np.isfinite(values), name, "a finite number")
        return values

    def require(self, allowed: Array, name: str, expected: str, hint: str = "") -> None:
        """Raise an error for the first row that is not allowed."""
        if not (wrong := np.flatnonzero(~allowed)).size:
            return
        cell = str(self.frame[name].iloc[wrong[0]])
        found = shorten(repr(cell)) if cell else "an empty cell"
        if name == TARGET and not cell:
            hint = "Append rows when they are labelled, or follow a file without the column by drift tests"
        raise UserError(
            f"{self.label}, line {wrong[0] + 2}: {name}: expected {expected}, got {found}"
            + (f" ({wrong.size} such rows)" if wrong.size > 1 else "")
            + (f". {hint}" if hint else "")
        )


def _check_samples(table: _Table, start: MonitorStart) -> None:
    """Check that samples are new, in order, and predicted by the monitored model."""
    samples = table.column("sample").str[:SAMPLE_DIGITS]
    model = start.network[:MODEL_DIGITS]
    hint = "Start a new monitor with another --state, or restore the rows"
    table.require((table.column("model") == model).to_numpy(), "model", f"{model!r}, the monitored network", hint)
    hint = "Remove the rows: the network has seen these samples"
    table.require((~samples.isin(start.used)).to_numpy(), "sample", "no sample of training or calibration", hint)
    repeats = samples.duplicated().to_numpy()
    table.require(~repeats, "sample", "each sample once", "Remove the repeated rows")
    if "time" in table.frame:
        times = _times(table)
        is_later = np.r_[True, times[1:] >= times[:-1]] if len(times) else np.ones(0, bool)
        table.require(is_later, "time", "times that do not decrease", "Append rows in the order of their arrival")


def _times(table: _Table) -> Array:
    cells = table.column("time")
    numbers: Array = pd.to_numeric(cells, errors="coerce").to_numpy(dtype=np.float64)
    if not np.isnan(numbers).any():
        return numbers
    seconds = np.full(len(cells), np.nan)
    for index, cell in enumerate(cells):
        try:
            seconds[index] = datetime.fromisoformat(cell).timestamp()
        except ValueError:
            break
    table.require(~np.isnan(seconds), "time", "numbers, or ISO 8601 in all rows")
    return seconds


def _labelled(table: _Table, start: MonitorStart) -> dict[str, Array]:
    """Return the values of the quantities that need targets."""
    is_regression = start.task == "regression"
    targets = table.numbers(TARGET) if is_regression else _labels(table, start.class_names)
    values: dict[str, Array] = {}
    for quantity in start.quantities:
        if quantity.kind == "exit":
            values[quantity.name] = (table.numbers("label") != targets).astype(np.float64)
        elif quantity.kind == "do_no_harm":
            kind = "value" if is_regression else "label"
            pair = table.numbers(f"{kind}_federated"), table.numbers(f"{kind}_local")
            federated, local = (
                (each - targets) ** 2 if is_regression else (each != targets).astype(np.float64) for each in pair
            )
            values[quantity.name] = np.clip(federated - local, -start.clip, start.clip) / start.clip
        elif quantity.kind == "coverage" and is_regression:
            covered = (table.numbers("lower") <= targets) & (targets <= table.numbers("upper"))
            values[quantity.name] = (~covered).astype(np.float64)
        elif quantity.kind == "coverage":
            sets = [cell.split() for cell in table.column("set")]
            names = [(str(int(target)), start.class_names[int(target)]) for target in targets]
            values[quantity.name] = np.array(
                [float(not set(pair) & set(labels)) for pair, labels in zip(names, sets, strict=True)]
            )
    return values


def _labels(table: _Table, class_names: Sequence[str]) -> Array:
    """Return the class of each target, which is a number or a name."""
    numbers = {str(number): number for number in range(len(class_names))}
    numbers |= {name: number for number, name in enumerate(class_names)}
    labels: Array = table.column(TARGET).map(numbers).to_numpy(dtype=np.float64)
    table.require(~np.isnan(labels), TARGET, f"one of the labels {listed(class_names)}")
    return labels


def _complete_lines(path: Path) -> bytes:
    """Return the bytes up to the last end of a line.

    Raises:
        UserError: The file does not exist, or has no complete line.
    """
    if not path.is_file():
        raise UserError(f"--arrivals: expected a CSV file, got {shorten_path(repr(str(path)))}, which does not exist")
    content = path.read_bytes()
    content = content[: content.rfind(b"\n") + 1]
    if not content:
        raise UserError(f"--arrivals: {shorten_path(path)}: expected a line with the names of columns, got none")
    return content


def _frame(content: bytes, path: Path) -> pd.DataFrame:
    try:
        return pd.read_csv(io.BytesIO(content), dtype=str, keep_default_na=False, skip_blank_lines=False)
    except (ValueError, pd.errors.ParserError) as error:
        reason = shorten(str(error), 120)
        raise UserError(f"--arrivals: {shorten_path(path)}: expected a CSV file in UTF-8, got: {reason}") from error
