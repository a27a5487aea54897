"""Samples of one source, before classes are numbered and sites are joined."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from fedekd.data.stored import take_inputs
from fedekd.errors import UserError, shorten
from fedekd.tasks import Task

SPLITS = ("train", "val", "test")
"""Names of given splits, in the order in which they are pooled."""

SPLIT_NAMES = {"train": 0, "training": 0, "val": 1, "valid": 1, "validation": 1, "test": 2, "testing": 2}
"""Index into `SPLITS` by the names, in small letters, that data have for splits."""

SPLIT_COLUMN = "split"
"""Name of the column or array of given splits; as `data.site_column` it makes the splits the sites."""

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class ReadOptions:
    """Options that decide what is read; documented in `FederatedDataModule`."""

    task: Task | None = None
    num_classes: int | None = None
    classes: Sequence[str] | None = None
    ignore_label: int | None = None
    site_column: str | None = None
    group_column: str | None = None
    target_column: str | None = None
    image_size: int | Sequence[int] | None = None
    value_range: Sequence[float] | None = None
    skip_unreadable: bool = False
    categorical_columns: Sequence[str] | None = None
    ignored_columns: Sequence[str] | None = None
    categories: Mapping[str, Sequence[Any]] | None = None
    memory_limit: float = 4.0
    splits: str = "random"

    def __post_init__(self) -> None:
        """Validate declared names.

        Raises:
            UserError: If there are none, or a name occurs twice.
        """
        if self.classes is not None:
            expected = "data.classes: expected at least 2 different names, got"
            if len(self.classes) < 2:
                raise UserError(f"{expected} {list(self.classes)}")
            if repeated := first_repeated(map(text_of, self.classes)):
                raise UserError(f"{expected} {shorten(repr(repeated))} twice")
        for column, categories in (self.categories or {}).items():
            expected = f"data.categories: expected at least one category and different names of {column!r}, got"
            if not categories:
                raise UserError(f"{expected} none. Omit the column for the categories in the data")
            if repeated := first_repeated(map(text_of, categories)):
                raise UserError(f"{expected} {shorten(repr(repeated))} twice")


@dataclass(frozen=True, eq=False)
class RawSamples:
    """N samples of one source.

    Args:
        inputs: Images, shape (N, H, W) or (N, H, W, C): an array of the values in the file, or `ImageFiles`; or a data
            frame of N rows.
        targets: Labels, shape (N,) or (N, 1): numbers, or names of classes.
        class_names: Names of the classes 0, 1, ... if `targets` are their numbers and the source names them.
        site: Name of the site of each sample, shape (N,), if there is a site column.
        group: Group of each sample, such as a patient, shape (N,), if there is a group column.
        split: Given split of each sample, index into `SPLITS`, shape (N,), if there is one.
        warnings: What a user should know of the source; one line each.
    """

    inputs: Any
    targets: Array
    class_names: tuple[str, ...] | None = None
    site: Array | None = None
    group: Array | None = None
    split: npt.NDArray[np.int8] | None = None
    warnings: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.targets)

    def kept(self, mask: npt.NDArray[np.bool_]) -> RawSamples:
        """Return the samples at which `mask`, shape (N,), is true."""
        if mask.all():
            return self
        parts = {
            name: take_inputs(value, mask)
            for name in ("inputs", "targets", "site", "group", "split")
            if (value := getattr(self, name)) is not None
        }
        return replace(self, **parts)


def text_of(value: Any) -> str:
    """Return the name of a class or category: `3` for 3 and 3.0, empty if missing."""
    if value is None or value is pd.NA or value != value:
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).strip()


def name_of(value: Any) -> str:
    """Return the name of a group or category as `text_of`; bytes are UTF-8."""
    return text_of(value.decode(errors="replace") if isinstance(value, bytes) else value)


def names_of(values: Array) -> npt.NDArray[np.str_]:
    """Return the names of the groups of N samples, shape (N,)."""
    dates = values.astype(np.str_) if values.dtype.kind == "M" else values  # as integers they would lose their order
    return np.asarray([name_of(value) for value in dates.tolist()], dtype=np.str_)


def first_repeated(names: Iterable[str]) -> str | None:
    """Return the first name that occurs twice; None if all are different."""
    seen: set[str] = set()
    return next((name for name in names if name in seen or seen.add(name)), None)  # type: ignore[func-returns-value]


def sorted_texts(texts: Iterable[str]) -> list[str]:
    """Return names sorted by number if all are whole numbers, else by letters."""
    names = list(texts)
    return sorted(names, key=int if all(name.isdecimal() for name in names) else str)


class Unlabelled(NamedTuple):
    """Images without labels.

    Attributes:
        inputs: As in `RawSamples`.
        names: Name of the file of each image; None where there are no files.
        warnings: What a user should know of the images; one line each.
    """

    inputs: Any
    names: list[str] | None
    warnings: tuple[str, ...]
