"""Conversion of tensors to float32, and a test for finite values."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def upcast_to_float32(t: Tensor) -> Tensor:
    """Convert float16, bfloat16 and integer tensors to float32; keep other dtypes.

    Under mixed precision, logits are in half precision: bfloat16 has 8 significant bits, and the largest float16 is
    65504, less than the energy (Eq. 1) of two confident models that disagree. Gradients have the dtype of `t`.

    Example:
        >>> upcast_to_float32(torch.zeros(1, dtype=torch.bfloat16)).dtype
        torch.float32
        >>> upcast_to_float32(torch.zeros(1, dtype=torch.float64)).dtype
        torch.float64
    """
    return t.to(torch.promote_types(t.dtype, torch.float32))


def at_least_float32(t: Tensor) -> Tensor:
    """Convert float16, bfloat16 and types of 8 bits to float32; keep other dtypes.

    complex32 becomes complex64. Types of 8 bits, which PyTorch does not promote, have no arithmetic.

    Example:
        >>> at_least_float32(torch.zeros(1, dtype=torch.float8_e5m2)).dtype
        torch.float32
        >>> at_least_float32(torch.zeros(1, dtype=torch.int64)).dtype
        torch.int64
    """
    if t.dtype == torch.complex32:
        return t.to(torch.complex64)
    return t.float() if t.is_floating_point() and t.itemsize < torch.float32.itemsize else t


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Return True if no value of the tensors, of any dtype, is NaN or infinite.

    A finite sum has finite terms only, and takes a tenth of the time of a test of each. A sum that overflows decides
    nothing.

    Example:
        >>> all_finite([torch.full((2,), 3e38)]), all_finite([torch.ones(2), torch.tensor([float("nan")])])
        (True, False)
    """
    values = (at_least_float32(tensor.detach()) for tensor in tensors)
    return all(bool(value.sum().isfinite()) or bool(value.isfinite().all()) for value in values)
