from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from functools import lru_cache, partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedekd.federation.object_state import StateReader
from fedekd.federation.source_code import SourceUnavailableError, code_of
from fedekd.models import build_model


def scaled(gain: Any) -> Callable[[Tensor], Tensor]:
    return lambda x: gain * x


def with_default(gain: float) -> Callable[..., Tensor]:
    def scale(x: Tensor, *, by: float = gain) -> Tensor:
        return by * x

    return scale


def cached(gain: float) -> Any:
    return lru_cache(scaled(gain))


def local_class(gain: float) -> Any:
    class Scale:
        @property
        def gain(self) -> float:
            return gain

    return Scale()


class Slots:
    __slots__ = ("gain",)

    def __init__(self, gain: float) -> None:
        self.gain = gain

    def scale(self, x: Tensor) -> Tensor:
        return self.gain * x


class Holder(nn.Module):
    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value


def linear(bias: float) -> list[nn.Module]:
    layer = nn.Linear(2, 2)
    nn.init.ones_(layer.weight)
    nn.init.constant_(layer.bias, bias)
    return [layer]


def state(value: Any) -> str:
    return json.dumps(StateReader(Holder(value)).attributes())


@pytest.mark.parametrize(
    "make",
    [
        lambda gain: partial(F.leaky_relu, negative_slope=gain),
        lambda gain: partial(torch.mul, gain),
        scaled,
        lambda gain: scaled(scaled(gain)),
        with_default,
        cached,
        local_class,
        lambda gain: type(local_class(gain)),
        Slots,
        lambda gain: Slots(gain).scale,
        lambda gain: SimpleNamespace(deep=[{"gain": Slots(gain)}]),
        lambda gain: [lambda x: x, lambda x: 2 * x][int(gain)],
        lambda gain: re.compile(300 * "x" + str(gain)),
        lambda gain: np.array([[gain]], dtype=object),
        lambda gain: torch.zeros(1 + int(gain), 2 - int(gain)),
        lambda gain: torch.tensor(gain).to(torch.bfloat16),
        lambda gain: {gain, 2.0},
        lambda gain: [nn.LeakyReLU(gain)],
        linear,
        lambda gain: [1 + 1j * gain, b"%f" % gain],
    ],
)
def test_state_differs_with_the_value(make: Callable[[float], Any]) -> None:
    assert state(make(0.0)) == state(make(0.0)) != state(make(1.0))


def test_state_of_a_cycle_ends() -> None:
    cycle: list[Any] = [1]
    cycle.append(cycle)
    assert state(cycle) != state([1, [1]])


def nested(levels: int) -> Any:
    return [nested(levels - 1)] if levels else 0


@pytest.mark.parametrize("value", [threading.Lock(), [threading.Condition()], (x for x in "ab"), nested(30)])
def test_state_that_is_not_readable_raises(value: Any) -> None:
    with pytest.raises(SourceUnavailableError):
        state(value)


@pytest.mark.parametrize(
    "model",
    [
        "PrivateCNN",
        "ProxyCNN",
        "torchvision.models.resnet18",
        "torchvision.models.googlenet",
        "torchvision.models.vit_b_32",
    ],
)
def test_state_of_known_networks_is_readable(model: str) -> None:
    size = 224 if "vit" in model else 32

    def build() -> nn.Module:
        return build_model(model, input_shape=(3, size, size), num_classes=4)

    readers = [StateReader(build()), StateReader(build())]
    assert readers[0].attributes() == readers[1].attributes()
    assert set(code_of(name for name in readers[0].modules if name.partition(".")[0] != "fedekd")) <= {
        "python",
        "torch",
        "torchvision",
    }
