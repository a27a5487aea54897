"""Formats of data files and folders: one file and one row of `FORMATS` each."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from fedekd.data.formats.hugging_face import is_hugging_face, read_hugging_face, read_unlabelled_hugging_face
from fedekd.data.formats.image_folder import (
    is_image,
    is_image_folder,
    read_image_folder,
    read_unlabelled_folder,
    read_unlabelled_image,
)
from fedekd.data.formats.manifest import is_manifest, read_manifest, read_unlabelled_manifest
from fedekd.data.formats.npz import read_arrays, read_unlabelled_arrays
from fedekd.data.formats.table import is_table_file, read_table
from fedekd.data.formats.volumes import is_volume, refuse_volume
from fedekd.data.raw import RawSamples, ReadOptions, Unlabelled
from fedekd.errors import UserError, shorten_path


class Format(NamedTuple):
    """One row of `FORMATS`.

    Attributes:
        title: What it is, for error messages; empty for what is refused.
        matches: Whether a path, which may not exist, has this format.
        read: Returns the samples of a file or folder.
        read_unlabelled: Returns the images of a file or folder whose labels may be missing. None: it has no images.
        unlabelled_title: The title for `read_unlabelled`, if it differs.
    """

    title: str
    matches: Callable[[Path], bool]
    read: Callable[[Path, ReadOptions], RawSamples]
    read_unlabelled: Callable[[Path, ReadOptions], Unlabelled] | None = None
    unlabelled_title: str = ""


FORMATS = {
    "npz": Format("an .npz file", lambda path: path.suffix == ".npz", read_arrays, read_unlabelled_arrays),
    "hugging_face": Format(
        "hf:NAME of a Hugging Face dataset", is_hugging_face, read_hugging_face, read_unlabelled_hugging_face
    ),
    "image_folder": Format(
        "a folder with images in a subfolder per class",
        is_image_folder,
        read_image_folder,
        read_unlabelled_folder,
        "a folder of images, with or without subfolders",
    ),
    "manifest": Format("a CSV file with a column path", is_manifest, read_manifest, read_unlabelled_manifest),
    "table": Format("a table in a .csv or .parquet file", is_table_file, read_table),
    "volume": Format("", is_volume, refuse_volume, refuse_volume),
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
        raise _unknown(path, (row.title for row in FORMATS.values()))
    return row.read(path, options)


def read_unlabelled(path: Path, options: ReadOptions) -> Unlabelled:
    """Read one image, or the images of a file or folder in a known format.

    Raises:
        UserError: If its format is unknown, or it is missing, corrupt or not as the options describe.
    """
    if is_image(path):
        return read_unlabelled_image(path, options)
    row = format_of(path)
    if row is None or row.read_unlabelled is None:
        rows = (row for row in FORMATS.values() if row.read_unlabelled is not None)
        raise _unknown(path, (*(row.unlabelled_title or row.title for row in rows), "an image"))
    return row.read_unlabelled(path, options)


def _unknown(path: Path, titles: Iterable[str]) -> UserError:
    known = "; ".join(filter(None, titles))
    found = "" if path.exists() else ", which does not exist"
    return UserError(f"data.dataset: expected {known}, got '{shorten_path(path)}'{found}")
