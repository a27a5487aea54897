"""Pretrained weights of torchvision and outputs with logits; the weights are made on the spot."""

from __future__ import annotations

from collections.abc import Callable
from http.client import IncompleteRead
from types import SimpleNamespace
from typing import Any
from urllib.error import URLError

import pytest
import torch
import torchvision.models as zoo
from torch import Tensor, nn
from torchvision.models import _api

from fedekd.errors import UserError
from fedekd.models import build_model, check_model, pretrained
from fedekd.modules import predict

Install = Callable[[dict[str, Tensor]], list[str]]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """Replace downloads by a state; returns the addresses that are read."""
    monkeypatch.setattr(pretrained, "_built", {})

    def replace(state: dict[str, Tensor]) -> list[str]:
        calls: list[str] = []

        def load(url: str, *arguments: Any, **options: Any) -> dict[str, Tensor]:
            calls.append(url)
            return dict(state)

        monkeypatch.setattr(_api, "load_state_dict_from_url", load)
        return calls

    return replace


def trained_state(name: str) -> dict[str, Tensor]:
    torch.manual_seed(3)
    network = getattr(zoo, name)(num_classes=1000)
    return {key: tensor.clone() for key, tensor in network.state_dict().items()}


def build(name: str, seed: int, size: int = 64, **data: Any) -> Any:
    spec = {"class_path": f"torchvision.models.{name}", "init_args": {"weights": "IMAGENET1K_V1"}}
    torch.manual_seed(seed)
    return build_model(spec, **{"input_shape": (1, size, size), "num_classes": 3, "replaces_head": True, **data})


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("resnet18", 64),
        ("regnet_y_400mf", 64),
        ("efficientnet_b0", 64),
        ("mobilenet_v3_small", 64),
        pytest.param("convnext_tiny", 64, marks=pytest.mark.slow),
        pytest.param("swin_t", 64, marks=pytest.mark.slow),
        pytest.param("vit_b_16", 224, marks=pytest.mark.slow),
        pytest.param("densenet121", 64, marks=pytest.mark.slow),
        pytest.param("inception_v3", 96, marks=pytest.mark.slow),
    ],
)
def test_torchvision_weights_are_loaded_and_the_head_is_new_and_seeded(name: str, size: int, install: Install) -> None:
    state = trained_state(name)
    calls = install(state)
    one, same, other = (build(name, seed, size) for seed in (0, 0, 1))
    assert len(calls) == 1
    loaded = one.backbone.state_dict()
    assert {key.rpartition(".")[0] for key in state if key not in loaded and "Aux" not in key} != set()
    for key, tensor in loaded.items():
        assert torch.equal(tensor, state[key]), key
    assert one.head.out_features == 3
    assert torch.equal(one.head.weight, same.head.weight)
    assert not torch.equal(one.head.weight, other.head.weight)
    first = next(iter(dict(one.backbone.named_parameters())))
    with torch.no_grad():
        one.backbone.get_parameter(first).zero_()  # networks share no memory
    assert torch.equal(same.backbone.get_parameter(first), state[first])
    assert torch.equal(build(name, 0, size).backbone.get_parameter(first), state[first])
    check_model(other, input_shape=(1, size, size), num_outputs=3)


def test_weights_of_the_same_classes_keep_their_head(install: Install) -> None:
    state = trained_state("resnet18")
    install(state)
    assert torch.equal(build("resnet18", 0, num_classes=1000).head.weight, state["fc.weight"])


def test_weights_without_replaced_head_still_raise(install: Install) -> None:
    install(trained_state("resnet18"))
    with pytest.raises(UserError, match="'num_classes' expected value 1000 but got 3"):
        build("resnet18", 0, replaces_head=False)


@pytest.mark.parametrize("error", [URLError("no route to host"), IncompleteRead(b""), EOFError("cut")])
def test_weights_that_cannot_be_read_raise_one_line_user_error(
    error: Exception, install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    install({})

    def fail(*arguments: Any, **options: Any) -> Any:
        raise error

    monkeypatch.setattr(_api, "load_state_dict_from_url", fail)
    words = rf"expected the weights .*IMAGENET1K_V1, by download or in .*checkpoints, got {type(error).__name__}"
    with pytest.raises(UserError, match=words) as caught:
        build("resnet18", 0)
    assert "\n" not in str(caught.value)


def test_weights_of_another_network_raise_one_line_user_error(install: Install) -> None:
    install({"fc.weight": torch.zeros(1)})
    with pytest.raises(UserError, match=r"expected the weights .* got RuntimeError") as caught:
        build("resnet18", 0)
    assert "\n" not in str(caught.value)


class Head(nn.Module):
    """A user's network whose output is of the given kind."""

    def __init__(self, num_classes: int, kind: str = "object") -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 5), nn.ReLU(), nn.Linear(5, num_classes))
        self.kind = kind

    def forward(self, x: Tensor) -> Any:
        logits = self.layers(x)
        outputs = {"object": SimpleNamespace(logits=logits, loss=None), "dict": {"loss": None, "logits": logits}}
        return outputs.get(self.kind, logits)


class FromChannels(Head):
    """The same with a signature that needs no wrapper."""

    def __init__(self, in_channels: int, num_classes: int, kind: str = "object") -> None:
        super().__init__(num_classes, kind)


@pytest.mark.parametrize("name", ["Head", "FromChannels"])
@pytest.mark.parametrize("kind", ["object", "dict", "tensor"])
def test_model_with_logits_in_its_output_returns_them(name: str, kind: str) -> None:
    spec = {"class_path": f"{__name__}.{name}", "init_args": {"kind": kind}}
    model = build_model(spec, input_shape=(3, 8, 8), num_classes=4)
    images = torch.rand(2, 3, 8, 8)
    layers = (model if name == "FromChannels" else model.backbone).layers
    check_model(model, input_shape=(3, 8, 8), num_outputs=4)
    head = nn.Identity() if name == "FromChannels" else model.head
    assert torch.equal(predict(model, images).output, head(layers(images)))
    if name == "FromChannels":
        with pytest.raises(UserError, match="energy 'feature': expected a network with features"):
            predict(model, images, with_features=True)
    else:
        assert predict(model, images, with_features=True).features.shape == (2, 5)
