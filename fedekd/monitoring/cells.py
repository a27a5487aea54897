"""Cells of a file of arrivals, with their line in errors."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from fedekd.errors import UserError, listed, shorten

Array = npt.NDArray[Any]

#: Column of the true labels or values, which `predict` does not write.
TARGET = "target"

#: A class number that was written as a floating-point number.
_FLOAT = re.compile(r"([0-9]+)\.0+")


class Cells:
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


class ClassLabels:
    """Numbers of classes by number and name, of targets and of prediction sets."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names
        self.numbers = {str(number): number for number in range(len(names))}
        by_name = {name: number for number, name in enumerate(names)}
        canonical = {_canonical(name): number for name, number in by_name.items()}
        self.ambiguous = {name for name, number in canonical.items() if self.numbers.get(name, number) != number}
        self.labels = self.numbers | by_name

    def numbers_of(self, table: Cells, column: str) -> Array:
        """Return the class of each cell, float64.

        Raises:
            UserError: A cell is neither a number nor a name, or the number of one class and the name of another.
        """
        cells = table.column(column)
        self._require_clear(table, column, [[cell] for cell in cells])
        numbers: Array = cells.map(self._number).to_numpy(dtype=np.float64)
        table.require(~np.isnan(numbers), column, f"one of the labels {listed(self.names)}")
        return numbers

    def sets_of(self, table: Cells, column: str) -> list[set[int | None]]:
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

    def _require_clear(self, table: Cells, column: str, members: Sequence[Sequence[str]]) -> None:
        is_clear = [all(_canonical(cell) not in self.ambiguous for cell in each) for each in members]
        expected = f"a label of one class, of {listed(self.names)}"
        hint = "It is the number of one class and the name of another. Name the classes otherwise"
        table.require(np.array(is_clear, dtype=bool), column, expected, hint)


def _canonical(cell: str) -> str:
    """Return a class number such as 6.0 without its decimals."""
    match = _FLOAT.fullmatch(cell)
    return match[1] if match else cell
