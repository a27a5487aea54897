"""Tables: CSV and Parquet files with a target column and feature columns."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from fedekd.data.columns import Column
from fedekd.data.formats.columns import MISSING, csv_header, number_of, read_csv, split_numbers
from fedekd.data.formats.image_files import SUFFIXES
from fedekd.data.raw import SPLIT_COLUMN, Array, RawSamples, ReadOptions, text_of
from fedekd.errors import UserError, describe_error, listed, nearest, shorten, shorten_path

#: Before pandas 3.1 the default differs from Parquet's numbers in the last bit.
_EXACT_NUMBERS: dict[str, Any] = (
    {"float_precision": "round_trip"} if tuple(map(int, pd.__version__.split(".")[:2])) < (3, 1) else {}
)

#: Larger numbers have no variance in float64.
_LARGEST_NUMBER = 1e100


def is_table_file(path: Path) -> bool:
    """Return True for a Parquet file, and for a CSV file without a column `path`."""
    suffix = path.suffix.lower()
    return suffix == ".parquet" or (suffix == ".csv" and "path" not in csv_header(path))


def read_table(path: Path, options: ReadOptions) -> RawSamples:
    """Read a table.

    Text, booleans and `options.categorical_columns` are categories, all other columns numbers. A column that is site,
    group, split or target, or ignored, is no feature.

    Args:
        path: A .csv or .parquet file with one row per sample.
        options: Names of columns, and declared categories.

    Returns:
        Samples whose inputs are a data frame of float64 columns, NaN where missing, and of columns with texts or None.

    Raises:
        UserError: If the file cannot be read, a column is missing, or a value is invalid.
    """
    frame, where = read_frame(path), _where(path)
    target = options.target_column or "label"
    _require_options(path, frame, options, target)
    split = _split(path.name, frame, options)
    roles = {target, options.site_column, options.group_column, *(options.ignored_columns or ())}
    names = [name for name in frame.columns if name not in roles and (name != SPLIT_COLUMN or split is None)]
    if not names:
        raise UserError(f"{where}: expected at least one feature column, got none")
    features = {name: _feature(where, frame[name], options) for name in names}
    for name, values in features.items():
        texts = [text for text in values if text is not None] if values.dtype == object else []
        if texts and all(Path(text).suffix.lower() in SUFFIXES for text in texts):
            raise UserError(
                f"{where}: column {name!r}: expected features, got names of images. Rename it to path for a list of"
                " images, or leave it out by --data.ignored_columns"
            )
    # pandas would make texts of objects a type of their own.
    features = {name: pd.Series(values, dtype=values.dtype) for name, values in features.items()}
    return RawSamples(
        inputs=pd.DataFrame(features, columns=names),
        targets=_targets(where, frame[target], options.task == "regression"),
        site=_names(where, frame, options.site_column, "a site"),
        group=_names(where, frame, options.group_column, "a group"),
        split=split,
    )


def read_features(path: Path, columns: Sequence[Column]) -> npt.NDArray[np.float64]:
    """Read the feature columns of a table without targets, in any order.

    Args:
        path: A .csv or .parquet file; other columns are ignored.
        columns: The columns of the training data.

    Returns:
        Values as in `Samples.inputs` before preprocessing, shape (N, columns).

    Raises:
        UserError: If the file cannot be read, or a column is missing or has an invalid value.
    """
    frame, where = read_frame(path), _where(path)
    _require_commas(where, frame)
    if missing := [column.name for column in columns if column.name not in frame]:
        raise UserError(
            f"{where}: expected the columns of the training data, got none named {listed(missing)}. The columns of the"
            f" file are {listed(map(str, frame.columns))}"
        )
    values, hint = [], "Correct it, or leave it empty if it is missing"
    for column in columns:
        categories = {column.name: column.categories} if column.kind == "categorical" else None
        part = _feature(where, frame[column.name], ReadOptions(categories=categories), hint)
        if column.kind == "numeric" and part.dtype == object:
            for row, text in enumerate(part):
                if text is not None:
                    raise _text_error(where, column.name, text, row, hint)
            part = np.full(len(part), np.nan)
        values.append(column.code(part) if column.kind == "categorical" else part)
    return np.stack(values, axis=1)


def read_frame(path: Path) -> Any:
    """Read a CSV or Parquet file as a data frame with stripped names of columns.

    Raises:
        UserError: If it is missing, cannot be read, has no rows, or has a column without a name or a name twice.
    """
    where = _where(path)
    if not path.is_file():
        raise UserError(f"{where}: expected a .csv or .parquet file, got no file")
    try:
        frame = _read_parquet(path) if path.suffix.lower() == ".parquet" else _read_csv(path)
    except UserError:
        raise
    except Exception as error:  # pandas and pyarrow raise various errors for a corrupt file
        raise UserError(
            f"{where} cannot be read: {describe_error(error)}. Expected comma-separated text in UTF-8, or Parquet"
        ) from error
    names = [str(name).strip() for name in frame.columns]
    if "" in names:
        raise UserError(
            f"{where}: expected a name for every column, got none for column {names.index('') + 1}. Leave out the index"
            " of a data frame by to_csv(index=False)"
        )
    if repeated := [name for name in names if names.count(name) > 1]:
        raise UserError(f"{where}: expected different names of columns, got {repeated[0]!r} twice")
    if not len(frame):
        raise UserError(f"{where}: expected at least one row, got none")
    return frame.set_axis(names, axis=1)


def _read_csv(path: Path) -> Any:
    header = csv_header(path)
    return read_csv(
        path,
        header=0,
        names=list(range(len(header))),  # pandas accepts no name twice; `read_frame` reports it
        skipinitialspace=True,
        na_values=list(MISSING),
        **_EXACT_NUMBERS,
        low_memory=False,  # one type per column
    ).set_axis(header, axis=1)


def _read_parquet(path: Path) -> Any:
    require_pyarrow(_where(path), "read")
    return pd.read_parquet(path, engine="pyarrow").reset_index(drop=True)


def require_pyarrow(option: str, action: str) -> None:
    """Check that pyarrow is installed.

    Args:
        option: Option or file, for the message.
        action: `read` or `write`.

    Raises:
        UserError: If it is not.
    """
    try:
        import pyarrow  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"{option}: expected the package pyarrow to {action} Parquet, got none. pip install 'fedekd[parquet]'"
        ) from error


def _where(path: Path) -> str:
    return f"data.dataset: '{shorten_path(path)}'"


def _require_options(path: Path, frame: Any, options: ReadOptions, target: str) -> None:
    """Check that all columns that the options name are in the table.

    Raises:
        UserError: Names the first that is not, with the nearest name; or the file has another separator than commas.
    """
    _require_commas(_where(path), frame)
    named: list[tuple[str, Iterable[str]]] = [
        ("target_column", [target]),
        ("site_column", [options.site_column] if options.site_column else []),
        ("group_column", [options.group_column] if options.group_column else []),
        ("categorical_columns", options.categorical_columns or ()),
        ("ignored_columns", options.ignored_columns or ()),
        ("categories", options.categories or ()),
    ]
    for option, names in named:
        for name in names:
            if name not in frame:
                raise UserError(
                    f"data.{option}: expected a column of '{shorten_path(path)}', got {shorten(repr(name))}."
                    f" {nearest(name, frame.columns)}"
                )


def _split(where: str, frame: Any, options: ReadOptions) -> npt.NDArray[np.int8] | None:
    """Return the given split of each row; None if the table has none.

    Raises:
        UserError: If splits are required, and a value is not the name of one.
    """
    if SPLIT_COLUMN not in frame:
        return None
    texts = [text or "" for text in _texts(frame[SPLIT_COLUMN])]
    try:
        return split_numbers(texts, where)
    except UserError:
        if options.splits == "given":
            raise
        return None  # a feature of that name


def _names(where: str, frame: Any, name: str | None, kind: str) -> Array | None:
    """Return a column of names; None if no column is given."""
    if name is None:
        return None
    texts = np.asarray(_texts(frame[name]), dtype=object)
    _require_complete(where, name, [text is None for text in texts], kind)
    return texts


def _targets(where: str, series: Any, is_regression: bool) -> Array:
    """Return targets as numbers, or as texts if they are names of classes.

    Raises:
        UserError: If a target is missing, or text in regression.
    """
    values = _plain(series)
    _require_complete(where, str(series.name), [value is None for value in values], "a target")
    if series.dtype.kind in "biuf":
        return np.asarray(series.to_numpy(dtype=np.float64 if series.dtype.kind == "f" else np.int64))
    numbers = [number_of(value) for value in values]
    if None not in numbers:
        return np.asarray(numbers, dtype=np.float64)
    if is_regression:
        row = numbers.index(None)
        raise _text_error(where, str(series.name), values[row], row, "Correct it, or set --task classification")
    return np.asarray(_texts(series), dtype=object)


def _require_complete(where: str, name: str, missing: Sequence[bool], kind: str) -> None:
    if any(missing):
        raise UserError(
            f"{where}: column {name!r}: expected {kind} in every row, got none in row {list(missing).index(True) + 1}"
            f" ({sum(missing)} rows in all). Fill it in, or leave out the rows"
        )


def _require_commas(where: str, frame: Any) -> None:
    if len(frame.columns) == 1 and {";", "\t"} & set(header := str(frame.columns[0])):
        raise UserError(f"{where}: expected commas between columns, got {shorten(repr(header))}")


def _feature(where: str, series: Any, options: ReadOptions, hint: str = "") -> Array:
    """Return a column as float64 with NaN, or as texts and None.

    Args:
        where: The file, for errors.
        series: The column.
        options: Categories and names of categorical columns.
        hint: What to do about a wrong value. Default: to correct it, or an option of `fit`.

    Raises:
        UserError: If a value is infinite, text among numbers, a date, or an unknown category.
    """
    name, categories = str(series.name), (options.categories or {}).get(series.name)
    if series.dtype.kind in "mM":
        raise UserError(
            f"{where}: column {name!r}: expected numbers, text or booleans, got dates."
            f" {hint or 'Leave it out by --data.ignored_columns'}"
        )
    if categories is not None or series.name in (options.categorical_columns or ()):
        return _categories(where, name, _texts(series), categories, hint or "Correct it or --data.categories")
    if series.dtype.kind == "b" or isinstance(series.dtype, pd.CategoricalDtype):
        return np.asarray(_texts(series), dtype=object)
    if series.dtype.kind in "iuf":
        return _finite(where, name, series.to_numpy(dtype=np.float64, na_value=np.nan))
    values = _plain(series)
    numbers = [math.nan if value is None else number_of(value) for value in values]
    texts = [row for row, number in enumerate(numbers) if number is None]
    if not texts:
        return _finite(where, name, np.asarray(numbers, dtype=np.float64))
    present = sum(value is not None for value in values)
    if len(texts) < present / 2:
        hint = hint or "Correct it, or add the column to --data.categorical_columns"
        raise _text_error(where, name, values[texts[0]], texts[0], hint)
    return np.asarray(_texts(series), dtype=object)


def _categories(where: str, name: str, texts: list[str | None], categories: Iterable[Any] | None, hint: str) -> Array:
    if categories is not None:
        known = [text_of(value) for value in categories]
        if unknown := [row for row, text in enumerate(texts) if text is not None and text not in known]:
            raise UserError(
                f"{where}: column {name!r}: expected one of {listed(known)}, got"
                f" {shorten(repr(texts[unknown[0]]))} in row {unknown[0] + 1}. {hint}"
            )
    return np.asarray(texts, dtype=object)


def _finite(where: str, name: str, values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    if len(wrong := np.flatnonzero(np.abs(values) > _LARGEST_NUMBER)):
        raise UserError(
            f"{where}: column {name!r}: expected finite numbers up to {_LARGEST_NUMBER:g}, got {values[wrong[0]]:g} in"
            f" row {wrong[0] + 1}. Leave it empty if it is missing"
        )
    return values


def _text_error(where: str, name: str, value: Any, row: int, hint: str) -> UserError:
    return UserError(f"{where}: column {name!r}: expected numbers, got {shorten(repr(value))} in row {row + 1}. {hint}")


def _plain(series: Any) -> list[Any]:
    """Return the values of a column, texts stripped, None where missing."""
    values = [value.strip() if isinstance(value, str) else value for value in series.astype(object).tolist()]
    missing = series.isna().tolist()
    return [
        None if gone or (isinstance(value, str) and value in MISSING) else value
        for value, gone in zip(values, missing, strict=True)
    ]


def _texts(series: Any) -> list[str | None]:
    """Return the values of a column as texts, None where missing."""
    return [None if value is None else text_of(value) for value in _plain(series)]
