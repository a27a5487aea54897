"""Adapters of single networks: which layers, which parameters, and merging."""

from __future__ import annotations

import copy
import math
import sys
from typing import Any

import pytest
import torch
from torch import nn
from torchvision.models import mobilenet_v3_small, swin_t, vit_b_32

from fedekd.early_exit import network_fingerprint
from fedekd.errors import UserError
from fedekd.models import MLP, CIFARResNet, ImageClassifier, PrivateCNN, multi_exit
from fedekd.models.freezing import exchanged_tensors, frozen_names
from fedekd.models.lora import LoraOptions, add_adapters, merged

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.lora

IMAGE = (1, 32, 32)


def adapted(network: nn.Module, shape: tuple[int, ...] = IMAGE, **values: Any) -> nn.Module:
    """Add adapters, and let them differ from 0."""
    torch.manual_seed(0)
    add_adapters(network, LoraOptions(**{"r": 2, **values}), shape)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    return network.eval()


def targets(network: nn.Module) -> set[str]:
    return {name.partition(".lora_A")[0] for name, _ in network.named_parameters() if "lora_A" in name}


def classifier(network: nn.Module) -> ImageClassifier:
    return ImageClassifier(network, num_classes=5, in_channels=1)


def test_adapters_equal_literal_transcription_of_linear_and_convolution() -> None:
    """W x + alpha / r B A x, in float64; the convolution A has the kernel, B is 1 x 1."""
    network = nn.Sequential(nn.Conv2d(1, 4, 3, stride=2, padding=1), nn.Flatten(), nn.Linear(64, 6), nn.Linear(6, 3))
    plain = copy.deepcopy(network).double()
    network = adapted(network, (1, 8, 8), r=3, lora_alpha=6).double()
    layers: Any = network
    x = torch.randn(5, 1, 8, 8, dtype=torch.float64)

    def pair(layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return layer.lora_A["default"].weight, layer.lora_B["default"].weight

    (a, b), (c, d) = pair(layers[0]), pair(layers[2])
    assert (a.shape, b.shape, c.shape, d.shape) == ((3, 1, 3, 3), (4, 3, 1, 1), (3, 64), (6, 3))
    narrow = nn.functional.conv2d(x, a, stride=2, padding=1)
    hidden = plain[0](x) + 6 / 3 * torch.einsum("oi,bihw->bohw", b[:, :, 0, 0], narrow)
    hidden = hidden.flatten(1)
    hidden = plain[2](hidden) + 6 / 3 * hidden @ c.T @ d.T
    torch.testing.assert_close(network(x), plain[3](hidden), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("build", "shape"),
    [
        (lambda: PrivateCNN(1, 32, 5), IMAGE),
        (lambda: multi_exit(PrivateCNN(1, 32, 5), 5, 2), IMAGE),
        (lambda: multi_exit(CIFARResNet(1, 32, 5, base_width=4, norm="batch"), 5), IMAGE),
        (lambda: classifier(mobilenet_v3_small(num_classes=5)), IMAGE),
        (lambda: classifier(vit_b_32(num_classes=5, image_size=32)), IMAGE),
        (lambda: MLP(7, 5), (7,)),
    ],
)
def test_merged_network_equals_adapted_one_and_has_plain_names(build: Any, shape: tuple[int, ...]) -> None:
    network = build()
    plain = copy.deepcopy(network)
    network = adapted(network, shape).double()
    x = torch.randn(3, *shape, dtype=torch.float64)
    single = merged(network)
    before, after = network(x), single(x)
    torch.testing.assert_close(after, before, rtol=1e-9, atol=1e-12)
    assert list(single.state_dict()) == list(plain.state_dict())
    assert {name: type(part) for name, part in single.named_modules()} == {
        name: type(part) for name, part in plain.named_modules()
    }
    plain.double().load_state_dict(single.state_dict())
    assert network_fingerprint(plain) == network_fingerprint(single)
    assert merged(plain) is plain
    assert targets(network)  # the given network keeps its adapters


def test_merged_network_equals_merge_and_unload_of_peft() -> None:
    network, other = PrivateCNN(1, 32, 5), PrivateCNN(1, 32, 5)
    other.load_state_dict(network.state_dict())
    network = adapted(network, lora_alpha=3)
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=list(targets(network)))
    wrapped = peft.get_peft_model(other, config)
    names = {f"base_model.model.{name}": tensor for name, tensor in network.state_dict().items()}
    wrapped.load_state_dict(names)
    theirs, ours = wrapped.merge_and_unload().state_dict(), merged(network).state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_adapters_and_heads_are_trained_and_exchanged_alone() -> None:
    network = adapted(
        multi_exit(CIFARResNet(1, 32, 5, base_width=4, norm="batch"), 5, 2), modules_to_save=["1.0.norm1"]
    )
    trained = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    heads = {name for name, _ in network.named_parameters() if name.startswith("heads.")}
    assert heads < trained
    others = {name for name in trained - heads if ".lora_" not in name}
    assert others
    assert all(name.rpartition(".")[0].endswith("1.0.norm1") for name in others)
    statistics = {name for name in exchanged_tensors(network) if name.endswith("running_mean")}
    assert {name.rpartition(".")[0] for name in statistics} == {name.rpartition(".")[0] for name in others}
    assert set(exchanged_tensors(network)) >= trained
    assert all(f"{name}.base_layer.weight" in frozen_names(network) for name in targets(network))


def test_layers_whose_weights_are_read_directly_have_no_adapter() -> None:
    """An adapter there would change nothing: attention of torchvision, and its fast path."""
    assert not [
        name for name in targets(adapted(classifier(vit_b_32(num_classes=5, image_size=32)))) if "atten" in name
    ]
    swin = adapted(classifier(swin_t(num_classes=5)))
    assert not [name for name in targets(swin) if name.endswith(("qkv", "proj"))]
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    network = adapted(
        nn.Sequential(nn.Linear(4, 8), nn.Unflatten(1, (1, 8)), layer, nn.Flatten(), nn.Linear(8, 3)), (4,)
    )
    assert targets(network) == {"0"}


class Shared(nn.Module):
    """A layer in two places, two layers with one weight, and one with weight normalisation by hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.left, self.right = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.again = self.first
        self.right.weight = self.left.weight
        self.normed = nn.utils.weight_norm(nn.Linear(4, 4))
        self.single, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in (self.first, self.left, self.right, self.normed, self.again, self.single):
            x = layer(x).tanh()
        return self.head(x)


@pytest.mark.filterwarnings("ignore:.*weight_norm")
def test_shared_layers_and_layers_with_hooks_have_no_adapter() -> None:
    """Their adapters could not be merged."""
    network = adapted(Shared(), (4,))
    assert targets(network) == {"single"}
    x = torch.randn(5, 4)
    torch.testing.assert_close(merged(network)(x), network(x))


def test_merged_keeps_adapters_that_the_user_has_added() -> None:
    network = PrivateCNN(1, 32, 5)
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules="convolutions.0"), network)
    assert merged(network) is network
    with pytest.raises(UserError, match=r"^client\.lora: expected null for a network with adapters of its own"):
        adapted(network)


def test_target_modules_select_layers_as_in_peft() -> None:
    def chosen(value: Any) -> set[str]:
        return targets(adapted(PrivateCNN(1, 32, 5), target_modules=value))

    assert chosen(None) == {"convolutions.0", "convolutions.3", "convolutions.6", "fully_connected.1"}
    assert chosen(["0", "1"]) == {"convolutions.0", "fully_connected.1"}
    assert chosen(r"convolutions\.[03]") == {"convolutions.0", "convolutions.3"}
    assert chosen("all-linear") == {"fully_connected.1"}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"r": 0}, r"client.lora.r: expected a whole number of at least 1, got 0"),
        ({"lora_alpha": 0}, r"client.lora.lora_alpha: expected a number above 0, got 0"),
        ({"lora_dropout": 1}, r"client.lora.lora_dropout: expected a number in \[0, 1\), got 1"),
        ({"lora_alpha": math.inf}, r"client.lora.lora_alpha: expected a number above 0, got inf"),
        ({"target_modules": []}, r"client.lora.target_modules: expected at least one name"),
        ({"target_modules": 5}, r"client.lora.target_modules: expected at least one name"),
        ({"modules_to_save": 5}, r"client.lora.modules_to_save: expected a list of names, or null, got 5"),
        ({"target_modules": "("}, r"client.lora.target_modules: expected a regular expression, got '\('"),
        (
            {"target_modules": "layer"},
            r"client.lora.target_modules: expected a pattern of layers of PrivateCNN, got 'lay",
        ),
        (
            {"target_modules": ["0", "q"]},
            r"client.lora.target_modules: expected names of layers of PrivateCNN, got 'q'. ",
        ),
        (
            {"target_modules": ["head"]},
            r"client.lora.target_modules: expected names of layers of PrivateCNN, got 'head'",
        ),
        (
            {"modules_to_save": ["norm"]},
            r"client.lora.modules_to_save: expected names of modules of Priv.*, got 'norm'",
        ),
    ],
)
def test_lora_invalid_options_raise_one_line_user_error(values: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=f"^{words}") as error:
        adapted(PrivateCNN(1, 32, 5), **values)
    assert "\n" not in str(error.value)


def test_lora_without_layers_or_peft_raises_one_line_user_error(monkeypatch: pytest.MonkeyPatch) -> None:
    grouped = nn.Sequential(
        nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 4, 3, dilation=2), nn.Flatten(), nn.Linear(64, 3)
    )
    for network, shape in ((nn.Sequential(nn.Linear(4, 3)), (4,)), (grouped, (4, 10, 10))):
        with pytest.raises(UserError, match=r"client\.lora: expected a network with linear or convolutional layers"):
            adapted(network, shape)
    network = adapted(MLP(4, 3), (4,))
    with torch.no_grad():
        next(p for name, p in network.named_parameters() if "lora_B" in name).fill_(math.nan)
    with pytest.raises(UserError, match=r"client\.lora: expected finite adapters, got NaN or infinity in layers"):
        merged(network)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"not installed. Install it by: pip install 'fedekd\[lora\]'"):
        adapted(MLP(4, 3), (4,))
