"""Columns of labels, splits, sites and groups, as manifests and arrays have them."""

from __future__ import annotations

import csv
import warnings
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedekd.data.raw import SPLIT_NAMES, SPLITS, name_of
from fedekd.errors import UserError, listed, nearest, shorten
from fedekd.global_state import exclusive

#: Texts that mean a missing value. UCI's tables have `?`.
MISSING = ("", "?", "NA", "N/A", "n/a", "NaN", "nan", "NULL", "null", "None", "<NA>", "#N/A")

Array = npt.NDArray[Any]


def missing_column(option: str, name: str, present: Iterable[str], where: str, kind: str = "column") -> UserError:
    """Return the error for a column or array that the data do not have.

    Args:
        option: Name of the option, such as `data.site_column`.
        name: The column.
        present: Names of the columns that are there.
        where: Name of the file, for the message.
        kind: `column` (default) or `array`.
    """
    names, article = list(present), "an" if kind == "array" else "a"
    hint = nearest(name, names)
    columns = "" if hint.startswith("Choose") else f" ({kind}s: {listed(names)})"
    return UserError(
        f"{option}: expected {article} {kind} of '{shorten(where)}'{columns}, got {shorten(repr(name))}. {hint}"
    )


def split_numbers(values: Sequence[Any], where: str) -> npt.NDArray[np.int8]:
    """Return the number of each split, index into `SPLITS`, shape (N,).

    Args:
        values: Names as in `SPLIT_NAMES`, in any case, or their numbers.
        where: Name of the file, for error messages.

    Raises:
        UserError: If a value is no name or number of a split.
    """
    known: dict[str, int] = {**SPLIT_NAMES, **{str(number): number for number in range(len(SPLITS))}}
    numbers = [known.get(str(value).strip().lower(), -1) for value in values]
    if -1 in numbers:
        row = numbers.index(-1)
        raise UserError(
            f"data.splits: '{shorten(where)}': expected train, val or test in the column split, got"
            f" {shorten(repr(str(values[row])))} in row {row + 1}"
        )
    return np.asarray(numbers, np.int8)


def targets_of_texts(texts: Sequence[str], where: str, column: str) -> Array:
    """Return targets as numbers if all texts are numbers, else as names of classes.

    Raises:
        UserError: If a text is missing, see `MISSING`.
    """
    stripped = [text.strip() for text in texts]
    require_present([not is_missing(text) for text in stripped], "data.target_column", "a label", where, column)
    numbers = [number_of(text) for text in stripped]
    is_numeric = all(number is not None for number in numbers)
    if not is_numeric:
        return np.asarray(stripped, dtype=object)
    values = np.asarray(numbers, np.float64)
    is_whole = bool((values == np.floor(values)).all()) and bool((np.abs(values) < 2**53).all())
    return values.astype(np.int64) if is_whole else values


def require_present(present: Sequence[bool], option: str, what: str, where: str, column: str) -> None:
    """Check that no value of a column is missing.

    Raises:
        UserError: Names the first row without one.
    """
    if not all(present):
        row = list(present).index(False)
        raise UserError(
            f"{option}: '{shorten(where)}': expected {what} in each row of the column {shorten(repr(column))}, got none"
            f" in row {row + 1} ({list(present).count(False)} in all)"
        )


def is_missing(value: Any) -> bool:
    """Return True for None, NaN and the texts in `MISSING`."""
    return name_of(value) in MISSING


def number_of(value: Any) -> float | None:
    """Return a value as a number; None if it is text or a boolean."""
    if isinstance(value, bool | np.bool_) or (isinstance(value, str) and "_" in value):
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def read_csv(source: Any, **options: Any) -> Any:
    """Read a CSV file in UTF-8 as a data frame.

    Args:
        source: A path or a binary stream.
        **options: Of `pandas.read_csv`.

    Raises:
        ValueError: The file is not a CSV file in UTF-8, or its rows have more cells than the header.
    """
    import pandas as pd

    try:
        with exclusive(), warnings.catch_warnings():  # the filters belong to the process
            warnings.simplefilter("error", pd.errors.ParserWarning)  # pandas leaves out the cells
            return pd.read_csv(source, index_col=False, keep_default_na=False, encoding="utf-8-sig", **options)
    except pd.errors.ParserWarning as error:
        raise ValueError("the rows have more cells than the header has names") from error


def csv_header(path: Path) -> list[str]:
    """Return the names of a CSV file's columns; none if it cannot be read.

    Blank lines before them are skipped, as by pandas.
    """
    with suppress(OSError, ValueError, csv.Error), path.open(encoding="utf-8-sig", newline="") as file:
        rows = ([name.strip() for name in row] for row in csv.reader(file, skipinitialspace=True))
        return next((row for row in rows if row not in ([], [""])), [])
    return []
