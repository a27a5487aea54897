"""MedMNIST's .npz layout: a pair of arrays, images and labels, for each of three splits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedekd.errors import UserError

Splits = dict[str, tuple[npt.NDArray[Any], npt.NDArray[Any]]]
"""(images, labels) of each official split."""

SPLITS = ("train", "val", "test")
"""The order in which splits are pooled."""


def read_npz(path: Path) -> Splits:
    """Read an .npz file in MedMNIST's layout; splits may be missing or empty, not all of them.

    Raises:
        UserError: If the file is missing, damaged, or laid out otherwise.
    """
    if not path.is_file():
        raise UserError(f"data.dataset: no such file '{path}'; give an .npz file in MedMNIST's layout")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: np.asarray(file[key]) for split in SPLITS for key in _keys(split) if key in file}
    except Exception as error:  # what a damaged archive makes zipfile, zlib or numpy raise is anybody's guess
        raise UserError(
            f"data.dataset: '{path}' cannot be read ({one_line(error)}); it is cut short, altered or no .npz "
            "file of plain arrays: replace it"
        ) from error
    splits: Splits = {}
    for split in SPLITS:
        present = [key for key in _keys(split) if key in arrays]
        if len(present) == 1:
            missing = next(key for key in _keys(split) if key not in arrays)
            raise UserError(f"data.dataset: '{path}' has '{present[0]}' but no '{missing}'; a split needs both")
        if present:
            images, labels = (np.atleast_1d(arrays[key]) for key in _keys(split))
            splits[split] = images, labels
    if not any(len(array) for pair in splits.values() for array in pair):
        raise UserError(
            f"data.dataset: '{path}' holds no samples; needed: train_images and train_labels, and where "
            "there are any, those of val and test"
        )
    return splits


def pool(name: str, splits: Splits) -> tuple[npt.NDArray[Any], npt.NDArray[Any], dict[str, int]]:
    """All images and all labels end to end, and the size of each split.

    An empty split may have any shape; a split that is alone is not copied.

    Raises:
        UserError: If samples of two splits differ in shape, or an image has no label of its own.
    """
    for split, (images, labels) in splits.items():
        if len(images) != len(labels):
            raise UserError(
                f"data.dataset: {name!r} has {len(images)} {split} images but {len(labels)} {split} labels; "
                "each image needs one label"
            )
    filled = [splits[split] for split in SPLITS if split in splits and len(splits[split][0])]
    images, labels = (_joined(name, list(parts)) for parts in zip(*filled, strict=True))
    return images, labels, {split: len(splits[split][0]) if split in splits else 0 for split in SPLITS}


def one_line(error: BaseException) -> str:
    """The kind and text of an exception as one line of moderate length."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:160]}" if text else type(error).__name__


def _joined(name: str, parts: list[npt.NDArray[Any]]) -> npt.NDArray[Any]:
    for part in parts[1:]:
        if part.shape[1:] != parts[0].shape[1:]:
            raise UserError(
                f"data.dataset: the splits of {name!r} differ, {part.shape[1:]} a sample against "
                f"{parts[0].shape[1:]}; all need the same shape"
            )
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _keys(split: str) -> tuple[str, str]:
    return f"{split}_images", f"{split}_labels"
