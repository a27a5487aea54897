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
    ("evaluated", "expected"),
    [
        ([True, True, True], (101, 303, 707)),
        ([False, True, True], (101, 302, 706)),
        ([True, False, True], (101, 303, 705)),
        ([False, False, True], (101, 302, 704)),
        ([False, False, False], (101, 302, 704)),  # the last is always evaluated
    ],
)
def test_flops_at_exits_sum_stages_and_evaluated_heads(evaluated, expected):
    assert COSTS.flops_at_exits(evaluated) == expected
    assert COSTS.full == 704


def test_flops_at_exits_wrong_length_raises_value_error():
    with pytest.raises(ValueError, match="expected 3 entries, one per exit, got 2"):
        COSTS.flops_at_exits([True, True])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exit_costs_cnn_matches_manual_count(dtype):
    network = multi_exit(PrivateCNN(3, (16, 32), 7), 7, grid=2).to(dtype)
    costs = exit_costs(network, (3, 16, 32))
    convolutions = [2 * 9 * 3 * 64 * 16 * 32, 2 * 9 * 64 * 128 * 8 * 16, 2 * 9 * 128 * 128 * 4 * 8]
    assert costs.stages == (convolutions[0], convolutions[1], convolutions[2] + 2 * (128 * 2 * 4) * 256)
    assert costs.heads == (2 * 64 * 4 * 7, 2 * 128 * 4 * 7, 2 * 256 * 7)
    assert costs.full == sum(convolutions) + 2 * 1024 * 256 + 2 * 256 * 7


@pytest.mark.parametrize("training", [True, False])
def test_exit_costs_transformer_matches_manual_count(training, monkeypatch):
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


def test_exit_costs_encoder_layer_with_fast_path_is_counted():
    tokens, dim, mlp = 9, 16, 24
    encoder = nn.TransformerEncoderLayer(dim, 2, mlp, batch_first=True)
    stages = [nn.Sequential(nn.Conv2d(1, dim, 2, stride=2), Tokens()), nn.Sequential(encoder, nn.Flatten())]
    network = MultiExitNetwork(stages, [ExitHead(dim, 3, "tokens"), nn.Linear(tokens * dim, 3)]).eval()
    block = 2 * tokens * dim * 4 * dim + 2 * 2 * tokens * tokens * dim + 2 * 2 * tokens * dim * mlp
    assert exit_costs(network, (1, 6, 6)) == ExitCosts((2 * tokens * 4 * dim, block), (2 * dim * 3, 2 * 144 * 3))


def test_exit_costs_keeps_network_and_torch_settings():
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


def test_exit_costs_invalid_image_shape_raises_one_line_user_error():
    network = multi_exit(PrivateCNN(), 10)
    with pytest.raises(UserError, match=r"image_shape: .* got \(3, 28, 28\)") as error:
        exit_costs(network, (3, 28, 28))
    assert "\n" not in str(error.value)
    assert torch.backends.mha.get_fastpath_enabled()
