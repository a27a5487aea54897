"""Tiny ImageNet, as it lies after unzipping: a folder of JPEG files a class, and annotated ones for the test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from fedekd.data.npz import Splits, one_line
from fedekd.errors import UserError

NUM_CLASSES = 200
IMAGE_SIZE = 64


def read_tiny_imagenet(folder: Path, num_classes: int = NUM_CLASSES) -> Splits:
    """Read the folder `tiny-imagenet-200` as it lies after unzipping.

    Classes are numbered in the order of `wnids.txt`. The split `test` is the official validation: the labels of the
    official test images were never published, so that folder is not read. Every image becomes RGB; some are grey.

    Args:
        folder: With `wnids.txt`, `train/WNID/images/*.JPEG`, `val/images/*.JPEG` and `val/val_annotations.txt`.
        num_classes: Classes that `wnids.txt` must list.

    Returns:
        `train`, class by class and each by file name, and `test`, in the order of the annotations: uint8 of shape
        (N, 64, 64, 3), and int64 of shape (N,).

    Raises:
        UserError: If a file is missing, damaged or of another size, or the lists do not fit the files; it names the
            file.
    """
    wnids = folder / "wnids.txt"
    classes = {wnid: number for number, wnid in enumerate(dict.fromkeys(_lines(wnids)))}
    if len(classes) != num_classes:
        raise _damaged(f"'{wnids}' must list {num_classes} classes, and lists {len(classes)}")
    # Both lists before any image: what is missing is told at once, not after half a minute of reading.
    train, test = _train_files(folder / "train", classes), _val_files(folder / "val", classes)
    return {"train": _read(train), "test": _read(test)}


def _train_files(folder: Path, classes: dict[str, int]) -> dict[Path, int]:
    """Each image and its class."""
    files: dict[Path, int] = {}
    for wnid, number in classes.items():
        found = sorted((folder / wnid / "images").glob("*.JPEG"))
        if not found:
            raise _damaged(f"'{folder / wnid / 'images'}' is missing or holds no .JPEG file")
        files.update(dict.fromkeys(found, number))
    return files


def _val_files(folder: Path, classes: dict[str, int]) -> dict[Path, int]:
    """Each image and its class; every image has one line, and every line an image."""
    annotations = folder / "val_annotations.txt"
    present = set((folder / "images").glob("*.JPEG"))
    files: dict[Path, int] = {}
    for line in _lines(annotations):
        image, wnid, *_box = [*line.split(), ""]
        path = folder / "images" / image
        if wnid not in classes:
            raise _damaged(f"'{annotations}' gives {image!r} the class {wnid!r}, which is not in wnids.txt")
        if path not in present:
            raise _damaged(f"'{annotations}' names {image!r}, and there is no file '{path}'")
        if path in files:
            raise _damaged(f"'{annotations}' names {image!r} twice")
        files[path] = classes[wnid]
    if unlabelled := present - files.keys():
        raise _damaged(f"'{min(unlabelled)}' has no line in '{annotations}'")
    if not files:
        raise _damaged(f"'{annotations}' is empty")
    return files


def _read(files: dict[Path, int]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    # The training images are 1.2 GB: a list of arrays to be stacked would take that twice.
    pixels = np.empty((len(files), IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    for index, path in enumerate(files):
        pixels[index] = _pixels(path)
    return pixels, np.fromiter(files.values(), np.int64, len(files))


def _pixels(path: Path) -> npt.NDArray[np.uint8]:
    try:
        with Image.open(path, formats=["JPEG"]) as image:
            pixels = np.asarray(image.convert("RGB"))
    except Exception as error:  # what a damaged file makes Pillow raise is anybody's guess
        raise _damaged(f"'{path}' cannot be read ({one_line(error)})") from error
    height, width, _ = pixels.shape
    if (height, width) != (IMAGE_SIZE, IMAGE_SIZE):
        raise _damaged(f"'{path}' is {height}x{width}, and must be {IMAGE_SIZE}x{IMAGE_SIZE}")
    return pixels


def _lines(path: Path) -> list[str]:
    """The lines of a text file that are not blank."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise _damaged(f"'{path}' cannot be read ({one_line(error)})") from error
    return [line.strip() for line in text.splitlines() if line.strip()]


def _damaged(what: str) -> UserError:
    return UserError(f"data.dataset: {what}; unzip tiny-imagenet-200.zip again")
