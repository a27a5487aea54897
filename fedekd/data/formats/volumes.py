"""Volumes, which are not supported: one clear line."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

from fedekd.data.formats.image_files import SUFFIXES, files_in
from fedekd.data.raw import ReadOptions
from fedekd.errors import UserError, shorten_path

_SUFFIXES = (".nii", ".nii.gz", ".dcm", ".dicom", ".mha", ".mhd", ".nrrd", ".nhdr")


def is_volume(path: Path) -> bool:
    """Return True for a file of a volume, or a folder with such files and no images."""
    if not path.is_dir():
        return _has_suffix(path)
    has_volume = False
    for file in files_in(path):
        if file.suffix.lower() in SUFFIXES:
            return False
        has_volume = has_volume or _has_suffix(file)
    return has_volume


def refuse_volume(path: Path, options: ReadOptions) -> NoReturn:
    """Refuse volumes.

    Raises:
        UserError: Always.
    """
    found = path if not path.is_dir() else next(file for file in files_in(path) if _has_suffix(file))
    raise UserError(
        f"data.dataset: expected 2D images, got the volume '{shorten_path(found)}'; volumes (NIfTI, DICOM, MetaImage,"
        " NRRD) are not supported. Write 2D slices as PNG or TIFF files in a folder per class, or as an .npz file"
    )


def _has_suffix(path: Path) -> bool:
    return path.name.lower().endswith(_SUFFIXES)
