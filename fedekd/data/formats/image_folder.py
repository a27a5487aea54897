"""Folders of images, with a subfolder per class."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fedekd.data.formats.image_files import SUFFIXES, files_in, find_images, read_images
from fedekd.data.raw import SPLIT_NAMES, RawSamples, ReadOptions, Unlabelled
from fedekd.errors import UserError, listed, shorten, shorten_path

_LAYOUT = "expected images in a subfolder per class, FOLDER/CLASS/*.png or FOLDER/{train,val,test}/CLASS/*.png"


class _File(NamedTuple):
    path: Path
    class_name: str
    split: int  # index into `SPLITS`


def is_image_folder(path: Path) -> bool:
    """Return True for a folder with an image in it or below it."""
    return path.is_dir() and next(find_images(path), None) is not None


def read_image_folder(path: Path, options: ReadOptions) -> RawSamples:
    """Read images in a subfolder per class, and per given split if there are any.

    Images may be in further folders below that of their class. Hidden files are ignored. Classes are named like their
    folders.

    Args:
        path: The folder.
        options: Size, range, limit of memory, and if unreadable images are left out.

    Returns:
        The images in order of split, class and path.

    Raises:
        UserError: If an image is in no folder of a class, cannot be read, or has another size or type than the others.
    """
    folders = [folder for folder in _subfolders(path) if is_image_folder(folder)]
    splits = [SPLIT_NAMES.get(folder.name.lower(), -1) for folder in folders]
    # A class may be called `test`; without a folder of training images these are classes.
    has_splits = 0 in splits and -1 not in splits
    if not has_splits and 0 in splits and {1, 2} & set(splits):
        other = folders[splits.index(-1)].name
        raise UserError(
            f"data.dataset: '{shorten_path(path)}': expected no other folder next to those of the splits, got"
            f" {shorten(repr(other))}. Move it away"
        )
    _require_no_loose_image(path, path)
    if has_splits:
        by_split = sorted(zip(splits, folders, strict=True), key=lambda pair: pair[0])
        files = [file for split, folder in by_split for file in _classes(folder, split, path)]
    else:
        files = list(_classes(path, 0, path))
    names = [str(file.path.relative_to(path)) for file in files]
    images = read_images([str(file.path) for file in files], names, options)
    return RawSamples(
        images.inputs,
        np.asarray([file.class_name for file in files], dtype=object)[images.is_read],
        split=np.asarray([file.split for file in files], np.int8)[images.is_read] if has_splits else None,
        warnings=(*_ignored(path), *images.warnings),
    )


def read_unlabelled_folder(path: Path, options: ReadOptions) -> Unlabelled:
    """Read all images in a folder and below it, whatever their folders.

    Raises:
        UserError: If an image cannot be read, or has another size or type than the others.
    """
    return _read_unlabelled(list(find_images(path)), path, options)


def read_unlabelled_image(path: Path, options: ReadOptions) -> Unlabelled:
    """Read one image.

    Raises:
        UserError: If it cannot be read.
    """
    return _read_unlabelled([path], path.parent, options)


def is_image(path: Path) -> bool:
    """Return True for the file of an image, by its suffix; hidden files are none."""
    return path.is_file() and path.suffix.lower() in SUFFIXES and not path.name.startswith(".")


def _read_unlabelled(files: Sequence[Path], folder: Path, options: ReadOptions) -> Unlabelled:
    names = [str(file.relative_to(folder)) for file in files]
    images = read_images([str(file) for file in files], names, options)
    kept = [name for name, is_read in zip(names, images.is_read.tolist(), strict=True) if is_read]
    return Unlabelled(images.inputs, kept, images.warnings)


def _classes(folder: Path, split: int, root: Path) -> Iterator[_File]:
    """Yield the images of each class in a folder."""
    _require_no_loose_image(folder, root)
    for subfolder in _subfolders(folder):
        for path in find_images(subfolder):
            yield _File(path, subfolder.name, split)


def _require_no_loose_image(folder: Path, root: Path) -> None:
    """Check that no image is directly in a folder of folders of classes.

    Raises:
        UserError: Names the first image.
    """
    loose = [file for file in sorted(folder.iterdir()) if is_image(file)]
    if loose:
        raise UserError(
            f"data.dataset: '{shorten_path(root)}': {_LAYOUT}, got '{shorten(str(loose[0].relative_to(root)))}'"
        )


def _subfolders(folder: Path) -> list[Path]:
    found = [path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")]
    return sorted(found, key=lambda path: path.name)


def _ignored(folder: Path) -> Iterator[str]:
    """Yield a warning if there are files of other types."""
    others = [path for path in files_in(folder) if path.suffix.lower() not in SUFFIXES]
    if others:
        yield (
            f"data.dataset: '{shorten_path(folder)}': {len(others)} files that are no images are ignored, such as"
            f" '{shorten(others[0].name)}'; images are {listed(sorted(SUFFIXES))}"
        )
