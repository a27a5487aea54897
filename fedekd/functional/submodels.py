"""Submodels: leading layers or channels of the server's model (DepthFL, ScaleFL)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedekd.functional.aggregation import average_state_dicts, cast_like, to_float64


def submodel_state_dict(whole: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """Return the submodel of a state dict: the leading entries of each tensor.

    Args:
        whole: State dict of the larger model.
        shapes: Shapes of the submodel's tensors by name.

    Returns:
        Views of the larger model's tensors, in the order of `shapes`.

    Raises:
        ValueError: If the larger model has no such tensor, or a smaller one (the message has its name).

    Example:
        >>> submodel_state_dict({"a": torch.arange(6).view(2, 3), "b": torch.zeros(1)}, {"a": (1, 2)})
        {'a': tensor([[0, 1]])}
    """
    regions = {name: _region(whole, name, shape) for name, shape in shapes.items()}
    return {name: whole[name][region] for name, region in regions.items()}


def average_submodels(
    whole: Mapping[str, Tensor], state_dicts: Sequence[Mapping[str, Tensor]], weights: Sequence[float]
) -> dict[str, Tensor]:
    r"""Average each entry over the clients that hold it.

    $$\theta_j = \sum_{k \in K_j} w_k \theta_{kj} / \sum_{k \in K_j} w_k$$

    Entries without a holder keep their value. Sums run in float64 in the given order; integers are rounded.

    Args:
        whole: State dict of the server's model, in which every client's is nested.
        state_dicts: One per client; a client may have fewer and smaller tensors.
        weights: One per state dict, at least 0; a state of weight 0 is skipped.

    Returns:
        A new state dict in the order of `whole`.

    Raises:
        ValueError: If a client's tensor is not nested in the server's, or a weight is invalid.

    Example:
        >>> clients = [{"a": torch.tensor([2.0])}, {"a": torch.tensor([4.0, 6.0])}]
        >>> average_submodels({"a": torch.zeros(3)}, clients, weights=[1, 1])
        {'a': tensor([3., 6., 0.])}
    """
    if len(weights) != len(state_dicts):
        raise ValueError(f"weights: expected {len(state_dicts)}, one per state dict, got {len(weights)}")
    if not all(0 <= weight < math.inf for weight in weights):
        raise ValueError(f"weights: expected finite numbers of at least 0, got {list(weights)}")
    weighted = [(weight, state) for weight, state in zip(weights, state_dicts, strict=True) if weight > 0]
    for _, state in weighted:
        for name, tensor in state.items():
            _region(whole, name, tensor.shape)
    return {name: _average(name, tensor.detach(), weighted) for name, tensor in whole.items()}


def _average(name: str, whole: Tensor, weighted: Sequence[tuple[float, Mapping[str, Tensor]]]) -> Tensor:
    """Average one tensor over its holders, entry by entry."""
    parts = [(weight, state[name]) for weight, state in weighted if name in state]
    if not parts:
        return whole.clone()
    if all(tensor.shape == whole.shape for _, tensor in parts):
        weights, tensors = zip(*parts, strict=True)
        return average_state_dicts([{name: tensor} for tensor in tensors], weights)[name].to(whole.device)
    sums = torch.zeros_like(to_float64(whole, whole))
    totals = torch.zeros_like(sums)
    for weight, tensor in parts:
        region = tuple(slice(size) for size in tensor.shape)
        sums[region] += weight * to_float64(tensor, whole)
        totals[region] += weight
    return torch.where(totals > 0, cast_like(sums / totals, whole), whole)


def _region(whole: Mapping[str, Tensor], name: str, shape: Sequence[int]) -> tuple[slice, ...]:
    """Return the slices of a tensor's leading entries."""
    if name not in whole:
        raise ValueError(f"'{name}': expected a tensor of the larger model, which has none of this name")
    outer = whole[name].shape
    if len(outer) != len(shape) or any(small > large for small, large in zip(shape, outer, strict=True)):
        raise ValueError(f"'{name}': expected a shape nested in {tuple(outer)}, got {tuple(shape)}")
    return tuple(slice(size) for size in shape)
