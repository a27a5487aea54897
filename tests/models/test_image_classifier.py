from __future__ import annotations

import copy

import pytest
import torch
import torchvision
from torch import nn

from fedekd.errors import UserError
from fedekd.models import ImageClassifier, num_parameters


@pytest.mark.parametrize(
    ("name", "size", "arguments", "num_features"),
    [
        ("resnet18", 32, {}, 512),
        ("mobilenet_v3_small", 32, {}, 1024),
        ("convnext_tiny", 32, {}, 768),
        ("vit_b_16", 32, {"image_size": 32}, 768),
    ],
)
def test_image_classifier_logits_equal_unwrapped_model(name, size, arguments, num_features):
    torch.manual_seed(0)
    plain = getattr(torchvision.models, name)(weights=None, num_classes=5, **arguments).eval()
    count = num_parameters(plain)
    x = torch.randn(2, 1, size, size)
    with torch.no_grad():
        expected = plain(x.repeat(1, 3, 1, 1))
        network = ImageClassifier(plain, num_classes=5, in_channels=1).eval()
        features = network.features(x)
        assert torch.equal(network(x), expected)
        assert torch.equal(network.head(features), expected)
        assert torch.equal(network(x.repeat(1, 3, 1, 1)), expected)
    assert features.shape == (2, num_features) == (2, network.num_features)
    assert num_parameters(network) == count


def small_backbone() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 6), nn.ReLU(), nn.Linear(6, 2))


def test_image_classifier_trains_all_parameters():
    network = ImageClassifier(small_backbone(), num_classes=2, in_channels=1)
    network(torch.randn(3, 1, 8, 8)).sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
    assert len(list(network.parameters())) == 6


def test_image_classifier_state_loads_into_another_wrapper():
    first, second = (ImageClassifier(small_backbone(), num_classes=2, in_channels=3) for _ in range(2))
    second.load_state_dict(first.state_dict())
    x = torch.randn(1, 3, 8, 8)
    assert torch.equal(first(x), second(x))
    assert torch.equal(copy.deepcopy(first)(x), first(x))


@pytest.mark.parametrize("in_channels", [0, 2, 4])
def test_image_classifier_invalid_channels_raise_user_error(in_channels):
    with pytest.raises(UserError, match=f"in_channels: expected 1 or 3 .* got {in_channels}"):
        ImageClassifier(small_backbone(), num_classes=2, in_channels=in_channels)


def test_image_classifier_without_linear_head_raises_user_error():
    with pytest.raises(UserError, match="SqueezeNet: expected a last linear layer with 5 outputs, got none"):
        ImageClassifier(torchvision.models.squeezenet1_1(num_classes=5), num_classes=5, in_channels=3)
    with pytest.raises(UserError, match="got one with 2 outputs"):
        ImageClassifier(small_backbone(), num_classes=6, in_channels=3)
