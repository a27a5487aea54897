"""A labelled image data set in memory."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedekd.errors import UserError
from fedekd.tasks import Task, require_task

CHANNELS = (1, 3, 4)
MIN_SIZE = 8

#: Pixel values of a data set that span less are reported: scaled to [-1, 1] they are almost constant.
_SMALL_SPAN = 32

#: Labels that usually mean "unknown", in addition to the largest value of the array's type.
_UNKNOWN_LABELS = (255, 65535)

_LEAVE_OUT = "Leave out an unknown label by --data.ignore_label"
_TO_UINT8 = "Convert images of range 0..1 with np.rint(255.0 * images).astype(np.uint8)."


@dataclass(frozen=True, eq=False)
class Samples:
    """Images of a data set, official splits pooled, with one target per image.

    Args:
        name: Name of the data set.
        inputs: Pixels 0..255, uint8, shape (N, C, H, W), contiguous.
        targets: Classes, int64, or in regression grades, float32; shape (N,).
        task: `classification` or `regression`.
        num_classes: Number of classes or grades; labels are 0..num_classes-1.
        splits: Sizes of the official splits, in the order in which they are pooled.
        ignore_label: Label whose samples were left out. Default None.
        warnings: What a user should know of the data; one line each.
    """

    name: str
    inputs: Tensor
    targets: Tensor
    task: Task
    num_classes: int
    splits: dict[str, int]
    ignore_label: int | None = None
    warnings: tuple[str, ...] = ()

    @classmethod
    def from_arrays(
        cls,
        name: str,
        images: npt.NDArray[Any],
        targets: npt.NDArray[Any],
        task: Task,
        num_classes: int | None,
        splits: dict[str, int],
        ignore_label: int | None = None,
    ) -> Samples:
        """Validate the arrays of a data file and convert them to tensors.

        Args:
            name: Name of the data set.
            images: uint8, shape (N, H, W) or (N, H, W, C) with 1, 3 or 4 channels, at least 8 x 8 pixels.
            targets: Whole numbers, shape (N,) or, as in MedMNIST, (N, 1).
            task: `classification` or `regression`.
            num_classes: Number of classes or grades; None for the largest label + 1.
            splits: Sizes of the official splits, in the order in which they are pooled; they sum to N.
            ignore_label: Samples with this label are left out of every split. Default None.

        Raises:
            UserError: If the arrays are not as described above, if no pixel is above 1 or all are equal, or if the
                largest label seems to mean "unknown" and `num_classes` is None.
        """
        require_task(task)
        pixels = checked_images(name, images)
        labels = _checked_labels(name, targets)
        if len(pixels) != len(labels):
            raise UserError(
                f"data.dataset: {name!r}: expected one label per image, got {len(pixels)} images and "
                f"{len(labels)} labels"
            )
        if sum(splits.values()) != len(pixels):
            raise ValueError(f"splits {splits} do not sum to {len(pixels)} images")
        warnings = []
        if ignore_label is not None:
            kept = labels != ignore_label
            warnings.append(
                f"data.ignore_label: {len(kept) - kept.sum()} of {len(kept)} samples of {name!r} have the label"
                f" {ignore_label} and are left out"
            )
            if not kept.any():
                raise UserError(
                    f"data.ignore_label: {name!r}: expected samples with other labels than {ignore_label}, got none"
                )
            parts = np.split(kept, np.cumsum(list(splits.values()))[:-1])
            splits = {split: int(part.sum()) for split, part in zip(splits, parts, strict=True)}
            if not kept.all():
                pixels, labels = pixels[kept], labels[kept]
        inferred = num_classes is None
        num_classes = _num_classes(name, labels, targets.dtype) if num_classes is None else num_classes
        if num_classes < 2:
            raise UserError(f"data.num_classes: {name!r}: expected at least 2, got {num_classes}")
        lowest, highest = int(labels.min()), int(labels.max())
        if lowest < 0 or highest >= num_classes:
            wrong = lowest if lowest < 0 else highest
            raise UserError(
                f"data.dataset: {name!r}: expected labels 0..{num_classes - 1} for {num_classes} classes, got label "
                f"{wrong}. Correct the labels or data.num_classes. {_LEAVE_OUT} {wrong}."
            )
        present = len(np.unique(labels))
        if inferred and task == "classification" and present < num_classes:
            warnings.append(
                f"data.dataset: {name!r}: {num_classes - present} of {num_classes} classes (labels 0..{highest}) have"
                f" no sample. Number the labels from 0 without gaps, or leave one out by --data.ignore_label"
            )
        warnings += _pixel_warnings(name, pixels)
        return cls(
            name=name,
            inputs=torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))),
            targets=torch.from_numpy(labels if task == "classification" else labels.astype(np.float32)),
            task=task,
            num_classes=num_classes,
            splits=dict(splits),
            ignore_label=ignore_label,
            warnings=tuple(warnings),
        )

    def __len__(self) -> int:
        return len(self.inputs)

    @property
    def in_channels(self) -> int:
        """Number of channels."""
        return self.inputs.shape[1]

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.inputs.shape[2], self.inputs.shape[3]

    @property
    def labels(self) -> Tensor:
        """Classes, or in regression grades, as int64, shape (N,)."""
        return self.targets.to(torch.int64)

    @property
    def num_outputs(self) -> int:
        """Number of network outputs: one per class; 1 in regression."""
        return self.num_classes if self.task == "classification" else 1

    def digest(self) -> str:
        """Return the SHA-256 (hex) of task, shape, pixels and targets, not of the name."""
        return self._digest

    @cached_property
    def _digest(self) -> str:
        return content_digest(self, [torch.arange(len(self))])


def content_digest(data: Samples, groups: list[Tensor]) -> str:
    """Return the SHA-256 (hex) of the task and of groups of samples, in order.

    Args:
        data: The images and targets.
        groups: Index tensors, int64; the sizes of the groups enter the digest.
    """
    digest = sha256(f"{data.task} {data.num_classes} {tuple(data.inputs.shape[1:])}".encode())
    for group in groups:
        digest.update(f" {len(group)} ".encode())
        # In parts: a copy of a large data set would double its memory.
        for part in torch.split(group, 4096):
            digest.update(data.inputs[part].cpu().numpy().tobytes())
            digest.update(data.targets[part].cpu().numpy().tobytes())
    return digest.hexdigest()


def checked_images(name: str, images: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """Validate images and return them with shape (N, H, W, C)."""
    if images.dtype != np.uint8:
        kind = f"{images.dtype}"
        if np.issubdtype(images.dtype, np.floating) and np.isnan(images).any():
            kind += " with NaN pixels"
        is_unit = images.dtype == bool or (
            images.dtype.kind == "f" and images.size and 0 <= images.min() <= images.max() <= 1
        )
        hint = f". {_TO_UINT8}" if is_unit else ""
        raise UserError(f"data.dataset: images of {name!r}: expected uint8, pixels 0..255, got {kind}{hint}")
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
    if images.max() == 1:
        raise UserError(
            f"data.dataset: images of {name!r}: expected uint8, pixels 0..255, got no pixel above 1. {_TO_UINT8}"
        )
    return images


def _pixel_warnings(name: str, pixels: npt.NDArray[np.uint8]) -> list[str]:
    """Check the range of all pixels of a data set.

    Raises:
        UserError: If all pixels are equal.
    """
    lowest, highest = int(pixels.min()), int(pixels.max())
    if lowest == highest:
        raise UserError(f"data.dataset: images of {name!r}: expected different pixels, got {highest} everywhere")
    if highest - lowest >= _SMALL_SPAN:
        return []
    return [f"data.dataset: images of {name!r} use only the pixel values {lowest}..{highest} of 0..255; rescale them"]


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


def _checked_labels(name: str, targets: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """Validate labels and return them as int64 of shape (N,)."""
    if targets.ndim == 2 and targets.shape[1] == 1:
        targets = targets[:, 0]
    if targets.ndim != 1:
        raise UserError(
            f"data.dataset: labels of {name!r}: expected one label per image, shape (N,) or (N, 1), got {targets.shape}"
        )
    if targets.dtype.kind not in "biuf":
        raise UserError(f"data.dataset: labels of {name!r}: expected whole numbers, got {targets.dtype}")
    whole = (targets == np.floor(targets)) & (np.abs(targets.astype(np.float64)) < 2**53)
    if not whole.all():
        raise UserError(f"data.dataset: labels of {name!r}: expected whole numbers, got {targets[~whole][0]}")
    return targets.astype(np.int64)
