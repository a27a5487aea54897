"""Submodels and their averages against a loop over entries in fractions."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fedekd.functional import average_state_dicts, average_submodels, submodel_state_dict

State = dict[str, Tensor]
DTYPES = [torch.float32, torch.float64, torch.int64]


@st.composite
def tensors(draw: st.DrawFn, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    size = int(np.prod(shape))
    values = draw(st.lists(st.integers(-40, 40), min_size=size, max_size=size))
    scale = 1.0 if dtype == torch.int64 else 0.25
    return (torch.tensor(values, dtype=torch.float64) * scale).to(dtype).reshape(shape)


@st.composite
def federations(draw: st.DrawFn) -> tuple[State, list[State], list[float]]:
    """A server's model; clients that lack some of its tensors and have smaller ones; their weights."""
    shapes = draw(st.lists(st.lists(st.integers(1, 3), max_size=3).map(tuple), min_size=1, max_size=3))
    kinds = {str(place): (shape, draw(st.sampled_from(DTYPES))) for place, shape in enumerate(shapes)}
    kinds["num_batches_tracked"] = ((), torch.int64)
    whole = {name: draw(tensors(*kind)) for name, kind in kinds.items()}
    clients = []
    for _ in range(draw(st.integers(0, 4))):
        held = [name for name in kinds if draw(st.booleans())]
        part = {name: tuple(draw(st.integers(0, size)) for size in kinds[name][0]) for name in held}
        clients.append({name: draw(tensors(shape, kinds[name][1])) for name, shape in part.items()})
    weight = st.sampled_from([0.0, 0.5, 1.0, 2.0, 3.0, 7.0])
    return whole, clients, draw(st.lists(weight, min_size=len(clients), max_size=len(clients)))


def literal_average(whole: State, clients: list[State], weights: list[float], name: str, place: Any) -> Fraction | None:
    """Of one entry; None if nobody holds it."""
    above, below = Fraction(0), Fraction(0)
    for state, weight in zip(clients, weights, strict=True):
        if name in state and all(at < size for at, size in zip(place, state[name].shape, strict=True)):
            above += Fraction(weight) * Fraction(state[name][place].item())
            below += Fraction(weight)
    return above / below if below else None


#: How far a rounded result may be from the fraction; values are below 10.
ROUND_OFF = {torch.float32: 2**-20, torch.float64: 1e-14, torch.int64: 0.5 + 1e-14}


@given(federations())
def test_average_submodels_matches_loop_over_holders(federation: Any) -> None:
    whole, clients, weights = federation
    before = {name: tensor.clone() for name, tensor in whole.items()}
    found = average_submodels(whole, clients, weights)
    assert list(found) == list(whole)
    for name, tensor in whole.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(tensor, before[name])
        for place in np.ndindex(tuple(tensor.shape)):
            expected = literal_average(whole, clients, weights, name, place)
            if expected is None:
                assert found[name][place] == before[name][place]
            else:
                assert abs(Fraction(found[name][place].item()) - expected) <= ROUND_OFF[tensor.dtype]


@given(federations())
def test_submodel_state_dict_returns_leading_entries(federation: Any) -> None:
    whole, clients, _ = federation
    for client in clients:
        part = submodel_state_dict(whole, {name: tensor.shape for name, tensor in client.items()})
        assert list(part) == list(client)
        for name, tensor in client.items():
            assert part[name].shape == tensor.shape
            for place in np.ndindex(tuple(tensor.shape)):
                assert part[name][place] == whole[name][place]


def full_clients(count: int, dtype: torch.dtype) -> list[State]:
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "weight": torch.randn(40, 50, generator=generator).to(dtype),
            "num_batches_tracked": torch.randint(100, (), generator=generator),
        }
        for _ in range(count)
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("weights", [[1.0] * 3, [31.0, 7.0, 12.0], [0.0, 5.0, 2.0]])
def test_average_submodels_full_models_equals_average_state_dicts(dtype: torch.dtype, weights: list[float]) -> None:
    clients = full_clients(3, dtype)
    found = average_submodels(full_clients(1, dtype)[0], clients, weights)
    for name, tensor in average_state_dicts(clients, weights).items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_average_submodels_one_holder_is_unchanged(dtype: torch.dtype) -> None:
    (client,) = full_clients(1, dtype)
    client["weight"][0, 0] = -0.0
    found = average_submodels(client, [client], [3.7])["weight"]
    assert torch.equal(found, client["weight"])
    assert torch.equal(found.signbit(), client["weight"].signbit())


def test_average_submodels_keeps_entries_without_holder() -> None:
    whole = {"a": torch.tensor([torch.nan, torch.inf, 3.0]), "b": torch.tensor(5)}
    found = average_submodels(whole, [{"a": torch.tensor([1.0])}], [2.0])
    assert found["a"].tolist() == [1.0, torch.inf, 3.0]
    assert found["b"] == 5
    alone = average_submodels(whole, [], [])
    assert alone["a"].isnan().tolist() == [True, False, False]


def test_average_submodels_skips_weight_0() -> None:
    clients = [{"a": torch.tensor([torch.nan])}, {"a": torch.tensor([3.0])}]
    assert average_submodels({"a": torch.zeros(2)}, clients, [0.0, 2.0])["a"].tolist() == [3.0, 0.0]


def test_average_submodels_sums_in_float64() -> None:
    clients = [{"a": torch.tensor([value])} for value in (1e8, 1.0, 1.0, 1.0, -1e8)]
    assert average_submodels({"a": torch.zeros(1)}, clients, [1] * 5)["a"].item() == pytest.approx(0.6)


def test_average_submodels_shares_no_memory() -> None:
    whole, client = {"a": torch.zeros(2), "b": torch.zeros(1)}, {"a": torch.ones(2)}
    for tensor in average_submodels(whole, [client], [1]).values():
        tensor.add_(7)
    assert whole["a"].tolist() == [0, 0]
    assert whole["b"].tolist() == [0]
    assert client["a"].tolist() == [1, 1]


def test_average_submodels_parameters_are_detached() -> None:
    layer = nn.Linear(2, 2)
    found = average_submodels(dict(layer.named_parameters()), [dict(nn.Linear(2, 1).named_parameters())], [1])
    assert not found["weight"].requires_grad
    assert torch.equal(found["weight"][1], layer.weight[1])


@pytest.mark.parametrize(
    ("client", "words"),
    [
        ({"b": torch.zeros(1)}, "'b': expected a tensor of the larger model"),
        ({"a": torch.zeros(2)}, r"'a': expected a shape nested in \(2, 3\), got \(2,\)"),
        ({"a": torch.zeros(2, 4)}, r"'a': expected a shape nested in .* got \(2, 4\)"),
        ({"a": torch.zeros(2, 3, 1)}, "'a': expected a shape nested"),
    ],
)
def test_submodels_not_nested_raise_value_error(client: State, words: str) -> None:
    whole = {"a": torch.zeros(2, 3)}
    with pytest.raises(ValueError, match=words):
        average_submodels(whole, [client], [1])
    with pytest.raises(ValueError, match=words):
        submodel_state_dict(whole, {name: tensor.shape for name, tensor in client.items()})


@pytest.mark.parametrize("weights", [[1.0], [1.0, 2.0, 3.0], [1.0, -1.0], [1.0, torch.nan], [1.0, torch.inf]])
def test_average_submodels_invalid_weights_raise_value_error(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="weights"):
        average_submodels({"a": torch.zeros(1)}, [{"a": torch.ones(1)}, {"a": torch.ones(1)}], weights)
