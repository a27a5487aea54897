"""Join the images of all sources, in memory or where they are stored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fedekd.data.formats.image_files import ImageFiles, channels_last_view, fits_in_memory, with_channels
from fedekd.data.pixels import byte_warnings, checked_images, to_pixels, widened
from fedekd.data.raw import ReadOptions
from fedekd.data.stored import StoredInputs, join_inputs
from fedekd.errors import UserError


class JoinedImages(NamedTuple):
    """Images of all sources.

    Attributes:
        inputs: An array, shape (N, H, W) or (N, H, W, C), or `StoredInputs`.
        value_range: Lowest and highest value; see `to_pixels`.
        warnings: What a user should know of the values; one line each.
    """

    inputs: Any
    value_range: Sequence[float] | None
    warnings: tuple[str, ...]


def join_images(sources: Mapping[str | None, Any], options: ReadOptions) -> JoinedImages:
    """Join the images of all sources.

    Grey images are repeated in three channels if other sources have colour images. Files are read if the images of all
    sources are below the limit of memory.

    Args:
        sources: Images by name of the site: arrays, `ImageFiles` or `StoredInputs`; None is a source that is not one
            site.
        options: Range and limit of memory.

    Raises:
        UserError: If sizes differ, a file cannot be read, or values are invalid.
    """
    parts = dict(sources)
    if len(parts) == 1 and isinstance(only := next(iter(parts.values())), np.ndarray):
        return JoinedImages(only, options.value_range, ())
    if any(isinstance(part, StoredInputs) for part in parts.values()):
        return _stored(parts, options)
    parts = {site: part[..., None] if len(part.shape) == 3 else part for site, part in parts.items()}
    if {part.shape[-1] for part in parts.values() if len(part.shape) == 4} == {1, 3}:
        parts = {site: with_channels(part, 3) for site, part in parts.items()}
    _require_one_shape(parts)
    # A file or folder that is one source was read already if it fits.
    fits = None not in parts and fits_in_memory(sum(part.nbytes for part in parts.values()), options)
    if fits or not any(isinstance(part, ImageFiles) for part in parts.values()):
        return _resident(parts, options)
    return _stored(parts, options)


def _stored(parts: Mapping[str | None, Any], options: ReadOptions) -> JoinedImages:
    """Join images of which some are stored; arrays are scaled as stored ones are."""
    warnings: list[str] = []
    images: list[Any] = []
    for site, part in parts.items():
        if isinstance(part, np.ndarray):
            part, lines = to_pixels(str(site), checked_images(str(site), part), options.value_range)
            warnings += lines
        images.append(part)
    titles = ["data.dataset" if site is None else f"site {site!r}" for site in parts]
    return JoinedImages(join_inputs(images, titles), options.value_range, tuple(warnings))


def _resident(parts: Mapping[str | None, Any], options: ReadOptions) -> JoinedImages:
    """Copy or read images into one array, without a second copy of all."""
    kinds = {np.dtype(part.kind) if isinstance(part, ImageFiles) else part.dtype for part in parts.values()}
    is_mixed = len(kinds) > 1
    shape = next(iter(parts.values())).shape[1:]
    result = channels_last_view(
        (sum(len(part) for part in parts.values()), *shape), np.float32 if is_mixed else kinds.pop()
    )
    start = 0
    warnings: list[str] = []
    for site, part in parts.items():
        rows = result[start : start + len(part)]
        start += len(part)
        values = part
        if isinstance(part, ImageFiles):
            values = _loaded(site, part, None if is_mixed else rows)
        elif not is_mixed:
            rows[:] = part
        if len(parts) > 1:  # a site may have another range than the rest
            values = checked_images(str(site), values)
            warnings += byte_warnings(str(site), values)
        if is_mixed:  # values of different types mean the same only after conversion
            pixels, lines = to_pixels(str(site), values, options.value_range)
            rows[:] = widened(pixels)
            warnings += lines
    # If all images together have a small range, they are reported once, by the caller.
    if not is_mixed and len(warnings) == len(parts) > 1 and byte_warnings("", result):
        warnings = []
    return JoinedImages(result, (-1.0, 1.0) if is_mixed else options.value_range, tuple(warnings))


def _loaded(site: str | None, files: ImageFiles, out: Any = None) -> Any:
    try:
        return files.load(out=out)[0]
    except UserError as error:
        raise UserError(f"site {site!r}: {error}") from error


def _require_one_shape(parts: Mapping[str | None, Any]) -> None:
    names, first = list(parts), next(iter(parts.values()))
    for site, part in parts.items():
        if part.shape[1:] != first.shape[1:]:
            raise UserError(
                f"data.sites: expected images of one size, {_size(first)} as in {names[0]!r}, got"
                f" {_size(part)} in {site!r}. Set --data.image_size"
            )


def _size(images: Any) -> str:
    """Return height, width and, for colour, channels."""
    shape = images.shape[1:]
    return str(shape[:-1] if len(shape) == 3 and shape[-1] == 1 else shape)
