from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils import flop_counter
from torchvision.models import ResNet, VisionTransformer
from torchvision.models.resnet import BasicBlock

from fedekd.errors import UserError
from fedekd.models import ExitCosts, ExitHead, MultiExitNetwork, PrivateCNN, exit_costs, multi_exit

COSTS = ExitCosts(stages=(100, 200, 400), heads=(1, 2, 4))


@pytest.mark.parametrize(
    ("evaluated", "leaving"),
    [
        ([True, True, True], (101, 303, 707)),
        ([False, True, True], (101, 302, 706)),
        ([True, False, True], (101, 303, 705)),
        ([False, False, True], (101, 302, 704)),
        ([False, False, False], (101, 302, 704)),  # the last is always evaluated
    ],
)
def test_an_image_pays_for_the_stages_and_the_evaluated_heads_on_its_way(evaluated, leaving):
    assert COSTS.flops_at_exits(evaluated) == leaving
    assert COSTS.full == 704


def test_every_exit_must_be_spoken_of():
    with pytest.raises(ValueError, match="2 entries, but there are 3 exits"):
        COSTS.flops_at_exits([True, True])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_cnn_counted_by_hand(dtype):
    network = multi_exit(PrivateCNN(3, (16, 32), 7), 7, grid=2).to(dtype)
    costs = exit_costs(network, (3, 16, 32))
    convolutions = [2 * 9 * 3 * 64 * 16 * 32, 2 * 9 * 64 * 128 * 8 * 16, 2 * 9 * 128 * 128 * 4 * 8]
    assert costs.stages == (convolutions[0], convolutions[1], convolutions[2] + 2 * (128 * 2 * 4) * 256)
    assert costs.heads == (2 * 64 * 4 * 7, 2 * 128 * 4 * 7, 2 * 256 * 7)
    assert costs.full == sum(convolutions) + 2 * 1024 * 256 + 2 * 256 * 7


@pytest.mark.parametrize("training", [True, False])
def test_a_transformer_counted_by_hand(training, monkeypatch):
    """Neither the fast path of evaluation mode nor a fused attention may hide anything."""
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    monkeypatch.delitem(flop_counter.flop_registry, fused, raising=False)  # older releases cannot count it
    tokens, dim, mlp = 17, 32, 64
    vit = VisionTransformer(32, 8, num_layers=4, num_heads=2, hidden_dim=dim, mlp_dim=mlp, num_classes=5)
    network = multi_exit(vit, 5, exits=3).train(training)
    costs = exit_costs(network, (3, 32, 32))
    embedding = 2 * 16 * (3 * 8 * 8) * dim
    projections = 2 * tokens * dim * (3 * dim + dim)
    attention = 2 * (2 * tokens * tokens * dim)  # the scores, and what they weigh; heads share the width
    block = projections + attention + 2 * (2 * tokens * dim * mlp)
    assert costs.stages == (embedding + block, block, 2 * block)
    assert costs.heads == (2 * dim * 5,) * 3


class Tokens(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(2).transpose(1, 2)


def test_an_encoder_layer_with_a_fast_path_of_its_own_is_counted_too():
    tokens, dim, mlp = 9, 16, 24
    encoder = nn.TransformerEncoderLayer(dim, 2, mlp, batch_first=True)
    stages = [nn.Sequential(nn.Conv2d(1, dim, 2, stride=2), Tokens()), nn.Sequential(encoder, nn.Flatten())]
    network = MultiExitNetwork(stages, [ExitHead(dim, 3, "tokens"), nn.Linear(tokens * dim, 3)]).eval()
    block = 2 * tokens * dim * 4 * dim + 2 * 2 * tokens * tokens * dim + 2 * 2 * tokens * dim * mlp
    assert exit_costs(network, (1, 6, 6)) == ExitCosts((2 * tokens * 4 * dim, block), (2 * dim * 3, 2 * 144 * 3))


def test_the_network_and_torchs_settings_are_left_alone():
    network = multi_exit(ResNet(BasicBlock, [1, 1, 1, 1], num_classes=4), 4).train()
    network.stages[1].eval()
    modes = [part.training for part in network.modules()]
    before = {name: value.clone() for name, value in network.state_dict().items()}
    for fast in (False, True):
        torch.backends.mha.set_fastpath_enabled(fast)
        exit_costs(network, (3, 32, 32))
        assert torch.backends.mha.get_fastpath_enabled() is fast
    assert [part.training for part in network.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())


def test_images_that_do_not_fit_are_told_in_one_line():
    network = multi_exit(PrivateCNN(), 10)
    with pytest.raises(UserError, match=r"image_shape is \(3, 28, 28\), which the network cannot take") as caught:
        exit_costs(network, (3, 28, 28))
    assert "\n" not in str(caught.value)
    assert torch.backends.mha.get_fastpath_enabled()
