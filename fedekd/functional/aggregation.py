"""Weighted averages of state dicts (FedeKD Algorithm 1, line 7)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def average_state_dicts(
    state_dicts: Sequence[Mapping[str, Tensor]], weights: Sequence[float] | None = None
) -> dict[str, Tensor]:
    r"""Compute the average of state dicts, $\sum_k w_k \theta_k / \sum_k w_k$.

    Sums run in float64 in the given order; sort by client for results that do not depend on the order of replies. A
    state of weight 0 is skipped, even if it has NaN. Results have the dtypes of the inputs and the device of the first
    one, and share no memory with it. Integers (BatchNorm's `num_batches_tracked`) are averaged and rounded to the
    nearest, ties to even, so the average of equal counters is that counter.

    Args:
        state_dicts: One per client, with equal keys, shapes and dtypes.
        weights: One per state dict, at least 0 and not all 0; only their ratios matter. None is the uniform average.

    Returns:
        A new state dict in the key order of the first one.

    Raises:
        ValueError: If there is no state dict, a weight is invalid, or a key, shape or dtype differs (the message has
            the key).

    Example:
        >>> a, b = {"weight": torch.tensor([1.0])}, {"weight": torch.tensor([3.0])}
        >>> average_state_dicts([a, b])
        {'weight': tensor([2.])}
        >>> average_state_dicts([a, b], weights=[30, 10])
        {'weight': tensor([1.5000])}
    """
    check_same_structure(state_dicts)
    shares = _normalize([1.0] * len(state_dicts) if weights is None else weights, len(state_dicts))
    weighted = [(share, state) for share, state in zip(shares, state_dicts, strict=True) if share > 0]
    return {key: _average([(share, state[key]) for share, state in weighted]) for key in state_dicts[0]}


def check_same_structure(state_dicts: Sequence[Mapping[str, Tensor]]) -> None:
    """Check that all state dicts have the keys, shapes and dtypes of the first one.

    Raises:
        ValueError: If there is no state dict, or a key, shape or dtype differs (the message has the key).
    """
    if not state_dicts:
        raise ValueError("state_dicts: expected at least one, got none")
    first = state_dicts[0]
    for index, state in enumerate(state_dicts):
        differing = first.keys() ^ state.keys()
        if differing:
            raise ValueError(f"state dict {index}: expected the keys of the first, differs in '{min(differing)}'")
        for key, tensor in state.items():
            if (tensor.shape, tensor.dtype) != (first[key].shape, first[key].dtype):
                raise ValueError(
                    f"'{key}' in state dict {index}: expected {first[key].dtype} {tuple(first[key].shape)} as in the"
                    f" first, got {tensor.dtype} {tuple(tensor.shape)}"
                )


def to_float64(tensor: Tensor, first: Tensor) -> Tensor:
    """Convert a tensor to float64 or complex128, detached, on the device of `first`."""
    return tensor.detach().to(device=first.device, dtype=torch.promote_types(first.dtype, torch.float64))


def cast_like(value: Tensor, first: Tensor) -> Tensor:
    """Convert a float64 result to the dtype of `first`; integers are rounded."""
    if not (first.is_floating_point() or first.is_complex()):
        value = value.round()
    return value.to(first.dtype)


def _normalize(weights: Sequence[float], count: int) -> list[float]:
    values = [float(weight) for weight in weights]
    if len(values) != count:
        raise ValueError(f"weights: expected {count}, one per state dict, got {len(values)}")
    if not all(0 <= value < math.inf for value in values):
        raise ValueError(f"weights: expected finite numbers of at least 0, got {values}")
    total = math.fsum(values)
    if total == 0:
        raise ValueError("weights: expected one above 0, got only 0")
    return [value / total for value in values]


def _average(terms: Sequence[tuple[float, Tensor]]) -> Tensor:
    first = terms[0][1]
    is_integer = not (first.is_floating_point() or first.is_complex())
    if is_integer and all(torch.equal(tensor.to(first.device), first) for _, tensor in terms[1:]):
        return first.detach().clone()  # a seed or a hash may be too large for float64
    total = terms[0][0] * to_float64(first, first)
    product = torch.empty_like(total)
    for share, tensor in terms[1:]:
        total += product.copy_(tensor.detach()).mul_(share)
    return cast_like(total, first)
