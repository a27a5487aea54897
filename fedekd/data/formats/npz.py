"""Files of NumPy arrays: images and labels, in MedMNIST's splits or in one part."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedekd.data.formats.columns import is_missing, missing_column, require_present, split_numbers
from fedekd.data.formats.image_files import channels_last_view, in_parallel
from fedekd.data.pixels import checked_images, resized, size_of
from fedekd.data.raw import SPLIT_COLUMN, SPLITS, RawSamples, ReadOptions, Unlabelled
from fedekd.errors import UserError, describe_error, listed

Array = npt.NDArray[Any]
Splits = dict[str, tuple[Array, Array]]
"""(images, labels) of each official split."""

_IMAGES, _LABELS, _CLASS_NAMES = "images", ("labels", "targets"), "class_names"


def read_arrays(path: Path, options: ReadOptions) -> RawSamples:
    """Read an .npz file.

    In MedMNIST's layout the arrays are `{train,val,test}_{images,labels}` and, with a column of targets, sites or
    groups, `{train,val,test}_{column}`. In one part they are `images`, `labels` or `targets`, and optionally `split`
    and the columns. `class_names` are the names of the classes 0, 1, ...

    Args:
        path: The file.
        options: Columns and size.

    Returns:
        The samples of all splits.

    Raises:
        UserError: If the file is missing or corrupt, or an array is missing or has another length.
    """
    with _open(path) as file:
        label = options.target_column or "labels"
        has_splits = any(key in file for split in SPLITS for key in _keys(split, label))
        if has_splits or _IMAGES not in file:
            raw, sizes = pool(path.stem, read_npz(path, label), options), _sizes(file, label)
        else:
            raw, sizes = _in_one_part(path, file, options), {}
        extra: dict[str, Any] = {}
        for field, column in (("site", options.site_column), ("group", options.group_column)):
            if column is not None and not (field == "site" and column == SPLIT_COLUMN):
                names = [f"{split}_{column}" for split in sizes] or [column]
                for name in names:
                    if name not in file:
                        raise missing_column(f"data.{field}_column", name, file.files, path.name, "array")
                parts = [np.atleast_1d(file[name]) for name in names]
                for name, part, size in zip(names, parts, list(sizes.values()) or [len(raw)], strict=True):
                    _require_length(path, name, part, size)
                extra[field] = np.concatenate([part.reshape(len(part)) for part in parts])
                present = [not is_missing(value) for value in extra[field].tolist()]
                require_present(present, f"data.{field}_column", f"a {field}", path.name, column)
        if _CLASS_NAMES in file:
            extra["class_names"] = tuple(str(name) for name in np.atleast_1d(file[_CLASS_NAMES]).tolist())
    return replace(raw, **extra)


def read_unlabelled_arrays(path: Path, options: ReadOptions) -> Unlabelled:
    """Read the images of an .npz file: `images` or those of all splits, concatenated.

    Raises:
        UserError: If the file is missing, corrupt, or has no images of one shape.
    """
    split_images = [_keys(split)[0] for split in SPLITS]
    with _open(path) as file:
        names = [_IMAGES] if _IMAGES in file else [name for name in split_images if name in file]
        arrays = [np.asarray(file[name]) for name in names]
    if not arrays:
        raise UserError(f"'{path}': expected an array {_IMAGES} or any of {', '.join(split_images)}, got none")
    if not any(array.size for array in arrays):
        raise UserError(f"'{path}': expected at least one image, got none")
    size = size_of(options.image_size)
    images = [_resized(path.name, checked_images(path.name, array), size) for array in arrays if array.size]
    if len({part.shape[1:] for part in images}) > 1:
        raise UserError(f"'{path}': expected splits of one image shape, got {', '.join(str(p.shape) for p in images)}")
    return Unlabelled(images[0] if len(images) == 1 else np.concatenate(images), None, ())


def read_column(path: Path, name: str) -> list[Any] | None:
    """Return one value per image: the array `name`, or `{train,val,test}_name`.

    None if there is no such array; an empty split needs none.

    Raises:
        UserError: If the file is missing or corrupt.
    """
    with _open(path) as file:
        arrays = [name] if _IMAGES in file else [f"{split}_{name}" for split in SPLITS]
        arrays = [array for array in arrays if array in file]
        if not arrays:
            return None
        return [value for array in arrays for value in np.asarray(file[array]).reshape(-1).tolist()]


def read_npz(path: Path, label: str = "labels") -> Splits:
    """Read an .npz file in MedMNIST's layout.

    Args:
        path: The file, with arrays `{train,val,test}_{images,labels}`. Some splits may be missing or empty.
        label: Name in place of `labels`.

    Returns:
        Images and labels of each split in the file.

    Raises:
        UserError: If the file is missing, corrupt, or has another layout.
    """
    with _open(path) as file:
        arrays = {key: np.asarray(file[key]) for split in SPLITS for key in _keys(split, label) if key in file}
    splits: Splits = {}
    for split in SPLITS:
        present = [key for key in _keys(split, label) if key in arrays]
        if len(present) == 1:
            missing = next(key for key in _keys(split, label) if key not in arrays)
            raise UserError(
                f"data.dataset: '{path}': expected both arrays of a split, got '{present[0]}' without '{missing}'"
            )
        if present:
            images, labels = (np.atleast_1d(arrays[key]) for key in _keys(split, label))
            splits[split] = images, labels
    if not any(len(array) for pair in splits.values() for array in pair):
        raise UserError(
            f"data.dataset: '{path}': expected train_images and train_{label}, and optionally those of val and test, or"
            " images and labels, got no samples"
        )
    return splits


def pool(name: str, splits: Splits, options: ReadOptions | None = None) -> RawSamples:
    """Concatenate the splits.

    Args:
        name: Name of the data set, for error messages.
        splits: Images and labels of each split. Empty splits may have any shape; a single split is not copied.
        options: Size of images. Default: unchanged.

    Raises:
        UserError: If the shapes of two splits differ, or the numbers of images and labels of a split differ.
    """
    for split, (images, labels) in splits.items():
        if len(images) != len(labels):
            raise UserError(
                f"data.dataset: {name!r}: expected one label per image, got {len(images)} {split} images and "
                f"{len(labels)} {split} labels"
            )
    size = None if options is None else size_of(options.image_size)
    filled = {split: splits[split] for split in SPLITS if split in splits and len(splits[split][0])}
    all_images, all_labels = zip(*filled.values(), strict=True)
    pooled = _joined(name, [_resized(name, images, size) for images in all_images])
    given = [np.full(len(pair[1]), SPLITS.index(split), np.int8) for split, pair in filled.items()]
    return RawSamples(pooled, _joined(name, list(all_labels)), split=np.concatenate(given))


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    """Context manager: the arrays of a file.

    Raises:
        UserError: If the file is missing or corrupt.
    """
    if not path.is_file():
        raise UserError(f"data.dataset: file '{path}' not found; expected an .npz file in MedMNIST's layout")
    try:
        with np.load(path, allow_pickle=False) as file:
            file.files  # noqa: B018  # a single array has no names
            yield file
    except UserError:
        raise
    except Exception as error:  # zipfile, zlib and numpy raise various errors for a corrupt archive
        raise UserError(
            f"data.dataset: '{path}' cannot be read ({describe_error(error)}): truncated, corrupt or not an .npz file"
            " of plain arrays. Replace the file."
        ) from error


def _in_one_part(path: Path, file: Any, options: ReadOptions) -> RawSamples:
    """Read `images`, their labels and `split`."""
    allowed = _LABELS if options.target_column is None else (options.target_column,)
    label = next((name for name in allowed if name in file), None)
    if label is None:
        raise UserError(
            f"data.target_column: '{path.name}': expected an array {' or '.join(allowed)}, got {listed(file.files)}"
        )
    images, targets = np.atleast_1d(file[_IMAGES]), np.atleast_1d(file[label])
    _require_length(path, label, targets, len(images))
    if targets.dtype.kind in "US":
        present = [not is_missing(value) for value in targets.reshape(-1).tolist()]
        require_present(present, "data.target_column", "a label", path.name, label)
    split = None
    if SPLIT_COLUMN in file:
        names = np.atleast_1d(file[SPLIT_COLUMN])
        _require_length(path, SPLIT_COLUMN, names, len(images))
        split = split_numbers(names.reshape(len(names)).tolist(), path.name)
    return RawSamples(_resized(path.stem, images, size_of(options.image_size)), targets, split=split)


def _sizes(file: Any, label: str) -> dict[str, int]:
    """Return the number of samples of each split that is not empty."""
    names = {split: _keys(split, label)[1] for split in SPLITS}
    sizes = {split: len(np.atleast_1d(file[name])) for split, name in names.items() if name in file}
    return {split: size for split, size in sizes.items() if size}


def _require_length(path: Path, name: str, array: Array, size: int) -> None:
    if len(array) != size or (name not in _LABELS and array.size != size):
        raise UserError(
            f"data.dataset: '{path.name}': expected one value per image in the array {name!r}, shape ({size},), got"
            f" {array.shape}"
        )


def _resized(name: str, images: Array, size: tuple[int, int] | None) -> Array:
    """Resize images, shape (N, H, W) or (N, H, W, C)."""
    if size is None or images.shape[1:3] == size:
        return images
    images = checked_images(name, images)
    kind = np.dtype(np.uint8) if images.dtype == bool else images.dtype
    result = channels_last_view((len(images), *size, images.shape[-1]), kind)

    def resize(index: int) -> None:
        result[index] = resized(images[index], size)

    in_parallel(resize, len(images), "images")
    return result


def _joined(name: str, parts: Sequence[Array]) -> Array:
    for part in parts[1:]:
        if part.shape[1:] != parts[0].shape[1:]:
            raise UserError(
                f"data.dataset: {name!r}: expected splits of one shape per sample, got {parts[0].shape[1:]} and "
                f"{part.shape[1:]}"
            )
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _keys(split: str, label: str = "labels") -> tuple[str, str]:
    return f"{split}_images", f"{split}_{label}"
