"""Sites that are a torch Dataset or a LightningDataModule of the user."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import ConcatDataset, IterableDataset, Subset
from tqdm import tqdm  # type: ignore[import-untyped]

from fedekd.class_paths import build_object
from fedekd.data.raw import SPLITS, RawSamples, ReadOptions, names_of
from fedekd.data.readers import StoredPart
from fedekd.data.stored import StoredInputs
from fedekd.errors import UserError, describe_error, shorten

Array = npt.NDArray[Any]

#: Attributes that may hold the labels of all samples.
_TARGETS = ("targets", "labels")

GROUP_ATTRIBUTE = "groups"
"""Name of the attribute with groups if `data.group_column` is not given."""


def is_dataset(source: Any) -> bool:
    """Return whether the source of a site is a class path or an object."""
    if isinstance(source, Mapping):
        return "class_path" in source
    return isinstance(source, LightningDataModule) or (hasattr(source, "__getitem__") and not isinstance(source, str))


def read_dataset(site: str, source: Any, options: ReadOptions) -> RawSamples:
    """Read the labels of a data set; its inputs stay stored.

    Items are `(input, label)`; see `StoredPart` for inputs. Labels are those in the attribute `targets` or `labels`, or
    are read in one pass. Optional attributes are `classes`, names of the classes 0, 1, ..., and `groups` or the one in
    `data.group_column`, a group per sample. Of a LightningDataModule the data sets of its loaders are read as given
    splits.

    Args:
        site: Name of the site.
        source: Mapping with `class_path` and optionally `init_args`; or a data set, or data module.
        options: The group column.

    Raises:
        UserError: If it cannot be imported or built, is an IterableDataset, or an item or label is invalid.
    """
    title, identity = f"site {site!r}", ""
    if isinstance(source, Mapping):
        identity = json.dumps(dict(source), sort_keys=True, default=repr)
        source = build_object(f"data.sites: {site!r}", source)
    if isinstance(source, LightningDataModule):
        parts = _loaded(title, source)
    else:
        parts = {None: _checked_dataset(title, source)}
    read = [_read_part(title, dataset, f"{identity} {split}", options) for split, dataset in parts.items()]
    splits = None
    if None not in parts:
        numbers = np.asarray([SPLITS.index(str(split)) for split in parts], np.int8)
        splits = np.repeat(numbers, [len(one.part) for one in read])
    groups = None
    if any(part.groups is not None for part in read):  # of splits without groups each sample is one
        groups = np.concatenate(
            [
                np.asarray([f"{split} {index:09}" for index in range(len(one.part))])
                if one.groups is None
                else names_of(one.groups)
                for split, one in zip(parts, read, strict=True)
            ]
        )
    return RawSamples(
        StoredInputs([one.part for one in read]),
        np.concatenate([part.targets for part in read]),
        class_names=read[0].class_names,
        group=groups,
        split=splits,
    )


class _Read(NamedTuple):
    """One data set and the values of its samples."""

    part: StoredPart
    targets: Array
    class_names: tuple[str, ...] | None
    groups: Array | None


def _read_part(title: str, dataset: Any, identity: str, options: ReadOptions) -> _Read:
    part = StoredPart(dataset, title, identity, is_pair=True)
    targets = _targets(part)
    column = options.group_column or GROUP_ATTRIBUTE
    groups = _attribute(dataset, column)
    if groups is None and options.group_column is not None:
        raise UserError(f"data.group_column: {title}: expected an attribute of the data set, got {column!r}")
    names = _attribute_of(dataset, "classes")
    is_named = isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)
    return _Read(
        part,
        targets,
        tuple(names) if is_named and targets.dtype.kind in "iu" else None,
        None if groups is None else _column(title, column, groups, len(part)),
    )


def _targets(part: StoredPart) -> Array:
    """Return the label of each sample, from an attribute or one pass."""
    for name in _TARGETS:
        if (values := _attribute(part.items, name)) is not None:
            targets = _column(part.title, name, values, len(part))
            if (label := _label(part, 0, part.read_item(0))) != targets[0]:
                raise UserError(
                    f"{part.title}: expected the labels of the items in the attribute {name}, got"
                    f" {shorten(repr(label))} in sample 0 and {shorten(repr(targets[0].item()))} in {name}. Rename it,"
                    " and labels are read from the items"
                )
            return targets
    positions = tqdm(range(len(part)), desc=f"labels of {part.title}", disable=None, leave=False)
    return np.asarray([_label(part, index, part.read_item(index)) for index in positions])


def _label(part: StoredPart, index: int, item: Any) -> Any:
    """Return the label of an item as a Python value."""
    part.to_input(item, index)
    label = item[1]
    if isinstance(label, torch.Tensor | np.ndarray | np.generic) and np.prod(label.shape) == 1:
        label = label.item()
    if not isinstance(label, str | int | float):
        raise UserError(
            f"{part.title}: expected one number or name as label, got {shorten(repr(item[1]))} in sample {index}"
        )
    return label


def _column(title: str, name: str, values: Any, length: int) -> Array:
    """Return an attribute with one value per sample as an array."""
    try:
        array = np.asarray(values.cpu() if isinstance(values, torch.Tensor) else [*map(_plain, values)])
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{title}: expected one value per sample in the attribute {name}. It failed: {describe_error(error, 150)}"
        ) from error
    if array.shape not in ((length,), (length, 1)):
        raise UserError(
            f"{title}: expected {length} values in the attribute {name}, one per sample, got shape {array.shape}"
        )
    return array.reshape(length)


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else value


def _attribute(dataset: Any, name: str) -> Any:
    """Return an attribute with a value per sample; None without it."""
    if isinstance(dataset, Subset):
        values = _attribute(dataset.dataset, name)
        return None if values is None else [values[index] for index in dataset.indices]
    if isinstance(dataset, ConcatDataset):
        parts = [_attribute(part, name) for part in dataset.datasets]
        return None if any(part is None for part in parts) else [value for part in parts for value in part]
    return getattr(dataset, name, None)


def _attribute_of(dataset: Any, name: str) -> Any:
    """Return an attribute of the whole data set, also that of which it is a part."""
    while isinstance(dataset, Subset | ConcatDataset):
        dataset = dataset.dataset if isinstance(dataset, Subset) else dataset.datasets[0]
    return getattr(dataset, name, None)


def _checked_dataset(title: str, dataset: Any) -> Any:
    """Return a data set with length and items.

    Raises:
        UserError: If it is none, or an IterableDataset.
    """
    if isinstance(dataset, IterableDataset):
        raise UserError(
            f"{title}: expected a data set with __len__ and __getitem__, got the IterableDataset"
            f" {type(dataset).__name__}. Samples are read in a new order in every epoch"
        )
    try:
        length = len(dataset)
    except Exception as error:  # a user's data set may raise anything
        raise UserError(
            f"{title}: expected a data set with __len__, got a {type(dataset).__name__}. {describe_error(error, 150)}"
        ) from error
    if not hasattr(dataset, "__getitem__"):
        raise UserError(f"{title}: expected a data set with __getitem__, got a {type(dataset).__name__}")
    if not length:
        raise UserError(f"{title}: expected at least one sample, got none")
    return dataset


def _loaded(title: str, module: LightningDataModule) -> dict[str | None, Any]:
    """Return the data set of each split of a data module.

    Raises:
        UserError: If a hook fails, or a loader is not one DataLoader.
    """
    try:
        module.prepare_data()
        for stage in ("fit", "test"):
            module.setup(stage)
    except Exception as error:  # a user's data module may raise anything
        raise UserError(
            f"{title}: expected prepare_data and setup of {type(module).__name__} to succeed. They failed:"
            f" {describe_error(error)}"
        ) from error
    found: dict[str | None, Any] = dict(_datasets(title, module))
    if not found:
        raise UserError(f"{title}: expected a train_dataloader in {type(module).__name__}, got none")
    return found


def _datasets(title: str, module: LightningDataModule) -> Iterator[tuple[str, Any]]:
    for split in SPLITS:
        hook = f"{split}_dataloader"
        if getattr(type(module), hook) is getattr(LightningDataModule, hook):
            continue
        try:
            loader = getattr(module, hook)()
        except Exception as error:  # a user's data module may raise anything
            raise UserError(f"{title}: expected {hook} to succeed. It failed: {describe_error(error)}") from error
        if isinstance(loader, Sequence) and len(loader) == 1:
            loader = loader[0]
        if loader is None or loader == []:
            continue
        if not hasattr(loader, "dataset"):
            raise UserError(f"{title}: expected one DataLoader from {hook}, got {shorten(repr(loader))}")
        yield split, _checked_dataset(title, loader.dataset)
