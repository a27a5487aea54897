from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedekd.errors import UserError
from fedekd.models import PrivateCNN, ProxyCNN, num_parameters

NETWORKS = [(PrivateCNN, (64, 128, 128), 256), (ProxyCNN, (32, 64), 128)]
both = pytest.mark.parametrize(("network_class", "channels", "num_features"), NETWORKS)


@both
@pytest.mark.parametrize(
    ("in_channels", "image_size", "num_classes"),
    [(1, 28, 10), (3, 32, 10), (1, 8, 10), (3, 28, 1), (1, (8, 20), 4), (2, [9, 15], 3)],
)
def test_cnn_shapes_and_parameter_counts(network_class, channels, num_features, in_channels, image_size, num_classes):
    network = network_class(in_channels=in_channels, image_size=image_size, num_classes=num_classes)
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    x = torch.randn(2, in_channels, height, width)
    features = network.features(x)
    assert features.shape == (2, num_features) == (2, network.num_features)
    assert (features >= 0).all()
    assert network(x).shape == (2, num_classes)

    pools = len(channels)
    widths = [in_channels, *channels]
    convolutions = sum(9 * a * b + b for a, b in pairwise(widths))
    pixels = (height // 2**pools) * (width // 2**pools)
    fully_connected = channels[-1] * pixels * num_features + num_features
    assert num_parameters(network) == convolutions + fully_connected + num_features * num_classes + num_classes


def test_cnn_parameter_counts_at_28_pixels():
    assert num_parameters(PrivateCNN()) == 519_818
    assert num_parameters(ProxyCNN()) == 421_642
    assert [num_parameters(ProxyCNN(width=width)) for width in (0.5, 0.25)] == [105_866, 26_698]


@both
def test_cnn_matches_functional_form(network_class, channels, num_features):
    torch.manual_seed(0)
    network = network_class(in_channels=3, image_size=16, num_classes=7).double()
    x = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    convolutions = [part for part in network.modules() if isinstance(part, nn.Conv2d)]
    linear = [part for part in network.modules() if isinstance(part, nn.Linear)]
    assert [part.out_channels for part in convolutions] == list(channels)
    hidden = x
    for part in convolutions:  # in the textbook's order
        hidden = F.max_pool2d(F.relu(F.conv2d(hidden, part.weight, part.bias, padding=1)), 2)
    hidden = F.relu(F.linear(hidden.flatten(1), linear[0].weight, linear[0].bias))
    torch.testing.assert_close(network.features(x), hidden, rtol=1e-12, atol=1e-12)
    assert torch.equal(network(x), network.head(network.features(x)))
    assert network.head is linear[1]


@both
def test_cnn_channels_last_gives_same_output(network_class, channels, num_features):
    network = network_class(image_size=12, num_classes=3).double()
    x = torch.randn(2, 1, 12, 12, dtype=torch.float64)
    expected = network(x)
    network = network.to(memory_format=torch.channels_last)
    torch.testing.assert_close(network(x.contiguous(memory_format=torch.channels_last)), expected)


@both
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_size": 7}, "image_size: expected at least 8, got 7"),
        ({"image_size": (28, 7)}, "image_size: expected at least 8"),
        ({"image_size": (28, 28, 3)}, "height, width"),
        ({"in_channels": 0}, "in_channels: expected at least 1, got 0"),
        ({"num_classes": 0}, "num_classes: expected at least 1, got 0"),
    ],
)
def test_cnn_invalid_arguments_raise_user_error(network_class, channels, num_features, arguments, message):
    with pytest.raises(UserError, match=message):
        network_class(**arguments)


@both
def test_cnn_width_scales_all_layers(network_class, channels, num_features):
    full = num_parameters(network_class(image_size=16))
    for width in (0.25, 0.5, 1.0):
        network = network_class(image_size=16, num_classes=5, width=width)
        convolutions = [part.out_channels for part in network.modules() if isinstance(part, nn.Conv2d)]
        assert convolutions == [round(width * full) for full in channels]
        assert network.num_features == network.head.in_features == width * num_features
        assert network(torch.randn(3, 1, 16, 16)).shape == (3, 5)
        assert 0.8 * width**2 < num_parameters(network) / full < 1.2 * width**2 + 0.01
    smallest = network_class(width=1e-9)
    assert {part.out_channels for part in smallest.modules() if isinstance(part, nn.Conv2d)} == {1}


@both
@pytest.mark.parametrize("width", [0, -0.5, 1.01, float("nan")])
def test_cnn_width_out_of_range_raises_user_error(network_class, channels, num_features, width):
    with pytest.raises(UserError, match=r"^width: expected a number in \(0, 1\], got"):
        network_class(width=width)


@both
def test_cnn_width_one_keeps_the_initial_weights(network_class, channels, num_features):
    """The layers are drawn in this order, with these shapes."""
    torch.manual_seed(3)
    layers = [nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise([3, *channels])]
    pixels = (16 // 2 ** len(channels)) ** 2
    layers += [nn.Linear(channels[-1] * pixels, num_features), nn.Linear(num_features, 10)]
    expected = [tensor for layer in layers for tensor in layer.state_dict().values()]
    names = None
    for arguments in ({}, {"width": 1.0}):
        torch.manual_seed(3)
        state = network_class(in_channels=3, image_size=16, **arguments).state_dict()
        assert all(map(torch.equal, state.values(), expected))
        assert len(state) == len(expected)
        assert names in (None, list(state))
        names = list(state)
