"""Reader of the unzipped folder of Tiny ImageNet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from fedekd.data.formats.npz import Splits
from fedekd.errors import UserError, describe_error

NUM_CLASSES = 200
IMAGE_SIZE = 64


def read_tiny_imagenet(folder: Path, num_classes: int = NUM_CLASSES) -> Splits:
    """Read the unzipped folder `tiny-imagenet-200`.

    Classes are numbered in the order of `wnids.txt`. The split `test` is the official validation split: the labels of
    the official test images are not published. Grey images are converted to RGB.

    Args:
        folder: Folder with `wnids.txt`, `train/WNID/images/*.JPEG`, `val/images/*.JPEG` and
            `val/val_annotations.txt`.
        num_classes: Number of classes that `wnids.txt` must list. Default 200.

    Returns:
        `train`, ordered by class and file name, and `test`, in the order of the annotations: uint8 of shape
        (N, 64, 64, 3), and int64 of shape (N,).

    Raises:
        UserError: If a file is missing, corrupt or of another size, or the lists do not match the files.
    """
    wnids = folder / "wnids.txt"
    classes = {wnid: number for number, wnid in enumerate(dict.fromkeys(_lines(wnids)))}
    if len(classes) != num_classes:
        raise _damaged(f"'{wnids}': expected {num_classes} classes, got {len(classes)}")
    # Both lists before any image: a missing file is found at once, not after half a minute of reading.
    train, test = _train_files(folder / "train", classes), _val_files(folder / "val", classes)
    return {"train": _read(train), "test": _read(test)}


def _train_files(folder: Path, classes: dict[str, int]) -> dict[Path, int]:
    """Return the class of each training image."""
    files: dict[Path, int] = {}
    for wnid, number in classes.items():
        images = sorted((folder / wnid / "images").glob("*.JPEG"))
        if not images:
            raise _damaged(f"'{folder / wnid / 'images'}': expected .JPEG files, got none")
        files.update(dict.fromkeys(images, number))
    return files


def _val_files(folder: Path, classes: dict[str, int]) -> dict[Path, int]:
    """Return the class of each validation image; images and lines must match."""
    annotations = folder / "val_annotations.txt"
    present = set((folder / "images").glob("*.JPEG"))
    files: dict[Path, int] = {}
    for line in _lines(annotations):
        image, wnid, *_box = [*line.split(), ""]
        path = folder / "images" / image
        if wnid not in classes:
            raise _damaged(f"'{annotations}': {image!r} has the class {wnid!r}, which is not in wnids.txt")
        if path not in present:
            raise _damaged(f"'{annotations}': lists {image!r}, but the file '{path}' is missing")
        if path in files:
            raise _damaged(f"'{annotations}': lists {image!r} twice")
        files[path] = classes[wnid]
    if unlabelled := present - files.keys():
        raise _damaged(f"'{min(unlabelled)}': expected a line in '{annotations}', got none")
    if not files:
        raise _damaged(f"'{annotations}': the file is empty")
    return files


def _read(files: dict[Path, int]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    # The training images are 1.2 GB; stacking a list of arrays would need twice that.
    pixels = np.empty((len(files), IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    for index, path in enumerate(files):
        pixels[index] = _pixels(path)
    return pixels, np.fromiter(files.values(), np.int64, len(files))


def _pixels(path: Path) -> npt.NDArray[np.uint8]:
    try:
        with Image.open(path, formats=["JPEG"]) as image:
            pixels = np.asarray(image.convert("RGB"))
    except Exception as error:  # Pillow raises various errors for a corrupt file
        raise _damaged(f"'{path}': cannot be read ({describe_error(error)})") from error
    height, width, _ = pixels.shape
    if (height, width) != (IMAGE_SIZE, IMAGE_SIZE):
        raise _damaged(f"'{path}': expected {IMAGE_SIZE}x{IMAGE_SIZE} pixels, got {height}x{width}")
    return pixels


def _lines(path: Path) -> list[str]:
    """Return the non-blank lines of a text file."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise _damaged(f"'{path}': cannot be read ({describe_error(error)})") from error
    return [line.strip() for line in text.splitlines() if line.strip()]


def _damaged(message: str) -> UserError:
    return UserError(f"data.dataset: {message}. Unzip tiny-imagenet-200.zip again.")
