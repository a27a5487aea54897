"""Images in files of their own: headers, decoding, resizing, reading in parallel."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm  # type: ignore[import-untyped]

from fedekd.data.pixels import range_of, resized, size_of, to_pixels
from fedekd.data.raw import ReadOptions
from fedekd.errors import UserError, describe_error, listed, shorten, shorten_path

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".gif", ".webp", ".pgm", ".ppm", ".pnm"})
"""Suffixes of image files, in small letters."""

Array = npt.NDArray[Any]
_T = TypeVar("_T")

_GIBIBYTE = 1 << 30
_CHUNK = 16  # images per task of a thread
_THREADS = min(8, os.cpu_count() or 1)
_ORIENTATION = 0x0112  # tag of EXIF

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What brings an image of each EXIF orientation upright."""


class _Header(NamedTuple):
    """What is known of an image before it is decoded."""

    height: int
    width: int
    is_grey: bool
    kind: str  # type of its values


@dataclass(frozen=True, eq=False)
class ImageFiles:
    """N images in files, decoded at each access; can be pickled.

    Alpha is removed over black, EXIF orientation is applied, and colour of 16 bits is read with 8.

    Args:
        files: Path, or content of a file as bytes, of each image.
        names: Name of each image for error messages; a sequence of N.
        size: Height and width, to which images are resized.
        channels: 1 for grey, 3 for RGB.
        kind: Type of the values in the files: `uint8`, `uint16` or `float32`.
        value_range: Lowest and highest value of 16-bit and float images. Default: see `to_pixels`.
        is_resized: Allow other sizes than `size` in the files. Default False.
    """

    files: Sequence[Any]
    names: Sequence[str]
    size: tuple[int, int]
    channels: int
    kind: str = "uint8"
    value_range: tuple[float, ...] | None = None
    is_resized: bool = False

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Array:
        """Return an image, shape (H, W, C): uint8, or float32 in [-1, 1].

        Raises:
            UserError: If the image cannot be read, or a value is outside the range.
        """
        return to_pixels(self.names[index], self.values(index), self.value_range)[0]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(N, H, W, C)."""
        return (len(self), *self.size, self.channels)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of an image: uint8 or float32."""
        return np.dtype(np.uint8 if self.kind == "uint8" else np.float32)

    def digest(self) -> str:
        """Return the SHA-256 (hex) of the files and how they are read.

        Of a file: its name, size and time of modification; of content in memory: its bytes.

        Raises:
            UserError: If a file cannot be found.
        """
        return self._digest

    @cached_property
    def _digest(self) -> str:
        files = in_parallel(lambda index: _file_digest(self.files[index], self.names[index]), len(self))
        return sha256(f"{self.shape} {self.kind} {self.value_range} {files}".encode()).hexdigest()

    @property
    def nbytes(self) -> int:
        """Bytes of all images in memory."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    def values(self, index: int) -> Array:
        """Return the values of an image as in the file, resized, shape (H, W, C)."""
        image = _decoded(self.files[index], self.names[index], self.channels)
        if image.dtype != self.kind or not (self.is_resized or image.shape[:2] == self.size):
            raise UserError(
                f"data.dataset: image '{shorten_path(self.names[index])}': expected {self.kind} of {_text(self.size)},"
                f" as in its header, got {image.dtype} of {_text(image.shape[:2])}"
            )
        return resized(image, self.size)

    def take(self, indices: Array) -> ImageFiles:
        """Return the images at `indices`, or where a mask of N is true."""
        chosen = np.arange(len(self))[indices].tolist()
        return replace(self, files=_chosen(self.files, chosen), names=_chosen(self.names, chosen))

    def load(self, skip_unreadable: bool = False, out: Array | None = None) -> tuple[Array, npt.NDArray[np.bool_]]:
        """Read all images with threads, with a bar on a terminal's standard error.

        Args:
            skip_unreadable: Leave out images that cannot be read.
            out: Array to fill, shape (N, H, W, C). Default: a new one.

        Returns:
            Values as in the files, shape (n, H, W, C), and which of N images were read.

        Raises:
            UserError: If an image cannot be read and is not to be left out.
        """
        images = channels_last_view(self.shape, self.kind) if out is None else out

        def read(index: int) -> bool:
            images[index] = self.values(index)
            return True

        is_read = _checked(read, len(self), skip_unreadable)
        return (images if is_read.all() else images[is_read]), is_read

    def find_readable(self) -> npt.NDArray[np.bool_]:
        """Decode all images and return which can be read, without keeping them."""
        return _checked(lambda index: bool(self.values(index).size), len(self), skip_unreadable=True)


class ReadImages(NamedTuple):
    """Images that were read.

    Attributes:
        inputs: An array of the values in the files, shape (n, H, W, C), or `ImageFiles` above the limit of memory.
        is_read: Which of the N images are in `inputs`.
        warnings: What a user should know of them; one line each.
    """

    inputs: Any
    is_read: npt.NDArray[np.bool_]
    warnings: tuple[str, ...]


def read_images(files: Sequence[Any], names: Sequence[str], options: ReadOptions) -> ReadImages:
    """Read images, or describe those that do not fit in memory.

    Args:
        files: Path, or content of a file as bytes, of each image, at least one.
        names: Name of each image for error messages.
        options: Size, range, limit of memory, and if unreadable images are left out.

    Raises:
        UserError: If an image cannot be read, or sizes or types differ.
    """
    size = size_of(options.image_size)
    headers: list[_Header | None] = in_parallel(
        lambda index: _header_or_none(files[index], names[index], options.skip_unreadable), len(files)
    )
    is_read = np.asarray([header is not None for header in headers])
    _require_any(is_read, names)
    kept = np.flatnonzero(is_read).tolist()
    found = [header for header in headers if header is not None]
    _require_one_kind(kept, found, names, size is None)
    first = found[0]
    images = ImageFiles(
        _chosen(files, kept),
        _chosen(names, kept),
        size or (first.height, first.width),
        1 if all(header.is_grey for header in found) else 3,
        first.kind,
        range_of(np.dtype(first.kind), options.value_range),
        size is not None,
    )
    inputs: Any = images
    if fits_in_memory(images.nbytes, options):
        inputs, is_decoded = images.load(options.skip_unreadable)
        is_read[is_read] = is_decoded
    elif options.skip_unreadable:
        is_decoded = images.find_readable()
        inputs = images.take(is_decoded)
        is_read[is_read] = is_decoded
    _require_any(is_read, names)
    skipped = [name for name, is_kept in zip(names, is_read.tolist(), strict=True) if not is_kept]
    warnings = (
        f"data.skip_unreadable: {len(skipped)} of {len(names)} images cannot be read and are left out:"
        f" {listed(repr(shorten_path(name)) for name in skipped)}"
        for _ in skipped[:1]
    )
    return ReadImages(inputs, is_read, tuple(warnings))


def fits_in_memory(size: int, options: ReadOptions) -> bool:
    """Return whether images of `size` bytes are below the limit of memory."""
    return size <= options.memory_limit * _GIBIBYTE


def with_channels(images: Any, channels: int) -> Any:
    """Repeat grey images in three channels.

    Args:
        images: An array, shape (N, H, W, 1) or (N, H, W, 3), or `ImageFiles`.
        channels: 1 or 3.
    """
    if images.shape[-1] == channels:
        return images
    return replace(images, channels=channels) if isinstance(images, ImageFiles) else np.repeat(images, channels, -1)


def channels_last_view(shape: Sequence[int], kind: Any) -> Array:
    """Return an empty array (N, H, W, C) in the memory order of `Samples.inputs`.

    The samples of a large data set are then not copied when their channels are moved to the front.
    """
    count, height, width, channels = shape
    return np.moveaxis(np.empty((count, channels, height, width), kind), 1, -1)


def find_images(folder: Path) -> Iterator[Path]:
    """Yield the image files in and below a folder, sorted, without hidden ones."""
    for path in files_in(folder):
        if path.suffix.lower() in SUFFIXES:
            yield path


def files_in(folder: Path) -> Iterator[Path]:
    """Yield the files in and below a folder, sorted, without hidden ones.

    Links to folders are followed, except to a folder that contains the link or was visited before.
    """
    visited = {_identity(path) for start in (folder.absolute(), folder.resolve()) for path in start.parents}
    for parent, folders, files in os.walk(folder, followlinks=True):
        identity = _identity(Path(parent))
        if identity in visited:
            folders.clear()
            continue
        visited.add(identity)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if not name.startswith("."):
                yield Path(parent, name)


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _chosen(items: Any, indices: Sequence[int]) -> Any:
    """Return the items at indices; those of a dataset are not read."""
    return items.select(indices) if hasattr(items, "select") else [items[index] for index in indices]


def in_parallel(function: Callable[[int], _T], count: int, title: str | None = None) -> list[_T]:
    """Return the results of a function of 0..count-1, computed by threads.

    Args:
        function: Called with each index.
        count: Number of calls.
        title: Title of a bar on a terminal's standard error. Default: no bar.
    """
    chunks = [range(start, min(start + _CHUNK, count)) for start in range(0, count, _CHUNK)]
    results: list[_T] = []
    with (
        ThreadPoolExecutor(_THREADS) as pool,
        tqdm(total=count, desc=title, disable=None if title else True, leave=False) as bar,
    ):
        try:
            for part in pool.map(lambda chunk: [function(index) for index in chunk], chunks):
                results += part
                bar.update(len(part))
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    return results


def _file_digest(file: Any, name: str) -> tuple[Any, ...] | str:
    if isinstance(file, bytes):
        return sha256(file).hexdigest()
    try:
        status = os.stat(file)
    except OSError as error:
        raise _unreadable(name, error) from error
    return name, status.st_size, status.st_mtime_ns


@contextmanager
def _open(file: Any) -> Iterator[Image.Image]:
    """Context manager: an image that is not decoded yet."""
    # Not by path: PIL 13 maps uncompressed TIFF of another orientation into memory with height and width exchanged.
    with BytesIO(file) if isinstance(file, bytes) else open(file, "rb") as stream, Image.open(stream) as image:
        yield image


def _require_any(is_read: npt.NDArray[np.bool_], names: Sequence[str]) -> None:
    if not is_read.any():
        raise UserError(
            f"data.skip_unreadable: expected at least one readable image, got {len(names)} that cannot be read, such as"
            f" '{shorten_path(names[0])}'"
        )


def _require_one_kind(kept: Sequence[int], headers: Sequence[_Header], names: Sequence[str], one_size: bool) -> None:
    """Check that images have one type and, if `one_size`, one size.

    Raises:
        UserError: Names the first two images that differ.
    """
    first = headers[0]
    for index, header in zip(kept, headers, strict=True):
        one, other = (shorten(names[i]) for i in (kept[0], index))
        if header.kind != first.kind:
            raise UserError(
                f"data.dataset: expected images of one type, got {first.kind} ('{one}') and {header.kind} ('{other}')."
                " Convert them to one"
            )
        if one_size and header[:2] != first[:2]:
            raise UserError(
                f"data.image_size: expected images of one size, got {_text(first)} ('{one}') and {_text(header)}"
                f" ('{other}'). Set --data.image_size to the height and width of all"
            )


def _header_or_none(file: Any, name: str, skip_unreadable: bool) -> _Header | None:
    try:
        return _header(file, name)
    except UserError:
        if skip_unreadable:
            return None
        raise


def _header(file: Any, name: str) -> _Header:
    """Read the size and type of an image without decoding it."""
    try:
        with _open(file) as image:
            width, height = image.size
            if _orientation(image) >= 5:
                width, height = height, width
            # The second image of an MPO file is a preview.
            if image.format != "MPO" and (frames := getattr(image, "n_frames", 1)) > 1:
                raise UserError(
                    f"data.dataset: image '{shorten_path(name)}': expected one image per file, got {frames}. Write"
                    " each to a file of its own"
                )
            return _Header(height, width, _is_grey(image), _kind(image))
    except UserError:
        raise
    except Exception as error:  # plugins of PIL raise various errors for corrupt files
        raise _unreadable(name, error) from error


def _decoded(file: Any, name: str, channels: int) -> Array:
    """Decode an image, shape (H, W, channels)."""
    try:
        with _open(file) as image:
            turn = _TURNS.get(_orientation(image))
            kind = _kind(image)
            if kind == "uint8":
                picture = _without_alpha(image).convert("L" if channels == 1 else "RGB")
                values = np.asarray(picture if turn is None else picture.transpose(turn))
            else:
                image.load()
                values = np.asarray(image if turn is None else image.transpose(turn))
                if kind == "uint16" and not 0 <= values.min() <= values.max() <= 65535:
                    raise ValueError(f"expected 16-bit values 0..65535, got {values.min()}..{values.max()}")
                values = values.astype(kind)
    except Exception as error:  # as above
        raise _unreadable(name, error) from error
    return np.repeat(values[..., None], channels, -1) if values.ndim == 2 else values


def _kind(image: Image.Image) -> str:
    if image.mode == "F":
        return "float32"
    return "uint16" if image.mode == "I" or image.mode.startswith("I;16") else "uint8"


def _is_grey(image: Image.Image) -> bool:
    if image.mode in ("P", "PA"):
        palette = np.asarray(image.getpalette() or [], np.uint8).reshape(-1, 3)
        return bool((palette == palette[:, :1]).all())
    return image.mode in ("1", "L", "LA", "La", "F") or image.mode.startswith("I")


def _without_alpha(image: Image.Image) -> Image.Image:
    """Return an image over black, in a mode without transparency."""
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        picture = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, (0, 0, 0, 255)), picture).convert("RGB")
    return image


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1..8, as far as it is known before decoding."""
    # PIL turns TIFF by itself; `getexif` of a PNG without EXIF decodes it.
    if image.format == "TIFF" or (image.format == "PNG" and "exif" not in image.info):
        return 1
    orientation = image.getexif().get(_ORIENTATION, 1)
    return orientation if orientation in _TURNS else 1


def _unreadable(name: str, error: Exception) -> UserError:
    if isinstance(error, FileNotFoundError):
        reason = "file not found"
    else:
        reason = "not an image" if isinstance(error, UnidentifiedImageError) else describe_error(error, 100)
    return UserError(
        f"data.dataset: image '{shorten_path(name)}' cannot be read ({reason}). Replace or remove it, or set"
        " --data.skip_unreadable true"
    )


def _checked(read: Callable[[int], bool], count: int, skip_unreadable: bool) -> npt.NDArray[np.bool_]:
    """Return for which of 0..count-1 `read` raised no error that is to be left out."""

    def attempt(index: int) -> bool:
        try:
            return read(index)
        except UserError:
            if skip_unreadable:
                return False
            raise

    return np.asarray(in_parallel(attempt, count, "images"), dtype=bool)


def _text(size: Sequence[Any]) -> str:
    return f"{size[0]}x{size[1]}"
