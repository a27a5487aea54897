from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import trim_mean
from torch import Tensor

from fedekd.errors import UserError
from fedekd.functional import Aggregator, CoordinateMedian, Mean, TrimmedMean, average_state_dicts

State = dict[str, Tensor]
EVERY = [Mean(), Mean("samples"), CoordinateMedian(), TrimmedMean(), TrimmedMean(0.3)]
every_aggregator = pytest.mark.parametrize("aggregator", EVERY, ids=lambda a: f"{type(a).__name__}{vars(a)}")


def states(count: int, dtype: torch.dtype = torch.float64) -> list[State]:
    torch.manual_seed(count)
    return [{"a": torch.randn(3, 2).to(dtype), "b": torch.randn(4).to(dtype)} for _ in range(count)]


def stack(given_states: Sequence[State], key: str) -> np.ndarray:
    return np.stack([state[key].double().numpy() for state in given_states])


@pytest.mark.parametrize("count", range(1, 9))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_coordinate_median_matches_numpy(count: int, dtype: torch.dtype) -> None:
    given_states = states(count, dtype)
    merged = CoordinateMedian()(given_states, [1] * count)
    assert list(merged) == ["a", "b"]
    for key, value in merged.items():
        assert value.dtype == dtype
        expected = np.median(stack(given_states, key), axis=0)
        np.testing.assert_array_equal(value.numpy(), expected.astype(value.numpy().dtype))


@pytest.mark.parametrize("count", [1, 2, 3, 6, 10, 21])
@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.2, 1 / 3, 0.45, 0.49])
def test_trimmed_mean_matches_scipy(count: int, fraction: float) -> None:
    given_states = states(count)
    for key, value in TrimmedMean(fraction)(given_states, [1] * count).items():
        expected = np.sort(stack(given_states, key), axis=0)
        dropped = math.floor(fraction * count + 1e-9)
        expected = expected[dropped : count - dropped].mean(axis=0)
        np.testing.assert_allclose(value.numpy(), expected, rtol=1e-12)
        if fraction != 1 / 3:  # scipy's own count of 1/3 of 3 or 6 depends on rounding
            np.testing.assert_allclose(value.numpy(), trim_mean(stack(given_states, key), fraction), rtol=1e-12)


def test_trimmed_mean_number_trimmed_has_no_rounding_error() -> None:
    # 0.29 * 100 is 28.999999999999996; without its 29 highest, the mean of these 0s and 1s is exactly 0.
    given_states = [{"w": torch.tensor(float(k < 29))} for k in range(100)]
    assert TrimmedMean(0.29)(given_states, [1] * 100)["w"].item() == 0
    assert TrimmedMean(0.28)(given_states, [1] * 100)["w"].item() == pytest.approx(1 / 44)
    assert TrimmedMean(0.49999999999999994)(given_states[:2], [1, 1])["w"].item() == 1


def test_mean_averages_uniformly_or_by_samples() -> None:
    given_states, sizes = states(3), [10, 0, 30]
    for key, value in Mean()(given_states, sizes).items():
        assert torch.equal(value, average_state_dicts(given_states)[key])
    for key, value in Mean("samples")(given_states, sizes).items():
        assert torch.equal(value, average_state_dicts(given_states, sizes)[key])


@pytest.mark.parametrize("aggregator", [CoordinateMedian(), TrimmedMean(0.2)])
@pytest.mark.parametrize("wild", [1e30, -1e30, math.inf, -math.inf, math.nan])
def test_robust_aggregator_limits_one_outlier(aggregator: Aggregator, wild: float) -> None:
    sound = states(5)
    wild_one = {key: torch.full_like(value, wild) for key, value in sound[0].items()}
    merged = aggregator([*sound[:4], wild_one], [1, 1, 1, 1, 10**6])
    for key, value in merged.items():
        honest = stack(sound[:4], key)
        assert (value.numpy() >= honest.min(axis=0)).all()
        assert (value.numpy() <= honest.max(axis=0)).all()


@every_aggregator
@given(order=st.permutations(range(7)))
def test_aggregator_ignores_order_of_clients(aggregator: Aggregator, order: list[int]) -> None:
    given_states, sizes = states(7), [3, 1, 4, 1, 5, 9, 2]
    merged = aggregator(given_states, sizes)
    shuffled = aggregator([given_states[k] for k in order], [sizes[k] for k in order])
    for key, value in merged.items():
        if isinstance(aggregator, Mean):
            torch.testing.assert_close(shuffled[key], value)
        else:
            assert torch.equal(shuffled[key], value)


@every_aggregator
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.complex64, torch.int64])
def test_aggregator_equal_states_are_unchanged_and_copied(aggregator: Aggregator, dtype: torch.dtype) -> None:
    value = (10 * torch.arange(4.0) + 0.1).to(dtype)
    given_states = [{"w": value.clone()} for _ in range(6)]
    merged = aggregator(given_states, [5, 1, 1, 1, 1, 1])["w"]
    assert merged.dtype == dtype
    assert torch.equal(merged, value)
    merged.add_(1)
    assert all(torch.equal(state["w"], value) for state in given_states)


def test_aggregator_computes_in_float64() -> None:
    # 2048 + 2050 is beyond float16's whole numbers, and 40000 + 40000 beyond its range.
    for low, high in ((2048.0, 2052.0), (40000.0, 40064.0)):
        pair = [{"w": torch.tensor([value], dtype=torch.float16)} for value in (low, high)]
        for aggregator in (CoordinateMedian(), TrimmedMean()):
            assert aggregator(pair, [1, 1])["w"].item() == (low + high) / 2


def test_aggregator_rounds_integers() -> None:
    counters = [{"n": torch.tensor(value)} for value in (1, 20, 21, 1000)]
    assert CoordinateMedian()(counters, [1] * 4)["n"].item() == 20  # 20.5, to even
    assert TrimmedMean(0.25)(counters, [1] * 4)["n"].item() == 20
    assert CoordinateMedian()([{"n": state["n"] + 1} for state in counters], [1] * 4)["n"].item() == 22  # 21.5
    masks = [{"m": torch.tensor(value)} for value in (True, True, False)]
    assert CoordinateMedian()(masks, [1] * 3)["m"].item() is True


def test_aggregator_complex_parts_are_separate_coordinates() -> None:
    given_states = [{"w": torch.tensor([value])} for value in (1 + 9j, 2 + 7j, 3 + 8j)]
    assert CoordinateMedian()(given_states, [1] * 3)["w"].tolist() == [2 + 8j]


@every_aggregator
def test_aggregator_invalid_states_raise_value_error(aggregator: Aggregator) -> None:
    with pytest.raises(ValueError, match="state_dicts: expected at least one"):
        aggregator([], [])
    with pytest.raises(ValueError, match=r"'a' in state dict 1: .* got torch.float32 \(2, 1\)"):
        aggregator([{"a": torch.zeros(2)}, {"a": torch.zeros(2, 1)}], [1, 1])
    with pytest.raises(ValueError, match="differs in 'a'"):
        aggregator([{"a": torch.zeros(2)}, {"b": torch.zeros(2)}], [1, 1])


@pytest.mark.parametrize("fraction", [-0.1, 0.5, 1.0, math.nan])
def test_trimmed_mean_invalid_fraction_raises_user_error(fraction: float) -> None:
    with pytest.raises(UserError, match=rf"aggregator.fraction: expected .* got {fraction}"):
        TrimmedMean(fraction)


def test_mean_unknown_weights_raise_user_error_with_hint() -> None:
    with pytest.raises(UserError, match=r"weights: expected one of .* got 'sample'. Did you mean 'samples'"):
        Mean("sample")  # type: ignore[arg-type]
