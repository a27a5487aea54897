"""Manifests: CSV files with the path and the label of each image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from fedekd.data.formats.columns import (
    csv_header,
    is_missing,
    missing_column,
    read_csv,
    require_present,
    split_numbers,
    targets_of_texts,
)
from fedekd.data.formats.image_files import read_images
from fedekd.data.raw import SPLIT_COLUMN, RawSamples, ReadOptions, Unlabelled
from fedekd.errors import UserError, describe_error, shorten_path

PATH_COLUMN, LABEL_COLUMN = "path", "label"


def is_manifest(path: Path) -> bool:
    """Return True for a CSV file with a column `path`; one without it is a table."""
    return path.suffix.lower() == ".csv" and PATH_COLUMN in csv_header(path)


def read_manifest(path: Path, options: ReadOptions) -> RawSamples:
    """Read the images of a CSV file with the columns `path` and `label`.

    Paths are absolute, or relative to the folder of the file. The column of labels is `data.target_column`. There may
    be a column `split` with train, val and test, and columns of sites and groups.

    Args:
        path: The CSV file.
        options: Columns, size, range, limit of memory, and if unreadable images are left out.

    Returns:
        The images in the order of the rows.

    Raises:
        UserError: If a column, a value or an image is missing, a split has another name, or images do not fit.
    """
    table = read_texts(path)
    label = options.target_column or LABEL_COLUMN
    if label not in table:
        raise missing_column("data.target_column", label, table, path.name)
    extra: dict[str, Any] = {}
    columns = {"site": options.site_column, "group": options.group_column}
    for field, column in columns.items():
        if column is None or (field == "site" and column == SPLIT_COLUMN):
            continue
        if column not in table:
            raise missing_column(f"data.{field}_column", column, table, path.name)
        values = [text.strip() for text in table[column]]
        require_present(
            [not is_missing(text) for text in values], f"data.{field}_column", f"a {field}", path.name, column
        )
        extra[field] = np.asarray(values, dtype=object)
    if SPLIT_COLUMN in table:
        extra["split"] = split_numbers(table[SPLIT_COLUMN], path.name)
    targets = targets_of_texts(table[label], path.name, label)
    _, images = _images(path, table, options)
    extra = {field: values[images.is_read] for field, values in extra.items()}
    return RawSamples(images.inputs, targets[images.is_read], warnings=images.warnings, **extra)


def read_unlabelled_manifest(path: Path, options: ReadOptions) -> Unlabelled:
    """Read the images of a CSV file with the column `path`; labels are ignored.

    Raises:
        UserError: As `read_manifest`.
    """
    names, images = _images(path, read_texts(path), options)
    kept = [name for name, is_read in zip(names, images.is_read.tolist(), strict=True) if is_read]
    return Unlabelled(images.inputs, kept, images.warnings)


def _images(path: Path, table: dict[str, list[str]], options: ReadOptions) -> tuple[list[str], Any]:
    names = [name.strip() for name in table[PATH_COLUMN]]
    require_present([bool(name) for name in names], "data.dataset", "a path", path.name, PATH_COLUMN)
    files = [str(path.parent / name) for name in names]
    if not options.skip_unreadable:
        for row, file in enumerate(files):
            if not Path(file).is_file():
                raise UserError(
                    f"data.dataset: '{path.name}': expected existing files in the column {PATH_COLUMN}, got"
                    f" '{shorten_path(names[row])}' in row {row + 1}. Paths are relative to the folder of the manifest"
                )
    return names, read_images(files, names, options)


def read_texts(path: Path) -> dict[str, list[str]]:
    """Return the texts of each column.

    Raises:
        UserError: The file cannot be read, or has no rows.
    """
    try:
        table = read_csv(path, dtype=str)  # as text: 007 may be a patient
    except Exception as error:  # ragged rows, another encoding
        raise UserError(
            f"data.dataset: '{shorten_path(path)}' cannot be read as CSV ({describe_error(error, 120)})"
        ) from error
    if not len(table):
        raise UserError(f"data.dataset: '{shorten_path(path)}': expected at least one row, got none")
    return {str(name).strip(): table[name].tolist() for name in table.columns}
