from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torchvision.models import VisionTransformer

from fedekd.early_exit import network_fingerprint


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3, stride=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))


def rebuilt(index: int, part: nn.Module) -> nn.Module:
    """Replace one module and keep the weights."""
    other = network()
    state = other[index].state_dict()
    other[index] = part
    part.load_state_dict(state)
    return other


def with_one_bit_changed() -> nn.Module:
    other = network()
    with torch.no_grad():
        other[4].weight[2, 7] = torch.nextafter(other[4].weight[2, 7], torch.tensor(9.0))
    return other


def with_changed_buffer() -> nn.Module:
    other = network()
    other[1].num_batches_tracked += 1
    return other


def test_fingerprint_ignores_layout_and_mode():
    expected = network_fingerprint(network())
    assert len(expected) == 64
    assert int(expected, 16) >= 0
    assert network_fingerprint(network().train().to(memory_format=torch.channels_last)) == expected
    assert network_fingerprint(copy.deepcopy(network()).eval().requires_grad_(False)) == expected
    assert not network().to(memory_format=torch.channels_last)[0].weight.is_contiguous()


OTHERS = {
    "one bit of a weight": with_one_bit_changed,
    "a buffer": with_changed_buffer,
    "an activation": lambda: rebuilt(2, nn.Tanh()),
    "a stride": lambda: rebuilt(0, nn.Conv2d(2, 4, 3, stride=2)),
    "the type": lambda: network().double(),
    "a name": lambda: nn.ModuleDict(dict(network().named_children())),
    "one part more": lambda: nn.Sequential(*network(), nn.Identity()),
}


def test_fingerprint_differs_for_any_change():
    fingerprints = {name: network_fingerprint(build()) for name, build in OTHERS.items()}
    fingerprints["none"] = network_fingerprint(network())
    assert len(set(fingerprints.values())) == len(fingerprints)


def test_fingerprint_includes_shape_and_dtype():
    def of(buffer: torch.Tensor) -> nn.Module:
        layer = nn.Module()
        layer.register_buffer("buffer", buffer)
        return layer

    same = [torch.zeros(4, 2), torch.zeros(2, 4), torch.zeros(8), torch.zeros(8, dtype=torch.int32)]
    assert len({network_fingerprint(of(buffer)) for buffer in same}) == len(same)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.bool, torch.int64])
def test_fingerprint_supports_every_dtype(dtype):
    layer = nn.Module()
    layer.register_buffer("empty", torch.zeros(0, dtype=dtype))
    layer.register_buffer("scalar", torch.ones((), dtype=dtype))
    before = network_fingerprint(layer)
    layer.scalar.zero_()
    assert network_fingerprint(layer) != before


def test_fingerprint_includes_attention_heads():
    def vit(heads: int) -> nn.Module:
        torch.manual_seed(0)
        return VisionTransformer(8, 4, 1, heads, hidden_dim=8, mlp_dim=8, num_classes=3).eval()

    one, four = vit(1), vit(4)
    x = torch.randn(2, 3, 8, 8)
    nn.init.normal_(one.heads.head.weight, generator=torch.Generator().manual_seed(0))
    four.load_state_dict(one.state_dict())
    assert not torch.equal(one(x), four(x))
    assert network_fingerprint(one) != network_fingerprint(four)


class Remembering(nn.Module):
    """Store state of the forward pass in plain attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.calls, self.last_shape = nn.Linear(2, 2), 0, ()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls, self.last_shape = self.calls + 1, tuple(x.shape)
        return self.layer(x)


def test_fingerprint_ignores_forward_state():
    model = Remembering()
    before = network_fingerprint(model)
    model(torch.zeros(3, 2))
    assert network_fingerprint(model) == before


class Activated(nn.Module):
    """Module with settings but no weights: a function, a list and a non-persistent buffer."""

    def __init__(self, function=torch.relu, sizes=(1, 2), scale=1.0) -> None:
        super().__init__()
        self.function, self.sizes = function, sizes
        self.register_buffer("scale", torch.tensor(scale), persistent=False)


def test_fingerprint_includes_settings_without_weights():
    others = [Activated(torch.tanh), Activated(nn.functional.relu), Activated(sizes=[1, 3]), Activated(scale=2.0)]
    assert len({network_fingerprint(each) for each in (Activated(), *others)}) == 5
    assert network_fingerprint(Activated(sizes=[1, 2])) == network_fingerprint(Activated())
    relu, gelu = (nn.TransformerEncoderLayer(4, 2, 8, activation=name) for name in ("relu", "gelu"))
    gelu.load_state_dict(relu.state_dict())
    assert network_fingerprint(relu) != network_fingerprint(gelu)


def test_fingerprint_ignores_objects_in_tuples():
    def of() -> nn.Module:
        torch.manual_seed(0)
        layer = nn.Linear(2, 2)
        layer.callbacks = (object(),)
        return layer

    one, other = of(), of()
    assert network_fingerprint(one) == network_fingerprint(other)
