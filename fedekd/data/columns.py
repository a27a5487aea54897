"""Columns of a table: kinds and categories that all sites have in common."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from fedekd.data.raw import Array, RawSamples, ReadOptions, sorted_texts, text_of
from fedekd.errors import UserError, listed, shorten

#: Categories of one column. A column with more is usually an identifier, a date or free text.
MAX_CATEGORIES = 1000

#: A text column with more categories than this, and than half of its rows, is reported.
_FEW_CATEGORIES = 20


@dataclass(frozen=True)
class Column:
    """A feature column of a table.

    Attributes:
        name: Name in the table.
        kind: `numeric`, or `categorical`, whose values are indices into `categories`.
        categories: Names of the categories; empty for a numeric column.
    """

    name: str
    kind: Literal["numeric", "categorical"]
    categories: tuple[str, ...] = ()

    def code(self, texts: Array) -> npt.NDArray[np.float64]:
        """Return the index of each category, shape (N,); NaN where it is missing.

        Raises:
            KeyError: If a text is not one of the categories.
        """
        codes = {text: float(index) for index, text in enumerate(self.categories)} | {None: np.nan}
        return np.asarray([codes[text] for text in texts.tolist()], dtype=np.float64)


def join_tables(
    sources: Mapping[str | None, RawSamples], options: ReadOptions
) -> tuple[npt.NDArray[np.float64], tuple[Column, ...], tuple[str, ...]]:
    """Join the tables of all sources.

    Args:
        sources: Samples whose inputs are data frames: numeric columns are float64, categorical ones texts or None.
        options: Declared categories.

    Returns:
        Values, shape (N, columns), with indices of categories and NaN for missing values; the columns; and warnings.

    Raises:
        UserError: If a source has other columns, another order or another kind of column, or a column has too many
            categories.
    """
    frames = {site: part.inputs for site, part in sources.items()}
    first = next(iter(frames))
    names = list(frames[first].columns)
    for site, frame in frames.items():
        _require_columns(str(site), list(frame.columns), str(first), names)
    values, columns, warnings = [], [], []
    for name in names:
        parts = {site: frame[name].to_numpy() for site, frame in frames.items()}
        column = _column(name, parts, options)
        columns.append(column)
        warnings += _identifier_warning(column, parts, options)
        joined = [column.code(part) if column.kind == "categorical" else part for part in _texts(parts, column)]
        values.append(np.concatenate(joined).astype(np.float64))
    return np.stack(values, axis=1), tuple(columns), tuple(warnings)


def _texts(parts: Mapping[str | None, Array], column: Column) -> list[Array]:
    """Return the values of each source; numbers of an empty column become None."""
    if column.kind == "numeric":
        return list(parts.values())
    return [part if part.dtype == object else np.full(len(part), None, object) for part in parts.values()]


def _column(name: str, parts: Mapping[str | None, Array], options: ReadOptions) -> Column:
    """Determine kind and categories of a column.

    Raises:
        UserError: If it is numeric at one site and text at another, or has too many categories.
    """
    texts = {site: part for site, part in parts.items() if part.dtype == object}
    numeric = [site for site, part in parts.items() if part.dtype != object and not np.isnan(part).all()]
    declared = (options.categories or {}).get(name)
    if not texts and declared is None:
        return Column(name, "numeric")
    if texts and numeric:
        site, part = next(iter(texts.items()))
        row = next((row for row, text in enumerate(part.tolist()) if text is not None), 0)
        raise UserError(
            f"data.sites: site {site!r}: column {name!r}: expected numbers, as at site {numeric[0]!r}, got"
            f" {shorten(repr(part[row]))} in row {row + 1}. Correct it, or add the column to"
            " --data.categorical_columns"
        )
    if declared is not None:
        return Column(name, "categorical", tuple(text_of(value) for value in declared))
    present = {text for part in texts.values() for text in part.tolist() if text is not None}
    if len(present) > MAX_CATEGORIES:
        raise UserError(
            f"data.categorical_columns: column {name!r}: expected at most {MAX_CATEGORIES:,} categories, got"
            f" {len(present):,}. Leave it out by --data.ignored_columns"
        )
    return Column(name, "categorical", tuple(sorted_texts(present)))


def _identifier_warning(column: Column, parts: Mapping[str | None, Array], options: ReadOptions) -> list[str]:
    rows, count = sum(map(len, parts.values())), len(column.categories)
    if column.name in (options.categories or {}) or count <= max(_FEW_CATEGORIES, rows / 2):
        return []
    return [
        f"data.dataset: column {column.name!r} has {count} categories in {rows} rows; leave out an identifier by"
        " --data.ignored_columns"
    ]


def _require_columns(site: str, names: list[str], first: str, expected: list[str]) -> None:
    """Check that a site has the columns of the first one, in the same order.

    Raises:
        UserError: Names the site and the columns.
    """
    if names == expected:
        return
    missing = [name for name in expected if name not in names]
    added = [name for name in names if name not in expected]
    if missing or added:
        parts = [f"without {listed(missing)}"] * bool(missing) + [f"with {listed(added)} in addition"] * bool(added)
        raise UserError(
            f"data.sites: site {site!r}: expected the columns of site {first!r}, got columns {' and '.join(parts)}"
        )
    place = next(index for index, pair in enumerate(zip(names, expected, strict=True)) if pair[0] != pair[1])
    raise UserError(
        f"data.sites: site {site!r}: expected the columns in the order of site {first!r}, {expected[place]!r} as"
        f" feature {place + 1}, got {names[place]!r}. Reorder the columns"
    )


def is_table(sources: Mapping[str | None, RawSamples]) -> bool:
    """Return True if all sources are tables.

    Raises:
        UserError: If some are and some are not.
    """
    kinds: dict[bool, Any] = {hasattr(part.inputs, "columns"): site for site, part in sources.items()}
    if len(kinds) > 1:
        raise UserError(
            f"data.sites: expected tables or images at all sites, got a table at {kinds[True]!r} and images at"
            f" {kinds[False]!r}"
        )
    return True in kinds
