"""Samples of a federation: inputs, targets, sites, groups and splits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha256
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedekd.data.columns import Column
from fedekd.data.pixels import byte_warnings, checked_images, to_pixels
from fedekd.data.raw import SPLITS
from fedekd.data.stored import Inputs, StoredInputs, take_inputs
from fedekd.errors import UserError, shorten
from fedekd.tasks import Task, require_task

#: Labels that usually mean "unknown", in addition to the largest value of the array's type.
_UNKNOWN_LABELS = (255, 65535)

#: float32 holds squares and sums of standardised values only; scores in the unit of the targets must be finite.
_LARGEST_TARGET = 1e30

_LEAVE_OUT = "Leave out an unknown label by --data.ignore_label"


@dataclass(frozen=True, eq=False)
class Samples:
    """N samples of a federation: one input and one target each.

    Args:
        name: Name of the data set.
        inputs: Pixels 0..255, uint8, or in [-1, 1], float32, shape (N, C, H, W), contiguous; stored if they are not
            resident. Of a table: features, float32, shape (N, F); before preprocessing its values, float64, shape
            (N, columns), with indices of categories and NaN for missing values.
        targets: Classes, int64; grades, float32; or real numbers, float64; shape (N,).
        task: `classification` or `regression`.
        num_classes: Number of classes or grades, whose labels are 0..num_classes-1; 0 if the targets are real numbers.
        class_names: Names of the classes or grades. Default: their numbers.
        split: Given split of each sample, index into `SPLITS`, int64, shape (N,); None without given splits.
        site: Site of each sample, index into `site_names`, int64, shape (N,); None without sites.
        site_names: Names of the sites.
        group: Number of the group of each sample, such as a patient, int64, shape (N,); None without groups.
        group_names: Names of the groups in the data; two sites may have the same name for different groups.
        ignore_label: Label whose samples were left out. Default None.
        columns: Feature columns of a table; empty for images.
        warnings: What a user should know of the data; one line each.
    """

    name: str
    inputs: Inputs
    targets: Tensor
    task: Task
    num_classes: int
    class_names: tuple[str, ...] = ()
    split: Tensor | None = None
    site: Tensor | None = None
    site_names: tuple[str, ...] = ()
    group: Tensor | None = None
    group_names: tuple[str, ...] = ()
    ignore_label: int | None = None
    columns: tuple[Column, ...] = ()
    warnings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.class_names:
            object.__setattr__(self, "class_names", tuple(map(str, range(self.num_classes))))

    @classmethod
    def from_arrays(
        cls,
        name: str,
        images: Any,
        targets: npt.NDArray[Any],
        task: Task,
        num_classes: int | None,
        ignore_label: int | None = None,
        value_range: Sequence[float] | None = None,
        **fields: Any,
    ) -> Samples:
        """Validate the arrays of a data file and convert them to tensors.

        Args:
            name: Name of the data set.
            images: uint8, or 16-bit or float values in `value_range`, shape (N, H, W) or (N, H, W, C) with 1, 3 or 4
                channels, at least 8 x 8 pixels. With the field `columns`: values of a table, shape (N, columns). Or
                `StoredInputs`, whose pixels are not examined.
            targets: Numbers, shape (N,) or, as in MedMNIST, (N, 1); in classification whole numbers.
            task: `classification` or `regression`.
            num_classes: Number of classes or grades; None for the largest label + 1, or 0 for regression targets that
                are not whole numbers or of a table.
            ignore_label: Samples with this label are left out. Default None.
            value_range: Lowest and highest value of 16-bit and float images; see `to_pixels`. Default None.
            **fields: Other fields of `Samples`; tensors have shape (N,). And `ignored`, bool, shape (N,): samples with
                `ignore_label`, if `targets` are not the labels in the data. Default None.

        Raises:
            UserError: If the arrays are not as described above, if no pixel is above 1 or all are equal, or if the
                largest label seems to mean "unknown" and `num_classes` is None.
        """
        require_task(task)
        is_table, is_stored = bool(fields.get("columns")), isinstance(images, StoredInputs)
        pixels: Any = images
        range_warnings: list[str] = []
        if not (is_table or is_stored):
            pixels, range_warnings = to_pixels(name, checked_images(name, images), value_range)
        values = _checked_targets(name, targets, task == "regression" and num_classes is None)
        if len(pixels) != len(values):
            raise UserError(
                f"data.dataset: {name!r}: expected one label per image, got {len(pixels)} images and "
                f"{len(values)} labels"
            )
        warnings, ignored = list(fields.pop("warnings", ())), fields.pop("ignored", None)
        if ignore_label is not None:
            kept = values != ignore_label if ignored is None else ~ignored
            warnings.append(
                f"data.ignore_label: {len(kept) - kept.sum()} of {len(kept)} samples of {name!r} have the label"
                f" {ignore_label} and are left out"
            )
            if not kept.any():
                raise UserError(
                    f"data.ignore_label: {name!r}: expected samples with other labels than {ignore_label}, got none"
                )
            if not kept.all():
                pixels, values = take_inputs(pixels, kept), values[kept]
                mask = torch.from_numpy(kept)
                fields |= {key: value[mask] for key, value in fields.items() if isinstance(value, Tensor)}
        if values.dtype.kind == "f" or (is_table and task == "regression" and num_classes is None):
            num_classes = 0
        else:
            num_classes, gaps = _checked_classes(name, values, targets.dtype, task, num_classes)
            warnings += gaps
        if not is_stored:
            warnings += [*range_warnings, *([] if is_table else byte_warnings(name, pixels))]
            pixels = torch.from_numpy(np.ascontiguousarray(pixels if is_table else pixels.transpose(0, 3, 1, 2)))
        return cls(
            name=name,
            inputs=pixels,
            targets=torch.from_numpy(
                values if task == "classification" else _as_float(values, is_real=not num_classes)
            ),
            task=task,
            num_classes=num_classes,
            ignore_label=ignore_label,
            warnings=tuple(warnings),
            **fields,
        )

    def __len__(self) -> int:
        return len(self.inputs)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Channels, height and width of an image, or number of features."""
        return tuple(self.inputs.shape[1:])

    @property
    def feature_names(self) -> tuple[str, ...]:
        """Names of a table's features after preprocessing, as `age` or `sex=1`."""
        numeric = [column.name for column in self.columns if column.kind == "numeric"]
        return (*numeric, *(f"{column.name}={text}" for column in self.columns for text in column.categories))

    @property
    def labels(self) -> Tensor:
        """Classes or grades, int64, shape (N,); zeros for real-valued targets."""
        return self.targets.to(torch.int64) if self.num_classes else torch.zeros_like(self.targets, dtype=torch.int64)

    @property
    def has_numbered_classes(self) -> bool:
        """True if the names of the classes are their numbers."""
        return self.class_names == tuple(map(str, range(len(self.class_names))))

    @property
    def split_sizes(self) -> dict[str, int]:
        """Samples in each given split; all are in the first if none are given."""
        split = torch.zeros(len(self), dtype=torch.int64) if self.split is None else self.split
        return dict(zip(SPLITS, torch.bincount(split, minlength=len(SPLITS)).tolist(), strict=True))

    @property
    def num_outputs(self) -> int:
        """Number of network outputs: one per class; 1 in regression."""
        return self.num_classes if self.task == "classification" else 1

    def one_per_group(self, indices: Tensor, seed: int) -> Tensor:
        """Draw one sample of each group uniformly; all without groups.

        Args:
            indices: Samples, int64, shape (n,).
            seed: Seed of the draw.

        Returns:
            Positions in `indices`, ascending, int64.
        """
        if self.group is None:
            return torch.arange(len(indices))
        order = torch.randperm(len(indices), generator=torch.Generator().manual_seed(seed))
        _, first = np.unique(self.group[indices[order]].numpy(), return_index=True)
        return order[torch.from_numpy(first)].sort().values

    def take(self, indices: npt.NDArray[np.int64]) -> Samples:
        """Return the samples at `indices`, shape (n,)."""
        parts = {
            name: take_inputs(getattr(self, name), torch.from_numpy(indices))
            for name in ("inputs", "targets", "split", "site", "group")
            if getattr(self, name) is not None
        }
        return replace(self, **parts)

    def digest(self) -> str:
        """Return the SHA-256 (hex) of task, shape, inputs and targets, not of the name."""
        return self._digest

    @cached_property
    def _digest(self) -> str:
        return content_digest(self, [torch.arange(len(self))])


def content_digest(data: Samples, groups: list[Tensor]) -> str:
    """Return the SHA-256 (hex) of the task and of groups of samples, in order.

    Stored inputs are not all read; see `StoredInputs.digest`.

    Args:
        data: The images and targets.
        groups: Index tensors, int64; the sizes of the groups enter the digest.
    """
    digest = sha256(f"{data.task} {data.num_classes} {tuple(data.inputs.shape[1:])}".encode())
    for group in groups:
        digest.update(f" {len(group)} ".encode())
        # In parts: a copy of a large data set would double its memory.
        for part in torch.split(group, 4096):
            if not isinstance(data.inputs, StoredInputs):
                digest.update(data.inputs[part].cpu().numpy().tobytes())
            digest.update(data.targets[part].cpu().numpy().tobytes())
        if isinstance(data.inputs, StoredInputs):
            digest.update(data.inputs.digest(group))
    return digest.hexdigest()


def _num_classes(name: str, labels: npt.NDArray[np.int64], dtype: np.dtype[Any]) -> int:
    """Return the largest label + 1.

    Raises:
        UserError: If the largest label is no class: it is above the number of samples, or it is a value that usually
            means "unknown" and the others are 0..k without gaps, all below its half.
    """
    highest = int(labels.max())
    values = np.unique(labels[labels >= 0])
    unknown = {*_UNKNOWN_LABELS, *([np.iinfo(dtype).max] if dtype.kind in "iu" else [])}
    is_unknown = (
        highest in unknown and len(values) > 2 and values[-2] == len(values) - 2 and int(values[-2]) < highest / 2
    )
    if is_unknown or highest >= max(len(labels), 2):
        raise UserError(
            f"data.dataset: {name!r}: expected labels 0..num_classes-1, got label {highest} among "
            f"{len(labels)} samples. Set data.num_classes if it is a class. {_LEAVE_OUT} {highest}."
        )
    return highest + 1


def one_column(name: str, targets: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return targets of shape (N, 1) as shape (N,).

    Raises:
        UserError: If there are several columns, such as one-hot labels.
    """
    if targets.ndim == 2 and targets.shape[1] == 1:
        targets = targets[:, 0]
    if targets.ndim != 1:
        raise UserError(
            f"data.dataset: labels of {name!r}: expected one label per image, shape (N,) or (N, 1), got"
            f" {targets.shape}. Convert one-hot labels with labels.argmax(axis=1); several labels per sample"
            " are not supported"
        )
    return targets


def _checked_targets(name: str, targets: npt.NDArray[Any], may_be_real: bool) -> npt.NDArray[Any]:
    """Return valid targets, shape (N,): int64, or float64 if not all are whole."""
    targets = one_column(name, targets)
    allowed = f"finite numbers up to {_LARGEST_TARGET:g}" if may_be_real else "whole numbers"
    if targets.dtype.kind not in "biuf":
        raise UserError(f"data.dataset: labels of {name!r}: expected {allowed}, got {_kind(targets)}")
    whole = (targets == np.floor(targets)) & (np.abs(targets.astype(np.float64)) < 2**53)
    valid = np.abs(targets.astype(np.float64)) <= _LARGEST_TARGET if may_be_real else whole
    if not valid.all():
        value = targets[~valid][0]
        hint = "" if may_be_real or not np.isfinite(value) else ". For real-valued targets set --data.task regression"
        raise UserError(f"data.dataset: labels of {name!r}: expected {allowed}, got {value}{hint}")
    return targets.astype(np.int64 if whole.all() else np.float64)


def _as_float(values: npt.NDArray[Any], is_real: bool) -> npt.NDArray[Any]:
    """Return targets of regression; real ones need their precision."""
    return values.astype(np.float64 if is_real else np.float32)


def _kind(targets: npt.NDArray[Any]) -> str:
    return shorten(repr(targets[0])) if targets.dtype == object and len(targets) else str(targets.dtype)


def _checked_classes(
    name: str, labels: npt.NDArray[np.int64], dtype: np.dtype[Any], task: Task, num_classes: int | None
) -> tuple[int, list[str]]:
    """Return the number of classes, and warnings.

    Raises:
        UserError: If a label is not in 0..num_classes-1.
    """
    inferred = num_classes is None
    num_classes = _num_classes(name, labels, dtype) if num_classes is None else num_classes
    if num_classes < 2 and labels.min() >= 0:
        raise UserError(f"data.num_classes: {name!r}: expected at least 2, got {num_classes}")
    lowest, highest = int(labels.min()), int(labels.max())
    if lowest < 0 or highest >= num_classes:
        wrong = lowest if lowest < 0 else highest
        raise UserError(
            f"data.dataset: {name!r}: expected labels 0..{num_classes - 1} for {num_classes} classes, got label "
            f"{wrong}. Correct the labels or data.num_classes. {_LEAVE_OUT} {wrong}."
        )
    present = len(np.unique(labels))
    if not (inferred and task == "classification" and present < num_classes):
        return num_classes, []
    return num_classes, [
        f"data.dataset: {name!r}: {num_classes - present} of {num_classes} classes (labels 0..{highest}) have"
        f" no sample. Number the labels from 0 without gaps, or leave one out by --data.ignore_label"
    ]
