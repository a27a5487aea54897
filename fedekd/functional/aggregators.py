"""Aggregators: objects that merge client models, selected by class path."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Literal, get_args

import torch
from torch import Tensor

from fedekd.errors import require, require_choice
from fedekd.functional.aggregation import average_state_dicts, cast_like, check_same_structure, to_float64

Weights = Literal["uniform", "samples"]


class Aggregator(ABC):
    """Base class of aggregators, which merge the clients' state dicts into one.

    As in `average_state_dicts`, arithmetic runs in float64, results have the inputs' dtypes and the first one's
    device, integers (BatchNorm's counters) are rounded to the nearest, and a `ValueError` is raised if a key, shape or
    dtype differs or there is no state.
    """

    @abstractmethod
    def __call__(self, states: Sequence[Mapping[str, Tensor]], num_samples: Sequence[int]) -> dict[str, Tensor]:
        """Merge the states.

        Args:
            states: One per client, with equal keys, shapes and dtypes.
            num_samples: Number of training samples per client.

        Returns:
            A new state dict in the key order of the first one.
        """


class Mean(Aggregator):
    r"""Mean of the clients' models, $\sum_k w_k \theta_k / \sum_k w_k$.

    Args:
        weights: `uniform` has $w_k = 1$; `samples` weights clients by their training samples.

    Raises:
        UserError: If `weights` is unknown.

    Reference:
        McMahan et al., AISTATS 2017.
    """

    def __init__(self, weights: Weights = "uniform") -> None:
        require_choice("weights", weights, get_args(Weights))
        self.weights = weights

    def __call__(self, states: Sequence[Mapping[str, Tensor]], num_samples: Sequence[int]) -> dict[str, Tensor]:
        """Compute the mean by `average_state_dicts`; uniform if no client has samples."""
        return average_state_dicts(states, num_samples if self.weights == "samples" and any(num_samples) else None)


class CoordinateMedian(Aggregator):
    """Coordinate-wise median of the clients' models.

    Fewer than half of the clients cannot move it beyond the range of the others' values. All clients have the same
    weight; for an even number of clients it is the mean of the two middle values.

    Reference:
        Yin et al., Byzantine-Robust Distributed Learning, ICML 2018.
    """

    def __call__(self, states: Sequence[Mapping[str, Tensor]], num_samples: Sequence[int]) -> dict[str, Tensor]:
        """Compute the median; the result does not depend on the order of clients."""
        return _mean_without_extremes(states, dropped=(len(states) - 1) // 2)


class TrimmedMean(Aggregator):
    """Coordinate-wise mean without the lowest and highest values.

    All clients have the same weight. With K clients, floor(fraction K) values are dropped at each end; with fewer than
    1/fraction clients this is the plain mean.

    Args:
        fraction: Fraction of clients dropped at each end, in [0, 0.5).

    Raises:
        UserError: If `fraction` is out of range.

    Reference:
        Yin et al., Byzantine-Robust Distributed Learning, ICML 2018.
    """

    def __init__(self, fraction: float = 0.1) -> None:
        require(0 <= fraction < 0.5, "aggregator.fraction", "a number in [0, 0.5)", fraction)
        self.fraction = fraction

    def __call__(self, states: Sequence[Mapping[str, Tensor]], num_samples: Sequence[int]) -> dict[str, Tensor]:
        """Compute the trimmed mean; the result does not depend on the order of clients."""
        # As a fraction, because 0.29 * 100 is 28.999999999999996.
        exact = Fraction(self.fraction).limit_denominator(10**9)
        # Near 0.5 limit_denominator may round up to 0.5, which would drop all clients.
        dropped = min(math.floor(exact * len(states)), (len(states) - 1) // 2)
        return _mean_without_extremes(states, dropped)


def _mean_without_extremes(states: Sequence[Mapping[str, Tensor]], dropped: int) -> dict[str, Tensor]:
    """Average coordinates without `dropped` values at each end; NaN sorts highest."""
    check_same_structure(states)
    return {key: _middle([state[key] for state in states], dropped) for key in states[0]}


def _middle(tensors: Sequence[Tensor], dropped: int) -> Tensor:
    first = tensors[0]
    stacked = torch.stack([to_float64(tensor, first) for tensor in tensors])
    if first.is_complex():  # not ordered: real and imaginary part are two coordinates
        stacked = torch.view_as_real(stacked)
    merged = stacked.sort(dim=0).values[dropped : len(tensors) - dropped].mean(dim=0)
    return cast_like(torch.view_as_complex(merged) if first.is_complex() else merged, first)
