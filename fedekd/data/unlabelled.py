"""Images without labels, for prediction."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fedekd.data.pixels import checked_images, to_pixels
from fedekd.data.raw import SPLITS
from fedekd.errors import UserError, describe_error

_IMAGES, _SPLIT_IMAGES = "images", tuple(f"{split}_images" for split in SPLITS)


def read_images(path: Path) -> Tensor:
    """Read the images of an .npz file.

    Args:
        path: The file, with the array `images` or, in MedMNIST's layout, `{train,val,test}_images`, which are
            concatenated. Arrays are uint8, uint16 or float, shape (N, H, W) or (N, H, W, C). Labels are ignored.

    Returns:
        Pixels 0..255, uint8, or in [-1, 1], float32, shape (N, C, H, W).

    Raises:
        UserError: If the file is missing, corrupt, or has no images of one shape.
    """
    if not path.is_file():
        raise UserError(f"file '{path}' not found")
    try:
        with np.load(path, allow_pickle=False) as file:
            names = [_IMAGES] if _IMAGES in file else [name for name in _SPLIT_IMAGES if name in file]
            arrays = [np.asarray(file[name]) for name in names]
    except Exception as error:  # zipfile, zlib and numpy raise various errors for a corrupt archive
        raise UserError(
            f"'{path}' cannot be read ({describe_error(error)}); expected an .npz file of plain arrays"
        ) from error
    if not arrays:
        raise UserError(f"'{path}': expected an array {_IMAGES} or any of {', '.join(_SPLIT_IMAGES)}, got none")
    if not any(array.size for array in arrays):
        raise UserError(f"'{path}': expected at least one image, got none")
    pixels = [to_pixels(path.name, checked_images(path.name, array))[0] for array in arrays if array.size]
    if len({part.shape[1:] for part in pixels}) > 1:
        raise UserError(f"'{path}': expected splits of one image shape, got {', '.join(str(p.shape) for p in pixels)}")
    return torch.from_numpy(np.ascontiguousarray(np.concatenate(pixels).transpose(0, 3, 1, 2)))
