from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fedekd.functional import average_state_dicts

State = dict[str, Tensor]


def states(count: int, dtype: torch.dtype = torch.float32) -> list[State]:
    torch.manual_seed(count)
    return [{"a": torch.randn(3, 2).to(dtype), "b": torch.randn(4).to(dtype)} for _ in range(count)]


@pytest.mark.parametrize("weights", [None, [1, 2, 3, 4, 5, 6], [0.0, 0.5, 0.0, 0.1, 0.2, 0.2]])
def test_average_state_dicts_matches_numpy(weights: list[float] | None) -> None:
    given_states = states(6)
    averaged = average_state_dicts(given_states, weights)
    assert list(averaged) == ["a", "b"]
    for key, value in averaged.items():
        stacked = np.stack([state[key].double().numpy() for state in given_states])
        expected = np.average(stacked, axis=0, weights=weights).astype(np.float32)
        np.testing.assert_array_equal(value.numpy(), expected)


def test_average_state_dicts_sums_in_float64() -> None:
    # In float32 the running sum loses every 1 beside 1e8, in bfloat16 beside 256.
    for dtype, large in ((torch.float32, 1e8), (torch.bfloat16, 512.0)):
        values = [large, 1.0, 1.0, 1.0, 1.0, -large]
        averaged = average_state_dicts([{"w": torch.tensor([value], dtype=dtype)} for value in values])["w"]
        assert averaged.dtype == dtype
        assert averaged.item() == pytest.approx(4 / 6, rel=0.005 if dtype == torch.bfloat16 else 1e-6)


@given(st.lists(st.integers(0, 10_000), min_size=3, max_size=3).filter(any), st.integers(1, 1000))
def test_average_state_dicts_depends_on_ratios_of_weights(weights: list[int], factor: int) -> None:
    given_states = states(3, torch.float64)
    scaled = average_state_dicts(given_states, [factor * weight for weight in weights])
    for key, value in average_state_dicts(given_states, weights).items():
        assert torch.equal(value, scaled[key])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.complex64])
@pytest.mark.parametrize("weights", [None, [3.7]])
def test_average_state_dicts_one_state_is_unchanged(dtype: torch.dtype, weights: list[float] | None) -> None:
    (state,) = states(1, dtype)
    state["a"][0, 0] = -0.0
    for key, value in average_state_dicts([state], weights).items():
        assert value.dtype == dtype
        assert torch.equal(
            torch.view_as_real(value) if dtype.is_complex else value,
            torch.view_as_real(state[key]) if dtype.is_complex else state[key],
        )
    if not dtype.is_complex:
        assert torch.signbit(average_state_dicts([state], weights)["a"][0, 0])


def test_average_state_dicts_shares_no_memory() -> None:
    for count in (1, 2):
        for dtype in (torch.float32, torch.float64, torch.int64):
            given_states = [{"w": torch.full((2,), 4).to(dtype)} for _ in range(count)]
            average_state_dicts(given_states)["w"].add_(1)
            assert all((state["w"] == 4).all() for state in given_states)


def test_average_state_dicts_parameters_are_detached() -> None:
    averaged = average_state_dicts([dict(nn.Linear(2, 2).named_parameters()) for _ in range(2)])
    assert not averaged["weight"].requires_grad


def test_average_state_dicts_rounds_integers() -> None:
    counters = [{"n": torch.tensor(value)} for value in (10, 20, 21)]
    assert average_state_dicts(counters)["n"].item() == 17
    assert average_state_dicts(counters, [0, 1, 3])["n"].item() == 21
    assert average_state_dicts([{"n": torch.tensor(7)}] * 6)["n"].item() == 7
    masks = [
        {"m": torch.tensor([True, False])},
        {"m": torch.tensor([True, True])},
        {"m": torch.tensor([True, True])},
    ]
    averaged = average_state_dicts(masks)["m"]
    assert averaged.dtype == torch.bool
    assert averaged.tolist() == [True, True]


def test_average_state_dicts_result_loads_into_batch_norm_network() -> None:
    networks = []
    for steps in (1, 3):
        network = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
        for _ in range(steps):
            network(torch.randn(4, 2))
        networks.append(network)
    averaged = average_state_dicts([network.state_dict() for network in networks])
    networks[0].load_state_dict(averaged)
    assert averaged["1.num_batches_tracked"].item() == 2
    assert averaged["1.num_batches_tracked"].dtype == torch.int64


def test_average_state_dicts_skips_weight_0() -> None:
    broken = {"w": torch.tensor([math.nan, math.inf])}
    sound = {"w": torch.tensor([1.0, 2.0])}
    assert torch.equal(average_state_dicts([broken, sound], [0, 2])["w"], sound["w"])


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"a": torch.zeros(2)}, "differs in 'b'"),
        ({"a": torch.zeros(2), "b": torch.zeros(1), "c": torch.zeros(1)}, "differs in 'c'"),
        ({"a": torch.zeros(2, 1), "b": torch.zeros(1)}, r"'a' in state dict 1: .* got torch.float32 \(2, 1\)"),
        ({"a": torch.zeros(2), "b": torch.zeros(1).double()}, r"'b' in state dict 1: .* got torch.float64"),
    ],
)
def test_average_state_dicts_different_structure_raises_value_error(second: State, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        average_state_dicts([{"a": torch.zeros(2), "b": torch.zeros(1)}, second])


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0], "weights: expected 2, one per state dict, got 1"),
        ([1.0, -0.1], "weights: expected finite numbers of at least 0"),
        ([math.nan, 1.0], "finite"),
        ([math.inf, 1.0], "finite"),
        ([0.0, 0.0], "weights: expected one above 0"),
    ],
)
def test_average_state_dicts_invalid_weights_raise_value_error(weights: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        average_state_dicts(states(2), weights)


def test_average_state_dicts_without_states_raises_value_error() -> None:
    with pytest.raises(ValueError, match="state_dicts: expected at least one"):
        average_state_dicts([])


@pytest.mark.parametrize("value", [2**53 + 1, 2**63 - 1])
def test_average_equal_large_integers_is_that_integer(value: int) -> None:
    states = [{"seed": torch.tensor([value])} for _ in range(3)]
    average = average_state_dicts(states, weights=[1, 2, 4])["seed"]
    assert average.item() == value
    assert average is not states[0]["seed"]
