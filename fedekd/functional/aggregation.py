"""The average of models, on which federated averaging rests (FedeKD Algorithm 1, line 7)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import reduce

import torch
from torch import Tensor


def average_state_dicts(
    state_dicts: Sequence[Mapping[str, Tensor]], weights: Sequence[float] | None = None
) -> dict[str, Tensor]:
    r"""The weighted average $\sum_k w_k \theta_k / \sum_k w_k$ of several models' state dicts.

    Sums run in float64, in the order given: the caller who wants the same bits whatever the order in which
    clients report sorts them first. A state of weight 0 is left out, were it NaN. Each result has its
    inputs' dtype and lies on the first one's device, without sharing memory with it. Integers (BatchNorm's
    `num_batches_tracked`) are averaged and rounded to the nearest, ties to even: so the average of equal
    counters is that counter, and weights count for them as for the running statistics they belong to.

    Args:
        state_dicts: One for each client, of equal keys, shapes and dtypes.
        weights: One for each state dict, at least 0 and not all 0; only their ratios matter. None averages
            uniformly.

    Returns:
        A new state dict, in the first one's key order.

    Raises:
        ValueError: There is nothing to average, the weights are not as above, or a key, a shape or a dtype
            differs (the message names the key).

    Example:
        >>> a, b = {"weight": torch.tensor([1.0])}, {"weight": torch.tensor([3.0])}
        >>> average_state_dicts([a, b])
        {'weight': tensor([2.])}
        >>> average_state_dicts([a, b], weights=[30, 10])
        {'weight': tensor([1.5000])}
    """
    require_alike(state_dicts)
    shares = _normalize([1.0] * len(state_dicts) if weights is None else weights, len(state_dicts))
    kept = [(share, state) for share, state in zip(shares, state_dicts, strict=True) if share > 0]
    return {key: _average([(share, state[key]) for share, state in kept]) for key in state_dicts[0]}


def require_alike(state_dicts: Sequence[Mapping[str, Tensor]]) -> None:
    """Hold all state dicts to the first one's keys, shapes and dtypes.

    Raises:
        ValueError: There is none, or a key, a shape or a dtype differs (the message names the key).
    """
    if not state_dicts:
        raise ValueError("there are no state dicts to average")
    first = state_dicts[0]
    for position, state in enumerate(state_dicts):
        differing = first.keys() ^ state.keys()
        if differing:
            raise ValueError(f"state dict {position} and the first differ in key '{min(differing)}'")
        for key, tensor in state.items():
            if (tensor.shape, tensor.dtype) != (first[key].shape, first[key].dtype):
                raise ValueError(
                    f"'{key}' is {tensor.dtype} {tuple(tensor.shape)} in state dict {position}, "
                    f"but {first[key].dtype} {tuple(first[key].shape)} in the first"
                )


def to_float64(tensor: Tensor, first: Tensor) -> Tensor:
    """The tensor in (at least) float64, without its graph, on the device of the `first`."""
    return tensor.detach().to(device=first.device, dtype=torch.promote_types(first.dtype, torch.float64))


def cast_like(value: Tensor, first: Tensor) -> Tensor:
    """A float64 result in the dtype of the `first` of its inputs; integers rounded to the nearest, ties to even."""
    if not (first.is_floating_point() or first.is_complex()):
        value = value.round()
    return value.to(first.dtype)


def _normalize(weights: Sequence[float], count: int) -> list[float]:
    values = [float(weight) for weight in weights]
    if len(values) != count:
        raise ValueError(f"there are {len(values)} weights for {count} state dicts")
    if not all(0 <= value < math.inf for value in values):
        raise ValueError(f"weights must be finite and not negative, but are {values}")
    total = math.fsum(values)
    if total == 0:
        raise ValueError("all weights are 0")
    return [value / total for value in values]


def _average(terms: Sequence[tuple[float, Tensor]]) -> Tensor:
    first = terms[0][1]
    return cast_like(reduce(torch.add, (share * to_float64(tensor, first) for share, tensor in terms)), first)
