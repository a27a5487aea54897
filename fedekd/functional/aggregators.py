"""How a server merges its clients' models: small objects, so that a configuration names one by its class path."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Literal, get_args

import torch
from torch import Tensor

from fedekd.errors import UserError, nearest
from fedekd.functional.aggregation import average_state_dicts, cast_like, require_alike, to_float64

Weights = Literal["uniform", "samples"]


class Aggregator(ABC):
    """Merges the state dicts that came back from the clients into one.

    As in `average_state_dicts`, arithmetic runs in float64, the result has its inputs' dtypes and lies on the first
    one's device, integers (BatchNorm's counters) are rounded to the nearest, and states that differ in a key, a
    shape or a dtype, or none at all, raise a `ValueError`.
    """

    @abstractmethod
    def __call__(self, states: Sequence[Mapping[str, Tensor]], num_samples: Sequence[int]) -> dict[str, Tensor]:
        """Merge.

        Args:
            states: One for each client, of equal keys, shapes and dtypes.
            num_samples: How many training samples each of them has.

        Returns:
            A new state dict, in the first one's key order.
        """


class Mean(Aggregator):
    """The mean of the clients' models (McMahan et al., AISTATS 2017).

    Args:
        weights: uniform counts every client alike, samples by its training samples.
    """

    def __init__(self, weights: Weights = "uniform") -> None:
        if weights not in get_args(Weights):
            raise UserError(f"weights is {weights!r}, which is not known; {nearest(str(weights), get_args(Weights))}")
        self.weights = weights

    def __call__(self, states: Sequence[Mapping[str, Tensor]], num_samples: Sequence[int]) -> dict[str, Tensor]:
        """The mean, by `average_state_dicts`."""
        return average_state_dicts(states, num_samples if self.weights == "samples" else None)


class CoordinateMedian(Aggregator):
    """The median of every coordinate by itself (Yin et al., ICML 2018).

    Fewer than half of the clients cannot move it beyond the values of the others, whatever they send. Every client
    counts alike; of an even number, it is the mean of the middle two.
    """

    def __call__(self, states: Sequence[Mapping[str, Tensor]], num_samples: Sequence[int]) -> dict[str, Tensor]:
        """The median; the same bits in whatever order the clients come."""
        return _mean_without_extremes(states, dropped=(len(states) - 1) // 2)


class TrimmedMean(Aggregator):
    """The mean of every coordinate without its lowest and highest values (Yin et al., ICML 2018).

    Every client counts alike. Of K clients, floor(fraction K) values are left out at either end: below 1/fraction
    clients none, and this is the plain mean.

    Args:
        fraction: The share of clients left out at either end, at least 0 and below 0.5.
    """

    def __init__(self, fraction: float = 0.1) -> None:
        if not 0 <= fraction < 0.5:
            raise UserError(f"aggregator.fraction is {fraction}, and must be at least 0 and below 0.5")
        self.fraction = fraction

    def __call__(self, states: Sequence[Mapping[str, Tensor]], num_samples: Sequence[int]) -> dict[str, Tensor]:
        """The trimmed mean; the same bits in whatever order the clients come."""
        # As a fraction, since 0.29 * 100 is 28.999999999999996.
        exact = Fraction(self.fraction).limit_denominator(10**9)
        # Next to 0.5 the limit above may round up to it, which would leave no one.
        dropped = min(math.floor(exact * len(states)), (len(states) - 1) // 2)
        return _mean_without_extremes(states, dropped)


def _mean_without_extremes(states: Sequence[Mapping[str, Tensor]], dropped: int) -> dict[str, Tensor]:
    """The mean of each coordinate without its `dropped` lowest and highest values; NaN counts as the highest."""
    require_alike(states)
    return {key: _middle([state[key] for state in states], dropped) for key in states[0]}


def _middle(tensors: Sequence[Tensor], dropped: int) -> Tensor:
    first = tensors[0]
    stacked = torch.stack([to_float64(tensor, first) for tensor in tensors])
    if first.is_complex():  # has no order of its own: its real and imaginary parts are two coordinates
        stacked = torch.view_as_real(stacked)
    merged = stacked.sort(dim=0).values[dropped : len(tensors) - dropped].mean(dim=0)
    return cast_like(torch.view_as_complex(merged) if first.is_complex() else merged, first)
