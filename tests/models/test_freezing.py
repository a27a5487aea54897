"""Frozen parts of a network: names, statistics, and what is exchanged."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from torchvision.models import resnet18, vgg11

from fedekd.errors import UserError
from fedekd.models import ImageClassifier, PrivateCNN, eval_mode, multi_exit
from fedekd.models.freezing import (
    exchanged_tensors,
    freeze,
    frozen_names,
    head_prefixes,
    keeps_statistics,
    load_exchanged,
    trained_parameters,
)
from fedekd.modules import MovingAverage, SupervisedModule


class Normed(nn.Module):
    """Two blocks with BatchNorm, the second without parameters, and a shared head."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))
        self.two = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4, affine=False), nn.Flatten())
        self.head = nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.two(self.one(x)))
        return logits


def trained(network: nn.Module) -> set[str]:
    return {name for name, parameter in network.named_parameters() if parameter.requires_grad}


def test_freeze_patterns_freeze_parameters_and_statistics() -> None:
    network = Normed()
    freeze(network, ["one.*", "two.0.weight"])
    assert trained(network) == {"two.0.bias", "head.weight", "head.bias"}
    assert [type(part).__name__ for part in network.modules() if keeps_statistics(part)] == ["BatchNorm2d"]
    freeze(network, ["two.*"])  # now the second BatchNorm is in a frozen part, too
    assert {id(parameter) for parameter in trained_parameters(network)} == {id(p) for p in network.head.parameters()}
    assert frozen_names(network) == set(network.state_dict()) - {"head.weight", "head.bias"}
    assert set(exchanged_tensors(network)) == {"head.weight", "head.bias"}


@pytest.mark.parametrize("wrap", [lambda network: network, copy.deepcopy, nn.Sequential, MovingAverage])
def test_freeze_marks_survive_copies_and_wrappers(wrap: Any) -> None:
    network = Normed()
    freeze(network, "backbone")
    module = SupervisedModule(wrap(network))
    module.train()
    norms = [part for part in module.modules() if isinstance(part, nn.BatchNorm2d)]
    assert [norm.training for norm in norms] == [False, False]
    assert len(trained_parameters(module.network)) == 2
    with eval_mode(module.network):
        pass
    assert [norm.training for norm in norms] == [False, False]
    assert module.network.training


def test_freeze_buffers_of_other_layers_keep_their_values() -> None:
    """Spectral normalisation updates its vectors in training mode; its submodules keep their mode."""
    network = nn.Sequential(spectral_norm(nn.Linear(4, 4)), nn.Dropout(), nn.Linear(4, 3))
    network[0].parametrizations.weight[0]._u.copy_(torch.eye(4)[0])  # the first vectors may have converged already
    module = SupervisedModule(network)
    free, frozen = copy.deepcopy(module), module
    freeze(frozen.network, ["0.*"])
    before = copy.deepcopy(network.state_dict())
    for trained_module, is_frozen in ((free, False), (frozen, True)):
        trained_module.train()
        trained_module.network(torch.randn(2, 4))
        changed = {
            name for name, tensor in trained_module.network.state_dict().items() if not tensor.equal(before[name])
        }
        assert bool(changed) != is_frozen
        assert trained_module.network[1].training
    assert {name for name in before if name.startswith("0.")} == frozen_names(network)


@pytest.mark.parametrize(
    ("network", "heads"),
    [
        (PrivateCNN(1, 8, 3), {"head"}),
        (ImageClassifier(vgg11(num_classes=3), 3, 1), {"head"}),  # with other linear layers in its backbone
        (multi_exit(ImageClassifier(resnet18(num_classes=3), 3, 1), 3), {f"heads.{number}" for number in range(4)}),
        (multi_exit(PrivateCNN(1, 8, 3), 3).shallow(1), {"heads.0"}),
        (nn.Sequential(nn.Flatten(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3)), {"3"}),
    ],
)
def test_freeze_backbone_trains_heads_only(network: nn.Module, heads: set[str]) -> None:
    before = {name for name, _ in network.named_parameters()}
    freeze(network, "backbone")
    assert trained(network) == {name for name in before if any(name.startswith(f"{head}.") for head in heads)}
    assert {prefix.removesuffix("linear.") for prefix in head_prefixes(network)} == {f"{head}." for head in heads}


def test_load_exchanged_keeps_frozen_tensors_and_requires_all_others() -> None:
    network, other = Normed(), Normed()
    freeze(network, ["one.*"])
    before = copy.deepcopy(network.state_dict())
    load_exchanged(network, other.state_dict())
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, (before if name.startswith("one.") else other.state_dict())[name]), name
    with pytest.raises(RuntimeError, match=r"Missing key.*head\.bias"):
        load_exchanged(
            network, {name: tensor for name, tensor in exchanged_tensors(other).items() if "bias" not in name}
        )


def test_freeze_shared_parameter_is_frozen_under_all_names() -> None:
    network: Any = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3), "c": nn.Linear(3, 3)})
    network["b"].weight = network["a"].weight
    freeze(network, ["b.weight"])
    assert frozen_names(network) == {"a.weight", "b.weight"}


@pytest.mark.parametrize(
    ("patterns", "words"),
    [
        (
            ["one.*", "stages.*"],
            r"expected patterns that match a parameter of Normed, got 'stages\.\*'\. Its .* one\.0",
        ),
        (["running_mean"], "expected patterns that match a parameter"),
        (["*"], "expected patterns that leave a parameter to train, got"),
    ],
)
def test_freeze_invalid_patterns_raise_one_line_user_error(patterns: list[str], words: str) -> None:
    network = Normed()
    with pytest.raises(UserError, match=f"^client.freeze: {words}") as error:
        freeze(network, patterns)
    assert "\n" not in str(error.value)
    assert trained(network) == {name for name, _ in network.named_parameters()}
    with pytest.raises(UserError, match="expected patterns for a network without a linear layer"):
        freeze(nn.Conv2d(1, 1, 1), "backbone")
