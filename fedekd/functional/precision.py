"""Enough digits for sums of exponentials, whatever precision the networks run in."""

from __future__ import annotations

import torch
from torch import Tensor


def upcast_to_float32(t: Tensor) -> Tensor:
    """`t` in float32 if it has less precision (float16, bfloat16, integers), otherwise `t` as it is.

    Under mixed precision, logits arrive in half precision: bfloat16 holds 8 bits, and float16 ends at
    65504, below the energies that Eq. 1 gives to two confident models that contradict each other. Gradients
    flow back in the dtype of `t`.

    Example:
        >>> upcast_to_float32(torch.zeros(1, dtype=torch.bfloat16)).dtype
        torch.float32
        >>> upcast_to_float32(torch.zeros(1, dtype=torch.float64)).dtype
        torch.float64
    """
    return t.to(torch.promote_types(t.dtype, torch.float32))
