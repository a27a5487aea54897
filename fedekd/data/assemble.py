"""Join the samples of all sources: common numbers of classes and groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedekd.data.raw import RawSamples, ReadOptions
from fedekd.data.samples import Samples
from fedekd.data.sites import require_site_name
from fedekd.errors import UserError, listed, shorten
from fedekd.tasks import Task


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
    site, site_names = _sites(sources, options)
    targets, class_names = _targets(name, parts, task, options)
    names = class_names or tuple(options.classes or ())
    num_classes = len(names) if names else options.num_classes
    split = None if any(part.split is None for part in parts) else np.concatenate([part.split for part in parts])
    samples = Samples.from_arrays(
        name,
        _inputs(sources),
        targets,
        task,
        num_classes,
        options.ignore_label,
        split=_tensor(split),
        site=_tensor(site),
        site_names=site_names,
        group=_tensor(_groups(sources, options)),
        warnings=tuple(line for part in parts for line in part.warnings),
    )
    return replace(samples, class_names=names) if names else samples


def _inputs(sources: Mapping[str | None, RawSamples]) -> Any:
    arrays = [part.inputs for part in sources.values()]
    first = arrays[0]
    for site, array in zip(sources, arrays, strict=True):
        if array.shape[1:] != first.shape[1:]:
            raise UserError(
                f"data.sites: expected images of one size, {first.shape[1:]} as in {next(iter(sources))!r}, got"
                f" {array.shape[1:]} in {site!r}. Set --data.image_size"
            )
    return first if len(arrays) == 1 else np.concatenate(arrays)


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
    if part.site is None:
        raise UserError(f"data.site_column: expected a column or array of the data, got {options.site_column!r}")
    names, site = np.unique(part.site.astype(str), return_inverse=True)
    return site.astype(np.int64), tuple(require_site_name(str(name)) for name in names)


def _groups(sources: Mapping[str | None, RawSamples], options: ReadOptions) -> npt.NDArray[np.int64] | None:
    """Return the group of each sample; groups of two sources differ."""
    if options.group_column is None:
        return None
    numbers, first = [], 0
    for site, part in sources.items():
        if part.group is None:
            where = "the data" if site is None else f"site {site!r}"
            raise UserError(f"data.group_column: expected a column or array of {where}, got {options.group_column!r}")
        values, number = np.unique(part.group.astype(str), return_inverse=True)
        numbers.append(number.astype(np.int64) + first)
        first += len(values)
    return np.concatenate(numbers)


def _targets(
    name: str, parts: Sequence[RawSamples], task: Task, options: ReadOptions
) -> tuple[npt.NDArray[Any], tuple[str, ...]]:
    """Return targets as numbers, and names of classes if the targets are names.

    Targets are names if a source has names of classes or targets that are text, or `data.classes` is given.
    """
    arrays = [_column(part.targets) for part in parts]
    is_named = task == "classification" and any(
        part.class_names or array.dtype.kind in "OUS" for part, array in zip(parts, arrays, strict=True)
    )
    if not is_named:
        if options.classes is not None and options.num_classes not in (None, len(options.classes)):
            raise UserError(
                f"data.num_classes: expected {len(options.classes)} (data.classes), got {options.num_classes}"
            )
        return arrays[0] if len(arrays) == 1 else np.concatenate(arrays), ()
    texts = np.concatenate([_names(name, part, array) for part, array in zip(parts, arrays, strict=True)])
    present = _sorted_names({*texts.tolist(), *(name for part in parts for name in part.class_names or ())})
    classes = tuple(options.classes or _numbers(options.num_classes, present) or present)
    named = _numbers(len(classes), present) or classes  # numbers of declared classes
    number = {class_name: index for index, class_name in enumerate(named)}
    if unknown := [text for text in _sorted_names(set(texts.tolist())) if text not in number]:
        raise UserError(
            f"data.classes: {name!r}: expected one of {listed(classes)}, got the class {shorten(repr(unknown[0]))}"
        )
    if options.num_classes not in (None, len(classes)):
        raise UserError(
            f"data.num_classes: {name!r}: expected {len(classes)}, the number of classes, got {options.num_classes}"
        )
    return np.asarray([number[text] for text in texts.tolist()]), classes


def _names(name: str, part: RawSamples, targets: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return the name of the class of each sample."""
    if part.class_names is not None:
        return np.asarray(part.class_names, dtype=object)[targets.astype(np.int64)]
    texts = [_text(value) for value in targets.tolist()]
    if missing := [index for index, text in enumerate(texts) if not text]:
        raise UserError(f"data.dataset: {name!r}: expected a class for every sample, got none in row {missing[0] + 1}")
    return np.asarray(texts, dtype=object)


def _text(value: Any) -> str:
    """Return the name of a class: `3` for 3 and 3.0, empty for a missing value."""
    if value is None or value != value:
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).strip()


def _numbers(num_classes: int | None, names: Sequence[str]) -> tuple[str, ...] | None:
    """Return 0..num_classes-1 as names if all names are among them."""
    numbers = tuple(map(str, range(num_classes or 0)))
    return numbers if set(names) <= set(numbers) else None


def _sorted_names(names: set[str]) -> list[str]:
    """Return names sorted by number if all are whole numbers, else by letters."""
    return sorted(names, key=int if all(name.isdecimal() for name in names) else str)


def _column(targets: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return targets[:, 0] if targets.ndim == 2 and targets.shape[1] == 1 else targets


def _tensor(array: npt.NDArray[Any] | None) -> Tensor | None:
    return None if array is None else torch.from_numpy(array.astype(np.int64))
