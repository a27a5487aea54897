"""The growing CSV file of arrivals: its checks, and what is computed of each row."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from fedekd.errors import UserError, listed, shorten, shorten_path
from fedekd.monitoring.columns import MODEL_DIGITS, NOT_FINITE
from fedekd.monitoring.start import SAMPLE_DIGITS, MonitorStart

Array = npt.NDArray[Any]

#: Column of the true labels or values, which `predict` does not write.
TARGET = "target"

_SAMPLE = re.compile(rf"[0-9a-f]{{{SAMPLE_DIGITS},}}")

#: A class number that was written as a floating-point number.
_FLOAT = re.compile(r"([0-9]+)\.0+")


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
            in training or calibration, or was predicted by another model or policy, or the rows are out of order.
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
    exits = table.integers("exit", 1, len(start.limits[0]) if start.limits else None)
    values = _labelled(table, start) if start.is_labelled else {}
    for quantity in start.quantities:
        if quantity.kind == "drift":
            values[quantity.name] = table.numbers(quantity.name, finite=False)
    return Arrivals(len(table), len(content), hashlib.sha256(content).hexdigest(), exits.astype(np.int64), values)


class _Table:
    """Cells of a file, with the line of the file in errors."""

    def __init__(self, frame: pd.DataFrame, label: str) -> None:
        self.frame, self.label = frame, label

    def __len__(self) -> int:
        return len(self.frame)

    def cells(self, name: str) -> pd.Series:
        """Return the cells of a column, which may be empty.

        Raises:
            UserError: It is missing.
        """
        if name not in self.frame:
            remedy = "Append the true labels" if name == TARGET else "Write it with: predict --monitoring true"
            raise UserError(f"{self.label}: expected a column {name!r}, got {listed(self.frame.columns)}. {remedy}")
        return self.frame[name].str.strip()

    def column(self, name: str) -> pd.Series:
        """Return the cells of a column.

        Raises:
            UserError: It is missing, or a cell is empty.
        """
        cells = self.cells(name)
        self.require((cells != "").to_numpy(), name, "a label" if name == TARGET else "a value")
        return cells

    def numbers(self, name: str, finite: bool = True) -> Array:
        """Return the numbers of a column, float64.

        Args:
            name: The column.
            finite: Whether infinity is an error, too.

        Raises:
            UserError: It is missing, or a cell is not a number.
        """
        cells = self.column(name)
        values: Array = pd.to_numeric(cells, errors="coerce").to_numpy(dtype=np.float64)
        self.require(
            np.isfinite(values) if finite else ~np.isnan(values), name, "a finite number" if finite else "a number"
        )
        return values

    def integers(self, name: str, lowest: int, highest: int | None) -> Array:
        """Return the numbers of a column, float64, which are integers in a range.

        Raises:
            UserError: It is missing, or a cell is another value.
        """
        values = self.numbers(name)
        is_allowed = (values >= lowest) & (values == np.floor(values))
        if highest is not None:
            is_allowed &= values <= highest
        self.require(is_allowed, name, f"a number from {lowest}" + ("" if highest is None else f" to {highest}"))
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
    cells = table.column("sample").str.lower()
    is_hash = cells.map(lambda cell: _SAMPLE.fullmatch(cell) is not None).to_numpy(dtype=bool)
    table.require(is_hash, "sample", f"at least {SAMPLE_DIGITS} hexadecimal digits")
    samples, model = cells.str[:SAMPLE_DIGITS], start.network[:MODEL_DIGITS]
    hint = "Start a new monitor with another --state, or restore the rows"
    is_model = (table.column("model").str.lower() == model).to_numpy()
    table.require(is_model, "model", f"{model!r}, the monitored network", hint)
    hint = "Predict the samples with the policy of the start, or start a new monitor with another --state"
    is_policy = table.column("policy").str.lower().isin(start.policy_hashes).to_numpy()
    table.require(is_policy, "policy", "the hash of the policy of the start", hint)
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
            time = datetime.fromisoformat(cell)
            seconds[index] = (time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp()
        except ValueError:
            break
    table.require(~np.isnan(seconds), "time", "numbers, or ISO 8601 in all rows")
    return seconds


def _labelled(table: _Table, start: MonitorStart) -> dict[str, Array]:
    """Return the values of the quantities that need targets."""
    classes = None if start.task == "regression" else _Classes(start.class_names)
    targets = table.numbers(TARGET) if classes is None else classes.numbers_of(table, TARGET)
    values: dict[str, Array] = {}
    for quantity in start.quantities:
        if quantity.kind == "exit":
            labels = table.integers("label", 0, len(start.class_names) - 1)
            values[quantity.name] = (labels != targets).astype(np.float64)
        elif quantity.kind == "do_no_harm":
            federated, local = (_losses(table, start, name, targets) for name in ("federated", "local"))
            with np.errstate(invalid="ignore"):
                difference = federated - local
            # As in the rule: against the federated model, if both outputs are not finite.
            difference[np.isnan(difference)] = start.clip
            values[quantity.name] = np.clip(difference, -start.clip, start.clip) / start.clip
        elif quantity.kind == "coverage" and classes is None:
            lower, upper = (table.numbers(name, finite=False) for name in ("lower", "upper"))
            values[quantity.name] = (~((lower <= targets) & (targets <= upper))).astype(np.float64)
        elif quantity.kind == "coverage" and classes is not None:
            sets = classes.sets_of(table, "set")
            values[quantity.name] = np.array(
                [float(target not in each) for target, each in zip(targets, sets, strict=True)]
            )
    return values


def _losses(table: _Table, start: MonitorStart, model: str, targets: Array) -> Array:
    """Return 0 or 1, or the squared error; outputs that are not finite are wrong."""
    if start.task == "regression":
        values: Array = np.square(table.numbers(f"value_{model}", finite=False) - targets)
        return values
    labels = table.integers(f"label_{model}", NOT_FINITE, len(start.class_names) - 1)
    losses: Array = (labels != targets).astype(np.float64)
    return losses


class _Classes:
    """Numbers of classes by number and name, of targets and of prediction sets."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names
        self.numbers = {str(number): number for number in range(len(names))}
        by_name = {name: number for number, name in enumerate(names)}
        canonical = {_canonical(name): number for name, number in by_name.items()}
        self.ambiguous = {name for name, number in canonical.items() if self.numbers.get(name, number) != number}
        self.labels = self.numbers | by_name

    def numbers_of(self, table: _Table, column: str) -> Array:
        """Return the class of each cell, float64.

        Raises:
            UserError: A cell is neither a number nor a name, or the number of one class and the name of another.
        """
        cells = table.column(column)
        self._require_clear(table, column, [[cell] for cell in cells])
        numbers: Array = cells.map(self._number).to_numpy(dtype=np.float64)
        table.require(~np.isnan(numbers), column, f"one of the labels {listed(self.names)}")
        return numbers

    def sets_of(self, table: _Table, column: str) -> list[set[int | None]]:
        """Return the classes in each cell, which may be empty.

        Raises:
            UserError: Likewise.
        """
        members = [self._members(cell) for cell in table.cells(column)]
        self._require_clear(table, column, members)
        sets = [{self._number(member) for member in each} for each in members]
        is_known = np.array([None not in each for each in sets], dtype=bool)
        table.require(is_known, column, f"numbers separated by spaces, or names by ';', of {listed(self.names)}")
        return sets

    def _members(self, cell: str) -> list[str]:
        if ";" in cell and cell not in self.labels:
            return [name.strip() for name in cell.split(";") if name.strip()]
        if not cell or cell in self.labels:
            return [cell] if cell else []
        # Names may have spaces, so that only numbers are separated by them.
        return [member if _canonical(member) in self.numbers else cell for member in cell.split()]

    def _number(self, cell: str) -> int | None:
        return self.labels.get(cell, self.numbers.get(_canonical(cell)))

    def _require_clear(self, table: _Table, column: str, members: Sequence[Sequence[str]]) -> None:
        is_clear = [all(_canonical(cell) not in self.ambiguous for cell in each) for each in members]
        expected = f"a label of one class, of {listed(self.names)}"
        hint = "It is the number of one class and the name of another. Name the classes otherwise"
        table.require(np.array(is_clear, dtype=bool), column, expected, hint)


def _canonical(cell: str) -> str:
    """Return a class number such as 6.0 without its decimals."""
    match = _FLOAT.fullmatch(cell)
    return match[1] if match else cell


def _complete_lines(path: Path) -> bytes:
    """Return the bytes up to the last end of a line.

    Raises:
        UserError: The file does not exist, or has no complete line.
    """
    if not path.is_file():
        state = "is a folder" if path.is_dir() else "does not exist"
        raise UserError(f"--arrivals: expected a CSV file, got {shorten_path(repr(str(path)))}, which {state}")
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
