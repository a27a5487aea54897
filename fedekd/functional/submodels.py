"""Models within models: clients hold the first layers, or the first channels, of the server's (DepthFL, ScaleFL)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedekd.functional.aggregation import average_state_dicts, cast_like, to_float64


def submodel_state_dict(whole: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """The part of a model that a smaller one holds: of each of its tensors the leading entries along every dimension.

    Args:
        whole: State dict of the larger model.
        shapes: By name the shapes of the smaller model's tensors.

    Returns:
        Views of the larger model's tensors, in the order of `shapes`.

    Raises:
        ValueError: The larger model has no such tensor, or a smaller one; the message names it.

    Example:
        >>> submodel_state_dict({"a": torch.arange(6).view(2, 3), "b": torch.zeros(1)}, {"a": (1, 2)})
        {'a': tensor([[0, 1]])}
    """
    regions = {name: _region(whole, name, shape) for name, shape in shapes.items()}
    return {name: whole[name][region] for name, region in regions.items()}


def average_submodels(
    whole: Mapping[str, Tensor], state_dicts: Sequence[Mapping[str, Tensor]], weights: Sequence[float]
) -> dict[str, Tensor]:
    r"""Average entry by entry over those clients that hold the entry, $\sum_{k \in K_j} w_k \theta_{kj} / \sum w_k$.

    What nobody holds stays as it was. Sums run in float64, in the order given; integers are rounded to the nearest.

    Args:
        whole: State dict of the server's model, which every client's is nested in.
        state_dicts: One for each client; a client may lack tensors, and have smaller ones.
        weights: One for each state dict, at least 0; a state of weight 0 is left out.

    Returns:
        A new state dict, in the order of `whole`.

    Raises:
        ValueError: A client's tensor is not nested in the server's, or there is not one weight for each, finite and at
            least 0.

    Example:
        >>> clients = [{"a": torch.tensor([2.0])}, {"a": torch.tensor([4.0, 6.0])}]
        >>> average_submodels({"a": torch.zeros(3)}, clients, weights=[1, 1])
        {'a': tensor([3., 6., 0.])}
    """
    if len(weights) != len(state_dicts):
        raise ValueError(f"there are {len(weights)} weights for {len(state_dicts)} state dicts")
    if not all(0 <= weight < math.inf for weight in weights):
        raise ValueError(f"weights must be finite and not negative, but are {list(weights)}")
    kept = [(weight, state) for weight, state in zip(weights, state_dicts, strict=True) if weight > 0]
    for _, state in kept:
        for name, tensor in state.items():
            _region(whole, name, tensor.shape)
    return {name: _average(name, tensor.detach(), kept) for name, tensor in whole.items()}


def _average(name: str, whole: Tensor, kept: Sequence[tuple[float, Mapping[str, Tensor]]]) -> Tensor:
    """One tensor's average over those who hold it, entry by entry."""
    held = [(weight, state[name]) for weight, state in kept if name in state]
    if not held:
        return whole.clone()
    if all(tensor.shape == whole.shape for _, tensor in held):
        weights, tensors = zip(*held, strict=True)
        return average_state_dicts([{name: tensor} for tensor in tensors], weights)[name].to(whole.device)
    sums = torch.zeros_like(to_float64(whole, whole))
    totals = torch.zeros_like(sums)
    for weight, tensor in held:
        region = tuple(slice(size) for size in tensor.shape)
        sums[region] += weight * to_float64(tensor, whole)
        totals[region] += weight
    return torch.where(totals > 0, cast_like(sums / totals, whole), whole)


def _region(whole: Mapping[str, Tensor], name: str, shape: Sequence[int]) -> tuple[slice, ...]:
    """The leading entries of a tensor."""
    if name not in whole:
        raise ValueError(f"the larger model has no '{name}'")
    outer = whole[name].shape
    if len(outer) != len(shape) or any(small > large for small, large in zip(shape, outer, strict=True)):
        raise ValueError(f"'{name}' is {tuple(shape)}, which is not nested in {tuple(outer)}")
    return tuple(slice(size) for size in shape)
