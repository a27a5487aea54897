"""Formats of data files and folders: one file and one row of `FORMATS` each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from fedekd.data.formats.npz import pool, read_npz
from fedekd.data.formats.table import is_table_file, read_table
from fedekd.data.raw import RawSamples, ReadOptions
from fedekd.errors import UserError, shorten_path


class Format(NamedTuple):
    """One row of `FORMATS`.

    Attributes:
        title: What it is, for error messages.
        matches: Whether a path, which may not exist, has this format.
        read: Returns the samples of a file or folder.
    """

    title: str
    matches: Callable[[Path], bool]
    read: Callable[[Path, ReadOptions], RawSamples]


def _read_npz(path: Path, options: ReadOptions) -> RawSamples:
    return pool(path.stem, read_npz(path))


FORMATS = {
    "npz": Format("an .npz file in MedMNIST's layout", lambda path: path.suffix == ".npz", _read_npz),
    "table": Format("a table in a .csv or .parquet file", is_table_file, read_table),
}
"""Formats by name; the first that matches a path is used."""


def format_of(path: Path) -> Format | None:
    """Return the format of a path; None if it is of no known format."""
    return next((row for row in FORMATS.values() if row.matches(path)), None)


def read_path(path: Path, options: ReadOptions) -> RawSamples:
    """Read a file or folder in any known format.

    Raises:
        UserError: If its format is unknown, or it is missing, corrupt or not as the options describe.
    """
    row = format_of(path)
    if row is None:
        known = ", ".join(row.title for row in FORMATS.values())
        raise UserError(f"data.dataset: expected {known}, got '{shorten_path(path)}'")
    return row.read(path, options)
