"""The perceptron for tables: shapes, stages and errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fedekd.errors import UserError
from fedekd.models import MLP, build_model, check_model, exit_costs, multi_exit


def test_mlp_forward_is_head_of_features() -> None:
    network = MLP(5, 3, hidden=(8, 4), dropout=0.5).eval()
    x = torch.randn(6, 5)
    assert network.num_features == 4
    assert torch.equal(network(x), network.head(network.features(x)))


def test_mlp_with_exits_has_a_stage_per_hidden_layer_and_the_same_output() -> None:
    network = MLP(5, 3, hidden=(8, 6, 4)).eval()
    x = torch.randn(6, 5)
    expected = network(x)
    exits = multi_exit(network, 3).eval()
    assert exits.num_exits == 3
    assert torch.equal(exits(x)[-1], expected)
    assert exit_costs(exits, (5,)).full == 2 * (5 * 8 + 8 * 6 + 6 * 4 + 4 * 3)


def test_mlp_width_scales_the_hidden_layers() -> None:
    for width, expected in ((1.0, [64, 64, 32]), (0.5, [32, 32, 16]), (0.25, [16, 16, 8]), (0.001, [1, 1, 1])):
        network = MLP(5, 3, width=width)
        assert [layer[0].out_features for layer in network.layers] == expected  # type: ignore[index, union-attr]
        assert network.num_features == expected[-1]
        assert network(torch.randn(2, 5)).shape == (2, 3)
    torch.manual_seed(0)
    layers = [torch.nn.Linear(*shape) for shape in ((5, 8), (8, 4), (4, 3))]
    torch.manual_seed(0)
    state = MLP(5, 3, hidden=(8, 4)).state_dict()
    expected_state = [tensor for layer in layers for tensor in layer.state_dict().values()]
    assert all(map(torch.equal, state.values(), expected_state))


@pytest.mark.parametrize(
    "arguments", [{"hidden": ()}, {"hidden": (4, 0)}, {"dropout": 1.0}, {"in_features": 0}, {"width": 1.5}]
)
def test_mlp_invalid_argument_raises(arguments: Any) -> None:
    with pytest.raises(UserError, match=next(iter(arguments))):
        MLP(**{"in_features": 5, "num_classes": 2, **arguments})


def test_build_model_table_builds_mlp_from_the_number_of_features() -> None:
    network = build_model("MLP", input_shape=(5,), num_classes=2)
    check_model(network, input_shape=(5,), num_outputs=2)


@pytest.mark.parametrize("model", ["PrivateCNN", "torchvision.models.resnet18"])
def test_build_model_image_model_on_a_table_names_the_mlp(model: str) -> None:
    with pytest.raises(UserError, match=r"Set --client\.private_model MLP --client\.proxy_model MLP$"):
        build_model(model, input_shape=(5,), num_classes=2)


def test_build_model_mlp_on_images_names_the_cnns() -> None:
    with pytest.raises(UserError, match=r"model for images, got MLP, .*--client\.private_model PrivateCNN"):
        build_model("MLP", input_shape=(1, 8, 8), num_classes=2)
