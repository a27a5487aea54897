"""Checks of tensor shapes against silent broadcasting."""

from __future__ import annotations

from torch import Tensor


def require_matrix(**tensors: Tensor) -> None:
    """Check that all tensors have one shape (B, D).

    Raises:
        ValueError: If one is not a matrix, or two shapes differ.
    """
    for name, tensor in tensors.items():
        if tensor.ndim != 2:
            raise ValueError(f"{name}: expected shape (B, D), got {tuple(tensor.shape)}")
    require_same_shape(**tensors)


def require_same_shape(**tensors: Tensor) -> None:
    """Check that all tensors have one shape.

    Otherwise (B,) and (B, 1) would broadcast to (B, B).

    Raises:
        ValueError: If two shapes differ.

    Example:
        >>> import torch
        >>> require_same_shape(student=torch.zeros(4), teacher=torch.zeros(4, 1))
        Traceback (most recent call last):
        ValueError: expected equal shapes, got student (4,), teacher (4, 1)
    """
    first, *rest = (tensor.shape for tensor in tensors.values())
    if any(shape != first for shape in rest):  # not a set: sizes that torch.export traces have no hash
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
        raise ValueError(f"expected equal shapes, got {shapes}")
