"""The growing CSV file of arrivals: its checks, and what is computed of each row."""

from __future__ import annotations

import hashlib
import io
import re
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from fedekd.data.formats.columns import read_csv
from fedekd.errors import UserError, shorten, shorten_path
from fedekd.monitoring.cells import TARGET, Cells, ClassLabels
from fedekd.monitoring.columns import NOT_FINITE
from fedekd.monitoring.policies import short_hash
from fedekd.monitoring.start import SAMPLE_DIGITS, MonitorStart

Array = npt.NDArray[Any]

_SAMPLE = re.compile(rf"[0-9a-f]{{{SAMPLE_DIGITS},}}")


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
    table = Cells(_frame(content, path), label)
    _check_samples(table, start)
    exits = table.integers("exit", 1, len(start.limits[0]) if start.limits else None)
    values = _labelled(table, start) if start.is_labelled else {}
    for quantity in start.quantities:
        if quantity.kind == "drift":
            values[quantity.name] = table.numbers(quantity.name, finite=False)
    return Arrivals(len(table), len(content), hashlib.sha256(content).hexdigest(), exits.astype(np.int64), values)


def _check_samples(table: Cells, start: MonitorStart) -> None:
    """Check that samples are new, in order, and predicted by the monitored model."""
    cells = table.column("sample").str.lower()
    is_hash = cells.map(lambda cell: _SAMPLE.fullmatch(cell) is not None).to_numpy(dtype=bool)
    table.require(is_hash, "sample", f"at least {SAMPLE_DIGITS} hexadecimal digits")
    samples, model = cells.str[:SAMPLE_DIGITS], short_hash(start.network)
    hint = "Start a new monitor with another --state, or restore the rows"
    is_model = (table.column("model").str.lower() == model).to_numpy()
    table.require(is_model, "model", f"{model!r}, the monitored network", hint)
    hint = "Predict the samples with the policy of the start, or start a new monitor with another --state"
    is_policy = table.column("policy").str.lower().isin(start.policy_hashes).to_numpy()
    table.require(is_policy, "policy", "the hash of the policy of the start", hint)
    hint = "Remove the rows: these samples are not new"
    table.require((~samples.isin(start.used)).to_numpy(), "sample", "no sample of training or calibration", hint)
    repeats = samples.duplicated().to_numpy()
    table.require(~repeats, "sample", "each sample once", "Remove the repeated rows")
    if "time" in table.frame:
        times = _times(table)
        is_later = np.r_[True, times[1:] >= times[:-1]] if len(times) else np.ones(0, bool)
        table.require(is_later, "time", "times that do not decrease", "Append rows in the order of their arrival")


def _times(table: Cells) -> Array:
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


def _labelled(table: Cells, start: MonitorStart) -> dict[str, Array]:
    """Return the values of the quantities that need targets."""
    classes = None if start.task == "regression" else ClassLabels(start.class_names)
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


def _losses(table: Cells, start: MonitorStart, model: str, targets: Array) -> Array:
    """Return 0 or 1, or the squared error; outputs that are not finite are wrong."""
    if start.task == "regression":
        values: Array = np.square(table.numbers(f"value_{model}", finite=False) - targets)
        return values
    labels = table.integers(f"label_{model}", NOT_FINITE, len(start.class_names) - 1)
    losses: Array = (labels != targets).astype(np.float64)
    return losses


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
        return read_csv(io.BytesIO(content), dtype=str, skip_blank_lines=False)
    except ValueError as error:
        reason = shorten(str(error), 120)
        raise UserError(f"--arrivals: {shorten_path(path)}: expected a CSV file in UTF-8, got: {reason}") from error
