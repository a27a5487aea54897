"""Euclidean projection onto the probability simplex."""

from __future__ import annotations

from torch import Tensor, arange

from fedekd.functional.precision import upcast_to_float32


def project_to_simplex(v: Tensor) -> Tensor:
    r"""Project vectors onto the probability simplex.

    $$\arg\min_{w \ge 0,\, \sum_j w_j = 1} \|w - v\|_2 = \max(v - \theta, 0)$$

    with the unique $\theta$ for which the entries sum to 1. Adding a constant to all entries of v has no effect.

    Args:
        v: Shape (n,), or (m, n) for m projections; finite, n at least 1.

    Returns:
        Weights of at least 0 that sum to 1, of v's shape.

    Raises:
        ValueError: If the shape is neither, or n is 0.

    Example:
        >>> import torch
        >>> project_to_simplex(torch.tensor([0.5, 0.3, -2.0]))
        tensor([0.6000, 0.4000, 0.0000])

    Reference:
        Held, Wolfe and Crowder, 1974; Duchi et al., ICML 2008, Fig. 1.
    """
    if v.ndim not in (1, 2) or not v.shape[-1]:
        raise ValueError(f"v: expected shape (n,) or (m, n) with n >= 1, got {tuple(v.shape)}")
    v = upcast_to_float32(v)
    # The largest entry becomes 0, so that a large common offset costs no digits.
    shifted = v - v.max(dim=-1, keepdim=True).values
    descending = shifted.sort(dim=-1, descending=True).values
    count = arange(1, v.shape[-1] + 1, device=v.device, dtype=v.dtype)
    thresholds = (descending.cumsum(dim=-1) - 1) / count
    # The largest entries stay positive; the smallest of them determines theta.
    support = (descending > thresholds).sum(dim=-1, keepdim=True)
    theta = thresholds.gather(-1, support - 1)
    return (shifted - theta).clamp_min(0)
