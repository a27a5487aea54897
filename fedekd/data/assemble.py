"""Join the samples of all sources: common numbers of classes and groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedekd.data.columns import Column, is_table, join_tables
from fedekd.data.join_images import join_images
from fedekd.data.raw import (
    SPLIT_COLUMN,
    SPLITS,
    RawSamples,
    ReadOptions,
    first_repeated,
    names_of,
    sorted_texts,
    text_of,
)
from fedekd.data.samples import Samples, one_column
from fedekd.data.sites import require_site_names
from fedekd.errors import UserError, listed, shorten
from fedekd.tasks import Task

_IGNORED = "\0ignored"  # in place of the name of a class


def assemble(name: str, sources: Mapping[str | None, RawSamples], options: ReadOptions) -> Samples:
    """Join the samples of all sources and convert them to tensors.

    Args:
        name: Name of the data set.
        sources: Samples by name of the site; None is a source that is not one site.
        options: Task, classes and columns.

    Raises:
        UserError: If sources do not fit together, or arrays or targets are invalid; see `Samples.from_arrays`.
    """
    task: Task = options.task or "classification"
    parts = list(sources.values())
    columns: tuple[Column, ...] = ()
    warnings = [line for part in parts for line in part.warnings]
    _refuse_unused(is_table(sources), options)
    if is_table(sources):
        inputs, columns, notes = join_tables(sources, options)
        value_range = None
    else:
        images = {site: part.inputs for site, part in sources.items()}
        inputs, value_range, notes = join_images(images, options)
    warnings += notes
    site, site_names = _sites(sources, options)
    targets, class_names, ignored = _targets(name, parts, task, options)
    names = class_names or tuple(options.classes or ())
    num_classes = len(names) if names else options.num_classes
    split = None if any(part.split is None for part in parts) else np.concatenate([part.split for part in parts])
    if options.site_column == SPLIT_COLUMN:
        split = None
    group, group_names = _groups(sources, options)
    samples = Samples.from_arrays(
        name,
        inputs,
        targets,
        task,
        num_classes,
        options.ignore_label,
        value_range,
        ignored=ignored,
        split=_tensor(split),
        site=_tensor(site),
        site_names=site_names,
        group=_tensor(group),
        group_names=group_names,
        columns=columns,
        warnings=tuple(warnings),
    )
    return replace(samples, class_names=names) if names else samples


def _refuse_unused(is_table: bool, options: ReadOptions) -> None:
    """Check that no option of images is given for tables, or the reverse.

    Raises:
        UserError: Names the first option without effect.
    """
    unused = ("image_size", "value_range") if is_table else ("categorical_columns", "categories")
    for name in unused:
        if (value := getattr(options, name)) is not None:
            kind, other = ("tables", "images") if is_table else ("images", "tables")
            raise UserError(
                f"data.{name}: expected null for {kind}, because it is an option of {other}, got"
                f" {shorten(repr(value))}. Omit it"
            )


def _sites(
    sources: Mapping[str | None, RawSamples], options: ReadOptions
) -> tuple[npt.NDArray[np.int64] | None, tuple[str, ...]]:
    """Return the number of the site of each sample, and the names of the sites."""
    parts = list(sources.values())
    if None not in sources:
        sizes = [len(part) for part in parts]
        return np.repeat(np.arange(len(parts)), sizes), tuple(str(name) for name in sources)
    if options.site_column is None:
        return None, ()
    [part] = parts
    if options.site_column == SPLIT_COLUMN and part.site is None and part.split is not None:
        present, number = np.unique(part.split, return_inverse=True)
        return number.astype(np.int64), tuple(SPLITS[index] for index in present)
    if part.site is None:
        raise UserError(f"data.site_column: expected a column or array of the data, got {options.site_column!r}")
    names, site = np.unique(part.site.astype(str), return_inverse=True)
    require_site_names(names.tolist(), "data.site_column")
    return site.astype(np.int64), tuple(names.tolist())


def _groups(
    sources: Mapping[str | None, RawSamples], options: ReadOptions
) -> tuple[npt.NDArray[np.int64] | None, tuple[str, ...]]:
    """Return the group of each sample, and the names; groups of two sources differ.

    Data sets of the user may have groups without an option. Each sample of a source without groups is then one.
    """
    if options.group_column is None and all(part.group is None for part in sources.values()):
        return None, ()
    numbers: list[npt.NDArray[np.int64]] = []
    names: list[str] = []
    for site, part in sources.items():
        groups = part.group
        if groups is None and options.group_column is not None:
            where = "the data" if site is None else f"site {site!r}"
            raise UserError(f"data.group_column: expected a column or array of {where}, got {options.group_column!r}")
        # Of equal length, so that the order of names is that of the samples.
        groups = np.asarray([f"sample {index:09}" for index in range(len(part))]) if groups is None else groups
        values, number = np.unique(names_of(groups), return_inverse=True)
        numbers.append(number.astype(np.int64) + len(names))
        names += values.tolist()
    return np.concatenate(numbers), tuple(names)


def _targets(
    name: str, parts: Sequence[RawSamples], task: Task, options: ReadOptions
) -> tuple[npt.NDArray[Any], tuple[str, ...], npt.NDArray[np.bool_] | None]:
    """Return targets as numbers, names of classes, and ignored samples.

    The names are empty and no sample is ignored here if targets are numbers. Targets are names if a source has names of
    classes or targets that are text, or a number is a name in `data.classes`.
    """
    arrays = [one_column(name, part.targets) for part in parts]
    declared = set(options.classes or ())
    is_named = task == "classification" and any(
        part.class_names
        or array.dtype.kind in "OUS"
        or (
            any(text.isdecimal() for text in declared)
            and not declared.isdisjoint(map(text_of, np.unique(array).tolist()))
        )
        for part, array in zip(parts, arrays, strict=True)
    )
    if not is_named:
        if options.classes is not None and options.num_classes not in (None, len(options.classes)):
            raise UserError(
                f"data.num_classes: expected {len(options.classes)} (data.classes), got {options.num_classes}"
            )
        return arrays[0] if len(arrays) == 1 else np.concatenate(arrays), (), None
    texts = np.concatenate([_names(name, part, array, options) for part, array in zip(parts, arrays, strict=True)])
    present = _present(parts, texts)
    classes = tuple(options.classes or _numbers(options.num_classes, present) or present)
    number = _numbers_of_names(classes, present) | {_IGNORED: -1}
    if unknown := [text for text in sorted_texts(set(texts.tolist())) if text not in number]:
        raise UserError(
            f"data.classes: {name!r}: expected one of {listed(classes)}, got the class {shorten(repr(unknown[0]))}"
        )
    if options.num_classes not in (None, len(classes)):
        raise UserError(
            f"data.num_classes: {name!r}: expected {len(classes)}, the number of classes, got {options.num_classes}"
        )
    return np.asarray([number[text] for text in texts.tolist()]), classes, texts == _IGNORED


def _numbers_of_names(classes: Sequence[str], present: Sequence[str]) -> dict[str, int]:
    """Return the number of each class by name, or by number if no name occurs."""
    numbers = None if set(classes) & set(present) else _numbers(len(classes), present)
    return {name: index for index, name in enumerate(numbers or classes)}


def _present(parts: Sequence[RawSamples], texts: npt.NDArray[Any]) -> list[str]:
    """Return the names of the classes: in the common order of sources, or sorted."""
    given = {part.class_names for part in parts}
    if len(given) == 1 and (names := given.pop()):
        return list(names)
    return sorted_texts({*texts.tolist(), *(name for names in given for name in names or ())} - {_IGNORED})


def _names(name: str, part: RawSamples, targets: npt.NDArray[Any], options: ReadOptions) -> npt.NDArray[Any]:
    """Return the name of the class of each sample."""
    if part.class_names is not None:
        if repeated := first_repeated(part.class_names):
            raise UserError(
                f"data.dataset: {name!r}: expected different names of classes, got {shorten(repr(repeated))} twice"
            )
        numbers = np.arange(len(part.class_names))
        is_number = np.isin(targets, numbers) & (targets != options.ignore_label)
        if (wrong := targets[~is_number & (targets != options.ignore_label)]).size:
            raise UserError(
                f"data.dataset: labels of {name!r}: expected 0..{len(numbers) - 1} for {len(numbers)} class names, got"
                f" {wrong[0]}. Leave out an unknown label by --data.ignore_label"
            )
        names = np.asarray([*part.class_names, _IGNORED], dtype=object)
        return np.asarray(names[np.where(is_number, targets, -1).astype(np.int64)])
    texts = [text_of(value) for value in targets.tolist()]
    if options.ignore_label is not None:
        texts = [_IGNORED if text == str(options.ignore_label) else text for text in texts]
    if missing := [index for index, text in enumerate(texts) if not text]:
        raise UserError(f"data.dataset: {name!r}: expected a class for every sample, got none in row {missing[0] + 1}")
    return np.asarray(texts, dtype=object)


def _numbers(num_classes: int | None, names: Sequence[str]) -> tuple[str, ...] | None:
    """Return 0..num_classes-1 as names if all names are among them."""
    numbers = tuple(map(str, range(num_classes or 0)))
    return numbers if set(names) <= set(numbers) else None


def _tensor(array: npt.NDArray[Any] | None) -> Tensor | None:
    return None if array is None else torch.from_numpy(array.astype(np.int64))
