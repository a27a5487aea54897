"""Pixels of images: sizes, value ranges and conversion to what networks read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from fedekd.errors import UserError, shorten

CHANNELS = (1, 3, 4)
MIN_SIZE, MAX_SIZE = 8, 16384

#: Images that use less than this share of their value range are reported: scaled to [-1, 1] they are almost constant.
_SMALL_SHARE = 1 / 8

_TO_UINT8 = "Convert images of range 0..1 with np.rint(255.0 * images).astype(np.uint8)."
_SET_RANGE = "Set --data.value_range [LOW, HIGH]"

Array = npt.NDArray[Any]


def size_of(image_size: int | Sequence[int] | None) -> tuple[int, int] | None:
    """Return `data.image_size` as (height, width); None for unchanged sizes.

    Raises:
        UserError: If it is not one or two whole numbers of 8 to 16384.
    """
    if image_size is None:
        return None
    sizes: list[Any] = list(image_size) if isinstance(image_size, list | tuple) else [image_size] * 2
    if len(sizes) != 2 or not all(isinstance(size, int) and MIN_SIZE <= size <= MAX_SIZE for size in sizes):
        raise UserError(
            f"data.image_size: expected one whole number in {MIN_SIZE}..{MAX_SIZE}, or [height, width], got"
            f" {shorten(repr(image_size))}"
        )
    return sizes[0], sizes[1]


def range_of(dtype: np.dtype[Any], value_range: Sequence[float] | None) -> tuple[float, float] | None:
    """Return the lowest and highest value of images of a type; None if unknown.

    Raises:
        UserError: If `data.value_range` is not two finite numbers in ascending order.
    """
    if value_range is not None:
        values = [float(value) for value in value_range]
        if len(values) != 2 or not np.isfinite(values).all() or values[0] >= values[1]:
            raise UserError(
                f"data.value_range: expected two finite numbers, the lower first, got {shorten(repr(value_range))}"
            )
        return values[0], values[1]
    if dtype.kind == "f":
        return 0.0, 1.0
    return (0.0, 65535.0) if dtype == np.uint16 else None


def to_pixels(name: str, images: Array, value_range: Sequence[float] | None = None) -> tuple[Array, list[str]]:
    """Convert the values of images, and report a range that is hardly used.

    Args:
        name: What holds the images, for error messages.
        images: uint8 or bool, or 16-bit, float or other whole numbers in `value_range`; any shape.
        value_range: Lowest and highest value of images that are not uint8. Default: 0 and 1 for float, 0 and 65535 for
            unsigned 16-bit images; the others have none.

    Returns:
        uint8, pixels 0..255, unchanged or of bool; else float32 in [-1, 1]. Warnings, one line each.

    Raises:
        UserError: If the type is another one, or a value is NaN or outside the range.
    """
    bounds = range_of(images.dtype, value_range)
    if images.dtype == np.uint8 or not images.size:
        return images, []
    if images.dtype == bool:
        return images.astype(np.uint8) * np.uint8(255), []
    if images.dtype.kind not in "iuf" or bounds is None:
        hint = f". {_SET_RANGE}" if images.dtype.kind in "iu" else ""
        raise UserError(
            f"data.dataset: images of {name!r}: expected uint8, pixels 0..255, uint16 or float, got"
            f" {images.dtype}{hint}"
        )
    low, high = bounds
    lowest, highest = float(images.min()), float(images.max())
    if not (low <= lowest and highest <= high):
        kind = "a NaN" if lowest != lowest else f"{lowest if lowest < low else highest:g}"
        raise UserError(
            f"data.value_range: images of {name!r}: expected {images.dtype} values in {low:g}..{high:g}, got {kind}."
            f" {'Replace it' if lowest != lowest else _SET_RANGE}"
        )
    warnings = []
    if lowest < highest and highest - lowest < _SMALL_SHARE * (high - low):
        warnings.append(
            f"data.value_range: images of {name!r} use only the values {lowest:g}..{highest:g} of {low:g}..{high:g}."
            f" {_SET_RANGE}"
        )
    # In this order the ends are exactly -1 and 1. In place: a large array is copied once.
    pixels = images.astype(np.float32)
    pixels -= np.float32(low)
    pixels /= np.float32(high) - np.float32(low)
    pixels *= 2
    pixels -= 1
    return pixels, warnings


def widened(images: Array) -> Array:
    """Return uint8 pixels as float32 in [-1, 1], and others unchanged."""
    return images.astype(np.float32) / np.float32(127.5) - np.float32(1) if images.dtype == np.uint8 else images


def resized(image: Array, size: tuple[int, int] | None) -> Array:
    """Resize one image, bilinear and antialiased.

    Args:
        image: Values, shape (H, W, C), of any type that `to_pixels` accepts.
        size: Height and width; None for unchanged.

    Returns:
        Shape (*size, C), of the same type; whole numbers are rounded.
    """
    if size is None or image.shape[:2] == size:
        return image
    if image.dtype == bool:
        image = image.astype(np.uint8) * np.uint8(255)
    height, width = size
    is_byte = image.dtype == np.uint8
    if is_byte and image.shape[2] == 3:
        picture = Image.fromarray(np.ascontiguousarray(image))
        return np.asarray(picture.resize((width, height), Image.Resampling.BILINEAR))
    result = np.empty((height, width, image.shape[2]), image.dtype)
    for channel in range(image.shape[2]):
        plane = np.ascontiguousarray(image[..., channel], None if is_byte else np.float32)
        values = np.asarray(Image.fromarray(plane).resize((width, height), Image.Resampling.BILINEAR))
        result[..., channel] = values if is_byte or image.dtype.kind == "f" else np.rint(values)
    return result


def checked_images(name: str, images: Array) -> Array:
    """Validate the shape of images and return them with shape (N, H, W, C).

    Raises:
        UserError: If the shape is another one, or uint8 pixels are all 0 or 1.
    """
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or (len(images) and images.shape[-1] not in CHANNELS):
        shape = images.shape if images.ndim != 4 or images.shape[-1] != 1 else images.shape[:-1]
        raise UserError(
            f"data.dataset: images of {name!r}: expected shape (N, H, W) or (N, H, W, C) with 1, 3 or 4 channels C, "
            f"got {shape}"
        )
    if not len(images):
        raise UserError(f"data.dataset: {name!r}: expected at least one image, got none")
    height, width = images.shape[1:3]
    if min(height, width) < MIN_SIZE:
        raise UserError(
            f"data.dataset: images of {name!r}: expected at least {MIN_SIZE}x{MIN_SIZE} pixels, got {height}x{width}"
        )
    if images.dtype == np.uint8 and images.max() == 1:
        raise UserError(
            f"data.dataset: images of {name!r}: expected uint8, pixels 0..255, got no pixel above 1. {_TO_UINT8}"
        )
    return images


def byte_warnings(name: str, pixels: Array) -> list[str]:
    """Report uint8 images that use only a small part of 0..255.

    Raises:
        UserError: If all pixels, of any type, are equal.
    """
    lowest, highest = pixels.min(), pixels.max()
    if lowest == highest:
        raise UserError(f"data.dataset: images of {name!r}: expected different pixels, got {lowest} everywhere")
    if pixels.dtype != np.uint8 or int(highest) - int(lowest) >= 256 * _SMALL_SHARE:
        return []
    return [f"data.dataset: images of {name!r} use only the pixel values {lowest}..{highest} of 0..255; rescale them"]
