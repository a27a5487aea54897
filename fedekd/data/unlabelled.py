"""Images without labels, for a trained network to classify."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fedekd.data.images import checked_images
from fedekd.data.npz import SPLITS, one_line
from fedekd.errors import UserError

#: Where images are looked for in a file; of the splits of MedMNIST's layout all that are there are joined, in order.
_ALONE, _OF_SPLITS = "images", tuple(f"{split}_images" for split in SPLITS)


def read_images(path: Path) -> Tensor:
    """The images of an .npz file: its array `images`, or those of MedMNIST's splits, one after the other.

    Args:
        path: The file; arrays are uint8, (N, H, W) or (N, H, W, C). Labels in it are not looked at.

    Returns:
        Pixels 0..255, uint8, shape (N, C, H, W).

    Raises:
        UserError: If there is no such file, or it holds something else.
    """
    if not path.is_file():
        raise UserError(f"no such file '{path}'")
    try:
        with np.load(path, allow_pickle=False) as file:
            names = [_ALONE] if _ALONE in file else [name for name in _OF_SPLITS if name in file]
            arrays = [np.asarray(file[name]) for name in names]
    except Exception as error:  # what a damaged archive makes zipfile, zlib or numpy raise is anybody's guess
        raise UserError(
            f"'{path}' cannot be read ({one_line(error)}); an .npz file of plain arrays is needed"
        ) from error
    if not arrays:
        raise UserError(f"'{path}' has no array {_ALONE}, nor any of {', '.join(_OF_SPLITS)}")
    if not any(array.size for array in arrays):
        raise UserError(f"'{path}' holds no images; at least one is needed")
    pixels = [checked_images(path.name, array) for array in arrays if array.size]
    if len({part.shape[1:] for part in pixels}) > 1:
        raise UserError(f"'{path}' has splits whose images differ in shape: {', '.join(str(p.shape) for p in pixels)}")
    return torch.from_numpy(np.ascontiguousarray(np.concatenate(pixels).transpose(0, 3, 1, 2)))
