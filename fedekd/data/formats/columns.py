"""Columns of labels, splits, sites and groups, as manifests and arrays have them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fedekd.data.raw import SPLIT_NAMES, SPLITS
from fedekd.errors import UserError, listed, nearest, shorten

_MISSING = frozenset({"nan", "na", "n/a", "null", "none", "<na>"})

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
        UserError: If a text is empty, or `NaN` or the like among numbers.
    """
    stripped = [text.strip() for text in texts]
    numbers = [_number(text) for text in stripped]
    is_numeric = all(
        number is not None or not text or text.lower() in _MISSING
        for number, text in zip(numbers, stripped, strict=True)
    ) and any(number is not None for number in numbers)
    present = [number is not None for number in numbers] if is_numeric else [bool(text) for text in stripped]
    require_present(present, "data.target_column", "a label", where, column)
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


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if np.isfinite(value) else None
