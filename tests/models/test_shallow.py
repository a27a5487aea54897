"""Shallow and narrow submodels of networks with exits."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torchvision import models

from fedekd.early_exit import early_exit_forward, network_fingerprint
from fedekd.errors import UserError
from fedekd.models import ExitHead, MultiExitNetwork, PrivateCNN, ProxyCNN, exit_costs, multi_exit
from fedekd.modules import ModelOutput, build_energy
from fedekd.modules.prediction import predict

CLASSES = 5


def vit() -> nn.Module:
    sizes = {"image_size": 32, "patch_size": 8, "num_layers": 3, "num_heads": 2, "hidden_dim": 16, "mlp_dim": 32}
    return models.VisionTransformer(**sizes, num_classes=CLASSES)


def swin() -> nn.Module:
    sizes = {"patch_size": [4, 4], "embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 2, 2]}
    return models.SwinTransformer(**sizes, window_size=[2, 2], num_classes=CLASSES)


BACKBONES = {
    "PrivateCNN": lambda: PrivateCNN(3, 32, CLASSES),
    "resnet18": lambda: models.resnet18(num_classes=CLASSES),
    "swin": swin,
    "vit": vit,
}
EXITS = {"PrivateCNN": 3, "resnet18": 4, "swin": 4, "vit": 3}
CASES = [(name, depth) for name, exits in EXITS.items() for depth in range(1, exits + 1)]


def network_of(name: str) -> MultiExitNetwork:
    """Create a network whose norm weights differ from ones and zeros."""
    torch.manual_seed(0)
    network = multi_exit(BACKBONES[name](), CLASSES)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network.eval()


@pytest.mark.parametrize(("name", "depth"), CASES)
def test_shallow_equals_first_exits_of_full_network(name: str, depth: int) -> None:
    whole, x = network_of(name), torch.rand(3, 3, 32, 32)
    part = whole.shallow(depth)
    state, of_whole = part.state_dict(), whole.state_dict()
    assert list(state) == [key for key in of_whole if int(key.split(".")[1]) < depth]
    assert all(torch.equal(tensor, of_whole[key]) for key, tensor in state.items())
    with torch.no_grad():
        exits, expected = part(x), whole(x)
        assert len(exits) == part.num_exits == depth
        for logits, other in zip(exits, expected, strict=False):
            assert torch.equal(logits, other)
        features = part.features(x)
        assert features.shape == (3, part.num_features) == (3, part.head.in_features)
        assert torch.equal(part.head(features), exits[-1])
        both = part.exits_and_features(x)
        assert torch.equal(both[1], features)
        assert all(torch.equal(*pair) for pair in zip(both[0], exits, strict=True))


@pytest.mark.parametrize(("name", "depth"), CASES)
def test_shallow_exit_costs_equal_those_of_full_network(name: str, depth: int) -> None:
    whole = network_of(name)
    costs, of_whole = exit_costs(whole.shallow(depth), (3, 32, 32)), exit_costs(whole, (3, 32, 32))
    assert costs.stages == of_whole.stages[:depth]
    assert costs.heads == of_whole.heads[:depth]


def test_shallow_keeps_full_network_unchanged() -> None:
    whole = network_of("PrivateCNN")
    before = network_fingerprint(whole)
    part = whole.shallow(2)
    assert network_fingerprint(whole) == before != network_fingerprint(part)
    assert network_fingerprint(whole.shallow(3)) == before
    assert isinstance(part.heads[-1], ExitHead)
    assert whole.num_exits == 3


@pytest.mark.parametrize("depth", [1, 2])
def test_shallow_feature_energy_uses_input_of_last_layer(depth: int) -> None:
    part, proxy, x = network_of("PrivateCNN").shallow(depth), ProxyCNN(3, 32, CLASSES), torch.rand(4, 3, 32, 32)
    energy = build_energy("feature", "classification", "proxy", part, proxy)
    ours, theirs = predict(part, x, with_features=True), predict(proxy, x, with_features=True)
    assert ours.features is not None
    found = energy(ours, theirs)
    again = energy(ModelOutput(ours.exits, part.features(x)), theirs)
    assert found.shape == (4,)
    assert torch.equal(found, again)


def test_shallow_supports_early_exits() -> None:
    part, x = network_of("PrivateCNN").shallow(2), torch.rand(6, 3, 32, 32)
    first = part(x)[0].softmax(1).max(1).values
    threshold = float(first.median())
    departures = early_exit_forward(part, x, [threshold, -torch.inf])
    assert departures.exits.tolist() == [0 if score >= threshold else 1 for score in first]
    assert len(set(departures.exits.tolist())) == 2


def test_shallow_trains_and_can_be_copied() -> None:
    part = copy.deepcopy(network_of("resnet18").shallow(2)).train()
    sum(logits.square().sum() for logits in part(torch.rand(2, 3, 32, 32))).backward()
    assert all(parameter.grad is not None for parameter in part.parameters())


@pytest.mark.parametrize("depth", [0, -1, 4])
def test_shallow_invalid_depth_raises_user_error(depth: int) -> None:
    with pytest.raises(UserError, match=f"depth: expected 1 to 3, got {depth}"):
        network_of("PrivateCNN").shallow(depth)


def test_multi_exit_network_invalid_last_head_raises_user_error() -> None:
    with pytest.raises(UserError, match=r"heads: expected nn\.Linear or ExitHead as the last one, got Identity"):
        MultiExitNetwork([nn.Identity()], [nn.Identity()])
    flat = MultiExitNetwork([nn.Flatten()], [ExitHead(4, CLASSES, "flat")])
    x = torch.rand(2, 1, 2, 2)
    assert torch.equal(flat.head(flat.features(x)), flat(x)[0])


WIDTHS = [
    (1.0, (64, 128, 128, 256)),
    (0.5, (32, 64, 64, 128)),
    (0.3, (19, 38, 38, 77)),
    (0.001, (1, 1, 1, 1)),
]


@pytest.mark.parametrize(("width", "widths"), WIDTHS)
def test_private_cnn_width_scales_all_layers(width: float, widths: tuple[int, ...]) -> None:
    network = PrivateCNN(1, 16, CLASSES, width)
    layers = [part for part in network.modules() if isinstance(part, nn.Conv2d)]
    assert (*(layer.out_channels for layer in layers), network.num_features) == widths
    assert network(torch.rand(2, 1, 16, 16)).shape == (2, CLASSES)


@pytest.mark.parametrize("width", [0.0, -1.0, 1.01, float("nan")])
def test_private_cnn_invalid_width_raises_user_error(width: float) -> None:
    with pytest.raises(UserError, match="width: expected a number in"):
        PrivateCNN(width=width)
