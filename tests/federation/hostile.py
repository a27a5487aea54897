"""Seeded mutators of results and updates, for the guards of every engine.

`HOSTILE_UPDATES=10000 pytest tests/flower/test_hostile_sites.py` and `HOSTILE_UPDATES=5000 pytest
tests/federation/test_hostile_updates.py` run the full counts; without the variable each runs `SHORT` of them.
"""

from __future__ import annotations

import math
import os
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedekd.functional import average_state_dicts
from fedekd.models import eval_mode

#: Updates of the short version, in `make test`.
SHORT = 300

COUNT = int(os.environ.get("HOSTILE_UPDATES", SHORT))

State = dict[str, Any]
Mutator = Callable[[random.Random, State, Mapping[str, Tensor]], Any]

EXTREMES = (
    *(math.nan, math.inf, -math.inf, 3.4e38, -3.4e38, 1e-45, -0.0),
    *(10.0**power for power in range(-45, 39)),
    *(-(10.0**power) for power in range(-45, 39)),
)
NAMES = (
    *("\ud800", "", "/", "a//b", "/a", "a/", "x" * 65, "x" * 100_000, "a b", "ä", "\x1b[31m", "\u202eabc", "a\nb"),
    *("a,b", '"', "=1+1", "../../x", "\x00", "loss\r", "a\u0300", "💥"),
)
NUMBERS = (
    *(math.nan, math.inf, -math.inf, -1, 0, 1, 2**53, -(2**63), 10**400, 1e308, -1e308, 5e-324, 0.5),
    *("7", None, [], {}, True, [1], {"a": 1}, b"x", 2j, math.pi),
)


def copy_of(state: Mapping[str, Tensor]) -> State:
    return {name: tensor.clone() for name, tensor in state.items()}


def any_name(draw: random.Random, state: Mapping[str, Any], kind: Callable[[Tensor], bool] = lambda t: True) -> str:
    """A name of the state, of a kind if there is one."""
    names = [name for name, tensor in state.items() if kind(tensor)]
    return draw.choice(names or list(state))


def is_integer(tensor: Tensor) -> bool:
    return not tensor.is_floating_point()


def one_value(draw: random.Random, state: State, sent: Mapping[str, Tensor]) -> State:
    """One extreme value in one tensor."""
    name = any_name(draw, state, lambda tensor: tensor.is_floating_point() and tensor.numel() > 0)
    place = np.unravel_index(draw.randrange(state[name].numel()), state[name].shape)  # of any memory layout
    state[name][tuple(map(int, place))] = draw.choice(EXTREMES)
    return state


def whole_tensor(draw: random.Random, state: State, sent: Mapping[str, Tensor]) -> State:
    """One extreme value everywhere in a tensor."""
    state[any_name(draw, state, torch.is_floating_point)].fill_(draw.choice(EXTREMES))
    return state


def all_values(draw: random.Random, state: State, sent: Mapping[str, Tensor]) -> State:
    """One extreme value everywhere."""
    value = draw.choice(EXTREMES)
    return {name: torch.full_like(t, value) if t.is_floating_point() else t for name, t in state.items()}


def scaled(draw: random.Random, state: State, sent: Mapping[str, Tensor]) -> State:
    """The weights times a power of ten, of either sign."""
    factor = draw.choice((-1, 1)) * 10.0 ** draw.randint(-40, 38)
    return {name: tensor * factor if tensor.is_floating_point() else tensor for name, tensor in state.items()}


def boosted(draw: random.Random, state: State, sent: Mapping[str, Tensor]) -> State:
    """The change times a power of ten, of either sign."""
    factor = draw.choice((-1, 1)) * 10.0 ** draw.randint(-10, 38)
    return {
        name: sent[name] + factor * (tensor - sent[name]) if tensor.is_floating_point() else tensor
        for name, tensor in state.items()
    }


def noise(draw: random.Random, state: State, sent: Mapping[str, Tensor]) -> State:
    """Normal noise of any scale in place of the weights."""
    generator, scale = torch.Generator().manual_seed(draw.randrange(2**31)), 10.0 ** draw.randint(-3, 37)
    return {
        name: torch.randn(tensor.shape, generator=generator) * scale if tensor.is_floating_point() else tensor
        for name, tensor in state.items()
    }


def zeros(draw: random.Random, state: State, sent: Mapping[str, Tensor]) -> State:
    return {name: torch.zeros_like(tensor) for name, tensor in state.items()}


def unchanged(draw: random.Random, state: State, sent: Mapping[str, Tensor]) -> State:
    """The message itself."""
    return copy_of(sent)


def swapped(draw: random.Random, state: State, sent: Mapping[str, Tensor]) -> State:
    """Two tensors in each other's place."""
    one, other = any_name(draw, state), any_name(draw, state)
    state[one], state[other] = state[other], state[one]
    return state


def shuffled(draw: random.Random, state: State, sent: Mapping[str, Tensor]) -> State:
    """The values of a tensor in another order."""
    name = any_name(draw, state)
    generator = torch.Generator().manual_seed(draw.randrange(2**31))
    flat = state[name].reshape(-1)
    state[name] = flat[torch.randperm(len(flat), generator=generator)].reshape(state[name].shape)
    return state


def extreme_buffer(draw: random.Random, state: State, sent: Mapping[str, Tensor]) -> State:
    """Buffers of BatchNorm out of their range; another tensor where there are none."""
    name = any_name(draw, {n: t for n, t in state.items() if "running" in n or is_integer(t)} or state)
    values = (-(2**63), -1, 2**53, 2**63 - 1, 2**31, 10**6) if is_integer(state[name]) else (-1e-3, -1e30, 1e38, 0.0)
    state[name].fill_(draw.choice(values))
    return state


def other_shape(draw: random.Random, state: State, sent: Mapping[str, Tensor]) -> State:
    name = any_name(draw, state)
    tensor = state[name]
    changes = (
        lambda: tensor.reshape(-1),
        lambda: tensor.unsqueeze(0),
        lambda: torch.empty(0),
        lambda: torch.zeros(()),
        lambda: tensor.new_zeros(1).expand(2 ** draw.randint(1, 50)),
        lambda: tensor.repeat(2, *[1] * max(tensor.ndim - 1, 0)),
        lambda: tensor.mT if tensor.ndim > 1 else tensor[:0] if tensor.ndim else tensor.reshape(1),
    )
    state[name] = draw.choice(changes)()
    return state


DTYPES = (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.uint8, torch.bool)


def other_dtype(draw: random.Random, state: State, sent: Mapping[str, Tensor]) -> State:
    name = any_name(draw, state)
    state[name] = state[name].to(draw.choice(DTYPES))
    return state


def other_kind(draw: random.Random, state: State, sent: Mapping[str, Tensor]) -> State:
    """An object that no file and no wire can hold, in place of a tensor."""
    name = any_name(draw, state)
    tensor = state[name].float()
    with torch.sparse.check_sparse_tensor_invariants(False):
        kinds: tuple[Callable[[], Any], ...] = (
            lambda: None,
            lambda: [1.0],
            lambda: "weights",
            lambda: tensor.tolist(),
            lambda: tensor.numpy(),
            lambda: tensor.to_sparse(),
            lambda: tensor.to("meta"),
            lambda: tensor.to(torch.complex64),
            lambda: torch.full_like(tensor, math.nan, dtype=torch.complex64),
            lambda: torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8),
            lambda: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]),
            lambda: nn.UninitializedParameter(),
            lambda: nn.Parameter(tensor * math.nan),
            lambda: tensor.requires_grad_() * 1e38 * 10,
            lambda: torch.zeros(2, 2).to_sparse_csr(),
        )
        state[name] = draw.choice(kinds)()
    return state


def other_structure(draw: random.Random, state: State, sent: Mapping[str, Tensor]) -> Any:
    """Missing, additional or renamed tensors, or no mapping at all."""
    name = any_name(draw, state)
    without = {key: tensor for key, tensor in state.items() if key != name}
    return draw.choice(
        (
            without,
            {},
            {**state, draw.choice(NAMES): torch.zeros(1)},
            {**without, draw.choice(NAMES): state[name]},
            {**state, 7: torch.zeros(1)},
            {**without, None: state[name]},
            {(name,): state[name]},
            None,
            [],
            list(state.values()),
            list(state.items()),
            torch.zeros(3),
            "state",
            5,
            dict.fromkeys(state),
        )
    )


#: Changes that keep names, shapes and dtypes.
WELL_FORMED: tuple[Mutator, ...] = (
    *(one_value, whole_tensor, all_values, scaled, boosted, noise, zeros, unchanged, swapped, shuffled, extreme_buffer),
)
#: Changes of the form, possible in one process only.
MALFORMED: tuple[Mutator, ...] = (other_shape, other_dtype, other_kind, other_structure)


def hostile_state(
    draw: random.Random, honest: Mapping[str, Tensor], sent: Mapping[str, Tensor], mutators: tuple[Mutator, ...]
) -> tuple[str, Any]:
    """The names of one or two changes, and an honest update with them."""
    names, state = [], copy_of(honest)
    for mutate in draw.choices(mutators, k=draw.choice((1, 1, 1, 2))):
        if not _is_like(state, sent):  # the next change would not find its tensors
            break
        names.append(mutate.__name__)
        state = mutate(draw, state, sent)
    return "+".join(names), state


def _is_like(state: Any, sent: Mapping[str, Tensor]) -> bool:
    """Return True for plain tensors of the shapes and dtypes that were sent."""
    return (
        isinstance(state, dict)
        and state.keys() == sent.keys()
        and all(type(tensor) is Tensor and not (tensor.is_nested or tensor.is_meta) for tensor in state.values())
        and all((state[name].shape, state[name].dtype) == (tensor.shape, tensor.dtype) for name, tensor in sent.items())
        and all(tensor.layout is torch.strided for tensor in state.values())
    )


def hostile_values(draw: random.Random, values: dict[str, Any]) -> dict[str, Any]:
    """A note of a visit with one field or one log changed."""
    values = {**values, "logs": dict(values["logs"])}
    kind = draw.choice(("name", "value", "many", "field", "drop", "tradeoff", "comparison", "samples", "nested"))
    if kind == "name":
        values["logs"][draw.choice(NAMES)] = 1.0
    elif kind == "value":
        values["logs"]["loss"] = draw.choice(NUMBERS)
    elif kind == "many":
        values["logs"] |= {f"n{index}": 0.0 for index in range(draw.choice((257, 1_000, 20_000)))}
    elif kind == "field":
        values[draw.choice(("client", "score", "supervised_rounds", "logs", "num_samples"))] = draw.choice(NUMBERS)
    elif kind == "drop":
        del values[draw.choice(list(values))]
    elif kind == "tradeoff":
        rows = draw.choice(([[0.1, 0.2]] * 1000, [[1]], [draw.choice(NUMBERS)], "x"))
        values["tradeoff"] = {"exits": rows, "budgets": draw.choice((rows, []))}
    elif kind == "comparison":
        names = ("samples", "worse", "better", "gain", "p_value", "level")
        values["comparison"] = {"deployed": draw.choice(("local", "x")), **{n: draw.choice(NUMBERS) for n in names}}
    elif kind == "samples":
        values["num_samples"] = draw.choice((0, 1, 2**53 - 1, 2**53, -1, 1.5))
    else:
        nested: Any = 1
        for _ in range(draw.choice((10, 100, 900))):
            nested = [nested]
        values[draw.choice(("surprise", "tradeoff"))] = nested
    return values


@dataclass
class Tally:
    """What became of the hostile updates.

    Attributes:
        accepted: Accepted updates, by their changes.
        rejected: Number of rejected ones.
        harmful: Accepted updates that spoil the mean with honest ones.
    """

    accepted: dict[str, int] = field(default_factory=dict)
    rejected: int = 0
    harmful: list[str] = field(default_factory=list)

    def text(self) -> str:
        return f"{sum(self.accepted.values())} accepted, {self.rejected} rejected, {len(self.harmful)} harmful"


def harm_of_mean(states: list[Mapping[str, Tensor]], network: nn.Module, images: Tensor) -> str | None:
    """How the mean of updates is out of range; None if it is not."""
    mean = average_state_dicts(states)
    for name, tensor in mean.items():
        if not bool(torch.isfinite(tensor).all()):
            return f"{name} is not finite"
        if name.endswith("running_var") and bool((tensor < 0).any()):
            return f"{name} is negative"
        if is_integer(tensor) and not 0 <= int(tensor.min()) <= int(tensor.max()) < 2**53:
            return f"{name} is out of range"
    network.load_state_dict(mean)
    with torch.no_grad(), eval_mode(network):
        return None if bool(network(images).isfinite().all()) else "an output is not finite"
