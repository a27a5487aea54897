"""Augmentation of training batches, seeded per batch."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedekd.class_paths import build_object
from fedekd.errors import UserError, describe_error
from fedekd.global_state import isolated_rng

Transform = Callable[[Tensor], Any]

#: What `data.transform` accepts.
TransformSpec = str | Mapping[str, Any] | Sequence[Any]

_PACKAGE = "torchvision.transforms.v2"


def build_transform(spec: TransformSpec) -> Transform:
    """Build a transform, or several that are applied in order.

    Args:
        spec: A name of `torchvision.transforms.v2` or a class path; a mapping with `class_path` and optionally
            `init_args`, whose values may be such mappings; or a list of these.

    Raises:
        UserError: If one cannot be imported or built, or is not callable.

    Example:
        >>> flip = build_transform({"class_path": "RandomHorizontalFlip", "init_args": {"p": 1.0}})
        >>> flip(torch.arange(3)[None, None])
        tensor([[[2, 1, 0]]])
    """
    specs = [spec] if isinstance(spec, str | Mapping) or not isinstance(spec, Sequence) else spec
    if not specs:
        raise UserError("data.transform: expected at least one transform, got []. Use null for none")
    return _Steps(tuple(_build(item) for item in specs))


class _Steps:
    """Transforms that are applied in order; can be sent to another process."""

    def __init__(self, steps: tuple[Transform, ...]) -> None:
        self.steps = steps

    def __call__(self, x: Tensor) -> Any:
        for step in self.steps:
            x = step(x)
        return x


def _build(spec: Any) -> Transform:
    transform = build_object("data.transform", spec, _PACKAGE)
    if not callable(transform):
        raise UserError(
            f"data.transform: expected a transform, got a {type(transform).__name__}, which is not callable"
        )
    return transform  # type: ignore[no-any-return]


def augment(inputs: Tensor, transform: Transform, seed: int) -> Tensor:
    """Transform each sample of a batch.

    Args:
        inputs: Pixels 0..255, uint8, or in [-1, 1], float32, shape (B, C, H, W).
        transform: Gets one sample, (C, H, W), and returns a tensor of the same shape and type. Float pixels are in
            [0, 1] before and after it, as torchvision's transforms expect, and in [-1, 1] in the result.
        seed: Seed of PyTorch's, NumPy's and Python's generators, which are restored afterwards.

    Raises:
        UserError: If the transform fails, or changes the shape or the type.
    """
    with seeded_generators(seed, inputs.device):
        if not inputs.is_floating_point():
            return torch.stack([_transformed(x, transform) for x in inputs])
        return torch.stack([_transformed((x + 1) / 2, transform) for x in inputs]) * 2 - 1


def _transformed(x: Tensor, transform: Transform) -> Tensor:
    try:
        result = transform(x)
    except Exception as error:  # a user's transform may raise anything
        raise UserError(
            f"data.transform: expected to accept a {x.dtype} tensor {tuple(x.shape)}. It failed:"
            f" {describe_error(error)}"
        ) from error
    if not isinstance(result, Tensor):
        raise UserError(f"data.transform: expected to return a tensor, got a {type(result).__name__}")
    if result.shape != x.shape or result.dtype != x.dtype:
        raise UserError(
            f"data.transform: expected to keep shape and type, {tuple(x.shape)} and {x.dtype}, got"
            f" {tuple(result.shape)} and {result.dtype}. Images are scaled to [-1, 1] afterwards"
        )
    return result


def check_transform(spec: TransformSpec, inputs: Tensor) -> None:
    """Build a transform, and apply it to a batch.

    Args:
        spec: See `build_transform`.
        inputs: Pixels or float inputs.

    Raises:
        UserError: If the inputs are features of a table, or as `build_transform` and `augment`.
    """
    transform = build_transform(spec)
    if inputs.ndim != 4:
        raise UserError("data.transform: expected null for tables: transforms augment images. Omit it")
    augment(inputs, transform, 0)


@contextmanager
def seeded_generators(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Context manager: seed the global generators, and restore them on exit.

    Those of PyTorch, NumPy and Python.

    Args:
        seed: Seed, a 63-bit integer.
        device: Device in use; see `isolated_rng`.
    """
    with isolated_rng(seed, device):
        numpy_state, python_state = np.random.get_state(), random.getstate()
        np.random.seed(seed % 2**32)
        random.seed(seed)
        try:
            yield
        finally:
            np.random.set_state(numpy_state)
            random.setstate(python_state)
