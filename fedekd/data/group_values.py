"""Values of a column that groups samples, of a run or of new inputs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedekd.data.formats.columns import is_missing
from fedekd.data.formats.manifest import PATH_COLUMN, is_manifest, read_texts
from fedekd.data.formats.npz import read_column
from fedekd.data.formats.table import is_table_file, read_frame
from fedekd.data.raw import name_of
from fedekd.data.samples import Samples
from fedekd.data.sources import load_samples
from fedekd.errors import UserError

Names = npt.NDArray[np.str_]


def group_values(column: str, like: Samples, **source: Any) -> Names:
    """Return the values of a column of the data, which may be a feature, as names.

    Args:
        column: A column of a table or a manifest, an array of an .npz file, or an attribute of a data set.
        like: The samples of the data.
        **source: Arguments of `load_samples` with which they were loaded.

    Returns:
        One name per sample, shape (N,).

    Raises:
        UserError: The data have no such column, a value is missing, or the data have changed.
    """
    source, own = {**source, "group_column": column}, source.get("group_column")
    if like.columns and own not in (None, column):  # the names of patients are no feature
        source["ignored_columns"] = [*(source.get("ignored_columns") or ()), own]
    try:
        samples = load_samples(**source)
    except UserError as error:
        raise UserError(str(error).replace("data.group_column", "groups")) from error
    if samples.group is None or len(samples) != len(like):
        raise UserError(f"groups: expected {len(like)} samples with {column!r}, got {len(samples)}. The data changed")
    names: Names = np.asarray(samples.group_names)[samples.group.numpy()]
    return names


def is_one_to_one(names: Names, labels: npt.NDArray[np.int64]) -> bool:
    """Return True if each value has one label and each label one value.

    Args:
        names: Value of each sample, shape (N,).
        labels: Label of each sample, shape (N,).

    Returns:
        False for a single value.
    """
    pairs = set(zip(names.tolist(), labels.tolist(), strict=True))
    values, classes = (set(column) for column in zip(*pairs, strict=True)) if pairs else (set(), set())
    return 1 < len(pairs) == len(values) == len(classes)


def input_values(path: Path, name: str, files: Sequence[str] | None = None) -> list[str | None] | None:
    """Return the values of a column of new inputs, None where missing.

    Args:
        path: A table, a manifest or an .npz file; other inputs have no columns.
        name: Name of the column.
        files: Images that were read from a manifest. Default: all.

    Returns:
        One value per input; None if the inputs have no such column.
    """
    values: Sequence[Any] | None = None
    if is_table_file(path):
        frame = read_frame(path)
        values = frame[name].astype(object).tolist() if name in frame else None
    elif is_manifest(path):
        table = read_texts(path)
        if name in table:
            read = None if files is None else set(files)
            pairs = zip(table[PATH_COLUMN], table[name], strict=True)
            values = [value for file, value in pairs if read is None or file.strip() in read]
    elif path.suffix == ".npz":
        values = read_column(path, name)
    return None if values is None else [None if is_missing(value) else name_of(value) for value in values]
