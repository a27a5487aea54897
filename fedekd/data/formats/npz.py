"""MedMNIST's .npz layout: arrays of images and labels for each of three splits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedekd.data.raw import SPLITS, RawSamples
from fedekd.errors import UserError, describe_error

Splits = dict[str, tuple[npt.NDArray[Any], npt.NDArray[Any]]]
"""(images, labels) of each official split."""


def read_npz(path: Path) -> Splits:
    """Read an .npz file in MedMNIST's layout.

    Args:
        path: The file, with arrays `{train,val,test}_{images,labels}`. Some splits may be missing or empty.

    Returns:
        Images and labels of each split in the file.

    Raises:
        UserError: If the file is missing, corrupt, or has another layout.
    """
    if not path.is_file():
        raise UserError(f"data.dataset: file '{path}' not found; expected an .npz file in MedMNIST's layout")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: np.asarray(file[key]) for split in SPLITS for key in _keys(split) if key in file}
    except Exception as error:  # zipfile, zlib and numpy raise various errors for a corrupt archive
        raise UserError(
            f"data.dataset: '{path}' cannot be read ({describe_error(error)}): truncated, corrupt or not an .npz file"
            " of plain arrays. Replace the file."
        ) from error
    splits: Splits = {}
    for split in SPLITS:
        present = [key for key in _keys(split) if key in arrays]
        if len(present) == 1:
            missing = next(key for key in _keys(split) if key not in arrays)
            raise UserError(
                f"data.dataset: '{path}': expected both arrays of a split, got '{present[0]}' without '{missing}'"
            )
        if present:
            images, labels = (np.atleast_1d(arrays[key]) for key in _keys(split))
            splits[split] = images, labels
    if not any(len(array) for pair in splits.values() for array in pair):
        raise UserError(
            f"data.dataset: '{path}': expected train_images and train_labels, and optionally those of val and test, "
            "got no samples"
        )
    return splits


def pool(name: str, splits: Splits) -> RawSamples:
    """Concatenate the splits.

    Args:
        name: Name of the data set, for error messages.
        splits: Images and labels of each split. Empty splits may have any shape; a single split is not copied.

    Raises:
        UserError: If the shapes of two splits differ, or the numbers of images and labels of a split differ.
    """
    for split, (images, labels) in splits.items():
        if len(images) != len(labels):
            raise UserError(
                f"data.dataset: {name!r}: expected one label per image, got {len(images)} {split} images and "
                f"{len(labels)} {split} labels"
            )
    filled = {split: splits[split] for split in SPLITS if split in splits and len(splits[split][0])}
    images, labels = (_joined(name, list(parts)) for parts in zip(*filled.values(), strict=True))
    given = [np.full(len(pair[1]), SPLITS.index(split), np.int8) for split, pair in filled.items()]
    return RawSamples(images, labels, split=np.concatenate(given))


def _joined(name: str, parts: list[npt.NDArray[Any]]) -> npt.NDArray[Any]:
    for part in parts[1:]:
        if part.shape[1:] != parts[0].shape[1:]:
            raise UserError(
                f"data.dataset: {name!r}: expected splits of one shape per sample, got {parts[0].shape[1:]} and "
                f"{part.shape[1:]}"
            )
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _keys(split: str) -> tuple[str, str]:
    return f"{split}_images", f"{split}_labels"
