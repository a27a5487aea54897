"""Hugging Face datasets with a column of images and one of labels: `hf:NAME`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedekd.data.formats.columns import is_missing, missing_column, require_present, targets_of_texts
from fedekd.data.formats.image_files import read_images
from fedekd.data.raw import SPLIT_COLUMN, SPLIT_NAMES, RawSamples, ReadOptions, Unlabelled
from fedekd.errors import UserError, describe_error, listed, shorten

PREFIX = "hf:"

Array = npt.NDArray[Any]


def is_hugging_face(path: Path) -> bool:
    """Return True for `hf:NAME`, and for `hf:/folder` with a local copy."""
    return str(path).startswith(PREFIX)


class ArrowImages(Sequence[Any]):
    """Contents or paths of the images in a column, read at each access.

    Args:
        dataset: The dataset, whose column of images is not decoded.
        column: Name of the column.
    """

    def __init__(self, dataset: Any, column: str) -> None:
        self.dataset, self.column = dataset, column

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: Any) -> Any:
        image = self.dataset[int(index)][self.column]
        if image is None:
            return b""
        return image["path"] if image["bytes"] is None else image["bytes"]

    def select(self, indices: Sequence[int]) -> ArrowImages:
        """Return the images at `indices`, without reading them."""
        return ArrowImages(self.dataset.select(indices), self.column)


def read_hugging_face(path: Path, options: ReadOptions) -> RawSamples:
    """Read a dataset of the hub or of a folder.

    A folder was written by `save_to_disk`, or is readable by `load_dataset`.

    The first column of images and the column `data.target_column`, by default `label` or the only one of class labels,
    are read. The splits train, validation and test are given splits; others are left out.

    Args:
        path: `hf:NAME` or `hf:FOLDER`.
        options: Columns, size, range, limit of memory, and if unreadable images are left out.

    Returns:
        The images in order of split and row.

    Raises:
        UserError: If the package, the dataset or a column is missing, or images cannot be read or do not fit.
    """
    dataset, split, warnings = _load(path)
    name = str(path)
    extra: dict[str, Any] = {} if split is None else {"split": split}
    for field, column in (("site", options.site_column), ("group", options.group_column)):
        if column is not None and not (field == "site" and column == SPLIT_COLUMN):
            option = f"data.{field}_column"
            values = _column(dataset, column, option, name)
            require_present([not is_missing(value) for value in values], option, f"a {field}", name, column)
            extra[field] = np.asarray([str(value) for value in _named(dataset, column, values)], dtype=object)
    label = options.target_column or _label_column(dataset)
    targets, class_names = _targets(dataset, label, name)
    images = _images(dataset, name, options)
    extra = {field: values[images.is_read] for field, values in extra.items()}
    return RawSamples(
        images.inputs, targets[images.is_read], class_names, warnings=(*warnings, *images.warnings), **extra
    )


def read_unlabelled_hugging_face(path: Path, options: ReadOptions) -> Unlabelled:
    """Read the images of all splits of a dataset.

    Raises:
        UserError: As `read_hugging_face`.
    """
    dataset, _, warnings = _load(path)
    images = _images(dataset, str(path), options)
    return Unlabelled(images.inputs, None, (*warnings, *images.warnings))


def _load(path: Path) -> tuple[Any, npt.NDArray[np.int8] | None, tuple[str, ...]]:
    """Return all splits in one dataset, the split of each row, and warnings."""
    name = str(path).removeprefix(PREFIX)
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"data.dataset: '{path}' needs the package datasets ({describe_error(error, 100)});"
            " pip install 'fedekd[hf]'"
        ) from error
    folder = Path(name).expanduser()
    is_saved = any((folder / file).is_file() for file in ("dataset_dict.json", "state.json"))
    try:
        loaded = datasets.load_from_disk(str(folder)) if is_saved else datasets.load_dataset(name)
    except Exception as error:  # the package raises errors of its own, of the network and of parsers
        raise UserError(
            f"data.dataset: cannot load '{shorten(str(path))}' ({describe_error(error, 200)}). Check the name, or give"
            " the folder of a copy, hf:FOLDER"
        ) from error
    if isinstance(loaded, datasets.Dataset):
        return loaded, None, ()
    splits = {key: SPLIT_NAMES[key.lower()] for key in loaded if key.lower() in SPLIT_NAMES}
    if not splits:
        if len(loaded) == 1:
            return next(iter(loaded.values())), None, ()
        raise UserError(f"data.dataset: '{shorten(str(path))}': expected a split train, got {listed(loaded)}")
    ordered = sorted(splits, key=lambda key: splits[key])
    others = [key for key in loaded if key not in splits]
    warnings = (f"data.dataset: '{path}': the splits {listed(others)} are left out",) if others else ()
    split = np.concatenate([np.full(len(loaded[key]), splits[key], np.int8) for key in ordered])
    return datasets.concatenate_datasets([loaded[key] for key in ordered]), split, warnings


def _images(dataset: Any, name: str, options: ReadOptions) -> Any:
    import datasets

    columns = [key for key, feature in dataset.features.items() if isinstance(feature, datasets.Image)]
    if not columns:
        raise UserError(
            f"data.dataset: '{shorten(name)}': expected a column of images, got {listed(dataset.column_names)}"
        )
    files = ArrowImages(
        dataset.select_columns(columns[:1]).cast_column(columns[0], datasets.Image(decode=False)), columns[0]
    )
    return read_images(files, [f"{name} row {row + 1}" for row in range(len(dataset))], options)


def _column(dataset: Any, column: str, option: str, name: str) -> list[Any]:
    if column not in dataset.column_names:
        raise missing_column(option, column, dataset.column_names, name)
    return list(dataset.select_columns([column])[:][column])


def _label_column(dataset: Any) -> str:
    import datasets

    labels = [key for key, feature in dataset.features.items() if isinstance(feature, datasets.ClassLabel)]
    return labels[0] if len(labels) == 1 and "label" not in dataset.column_names else "label"


def _targets(dataset: Any, column: str, name: str) -> tuple[Array, tuple[str, ...] | None]:
    values = _column(dataset, column, "data.target_column", name)
    require_present([not is_missing(value) for value in values], "data.target_column", "a label", name, column)
    names = getattr(dataset.features[column], "names", None)
    if names is not None:
        return np.asarray(values), tuple(names)
    if all(isinstance(value, str) for value in values):
        return targets_of_texts(values, name, column), None
    return np.asarray(values), None


def _named(dataset: Any, column: str, values: list[Any]) -> list[Any]:
    """Return class labels as their names."""
    names = getattr(dataset.features[column], "names", None)
    return values if names is None else [names[value] for value in values]
