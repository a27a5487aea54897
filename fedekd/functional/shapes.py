"""Shapes, checked where a silent broadcast would give a plausible and wrong number."""

from __future__ import annotations

from torch import Tensor


def require_matrix(**tensors: Tensor) -> None:
    """Hold all `tensors` to one shape (B, D).

    Raises:
        ValueError: One is not a matrix, or two differ in shape.
    """
    for name, tensor in tensors.items():
        if tensor.ndim != 2:
            raise ValueError(f"{name} must have shape (B, D), but has {tuple(tensor.shape)}")
    require_same_shape(**tensors)


def require_same_shape(**tensors: Tensor) -> None:
    """Hold all `tensors` to one shape: (B,) against (B, 1) would broadcast to (B, B).

    Raises:
        ValueError: Two differ in shape.

    Example:
        >>> import torch
        >>> require_same_shape(student=torch.zeros(4), teacher=torch.zeros(4, 1))
        Traceback (most recent call last):
        ValueError: shapes differ: student (4,), teacher (4, 1)
    """
    if len({tensor.shape for tensor in tensors.values()}) > 1:
        found = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
        raise ValueError(f"shapes differ: {found}")
