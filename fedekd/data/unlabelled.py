"""Images without labels, for prediction."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedekd.data.formats import read_unlabelled
from fedekd.data.formats.image_files import ImageFiles, in_parallel, with_channels
from fedekd.data.pixels import checked_images, to_pixels
from fedekd.data.raw import ReadOptions


@dataclass(frozen=True, eq=False)
class UnlabelledImages:
    """N images without labels.

    Args:
        inputs: An array, uint8 or float32 in [-1, 1], shape (N, H, W, C), or `ImageFiles`.
        names: Name of the file of each image; None where there are no files.
        warnings: What a user should know of the images; one line each.
    """

    inputs: Any
    names: list[str] | None = None
    warnings: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.inputs)

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        _, height, width, channels = self.inputs.shape
        return channels, height, width

    def batches(self, size: int) -> Iterator[Tensor]:
        """Yield batches of images, shape (n, C, H, W), n at most `size`, in order."""
        for start in range(0, len(self), size):
            images = self._images(start, min(start + size, len(self)))
            yield torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))

    def _images(self, start: int, stop: int) -> npt.NDArray[Any]:
        if isinstance(self.inputs, ImageFiles):
            return np.stack(in_parallel(lambda index: self.inputs[start + index], stop - start))
        return np.asarray(self.inputs[start:stop])


def read_images(path: Path, options: ReadOptions | None = None, channels: int | None = None) -> UnlabelledImages:
    """Read the images of a file or folder in any format that has images.

    Args:
        path: A folder of images, a manifest whose labels may be missing, an .npz file with the array `images` or those
            of splits, or `hf:NAME`. Labels are ignored.
        options: Size, range, limit of memory, and if unreadable images are left out. Default: `ReadOptions()`.
        channels: 3 to repeat grey images in three channels. Default: unchanged.

    Raises:
        UserError: If the file is missing, corrupt, or has no images of one shape.
    """
    options = options or ReadOptions()
    found = read_unlabelled(path, options)
    inputs = found.inputs
    warnings = list(found.warnings)
    if not isinstance(inputs, ImageFiles):
        inputs, lines = to_pixels(path.name, checked_images(path.name, inputs), options.value_range)
        warnings += lines
    if channels == 3 and inputs.shape[-1] == 1:
        inputs = with_channels(inputs, channels)
    return UnlabelledImages(inputs, found.names, tuple(warnings))
