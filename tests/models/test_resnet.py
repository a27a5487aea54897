from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedekd.data import FederatedDataModule
from fedekd.errors import UserError
from fedekd.federation import Orchestrator, RoundOptions
from fedekd.methods import ClientOptions, FedAvg
from fedekd.models import CIFARResNet, exit_costs, multi_exit, num_parameters
from fedekd.modules import TrainerFactory

norms = pytest.mark.parametrize("norm", ["group", "batch"])


def reference(network: CIFARResNet, x: Tensor, norm: str) -> Tensor:
    """Literal transcription of the paper, from the weights in their order."""
    tensors = iter([*network.state_dict().items()])

    def take(end: str) -> Tensor:
        name, tensor = next(tensors)
        assert name.endswith(end), name
        return tensor

    def normalised(x: Tensor) -> Tensor:
        scale, shift = (take(end)[:, None, None] for end in ("weight", "bias"))
        if norm == "batch":
            mean, variance = (take(end)[:, None, None] for end in ("running_mean", "running_var"))
            take("num_batches_tracked")
            return scale * (x - mean) / (variance + 1e-5).sqrt() + shift
        halves = []
        for half in x.chunk(2, dim=1):
            mean = half.mean((1, 2, 3), keepdim=True)
            variance = (half - mean).square().mean((1, 2, 3), keepdim=True)
            halves.append((half - mean) / (variance + 1e-5).sqrt())
        return scale * torch.cat(halves, dim=1) + shift

    x = normalised(F.conv2d(x, take("weight"), padding=1)).clamp_min(0)
    for group in range(3):
        for block in range(2):
            stride = 2 if group > 0 and block == 0 else 1
            residual = normalised(F.conv2d(x, take("weight"), stride=stride, padding=1)).clamp_min(0)
            residual = normalised(F.conv2d(residual, take("weight"), padding=1))
            shortcut = torch.zeros_like(residual)
            shortcut[:, : x.shape[1]] = x[:, :, ::stride, ::stride]
            x = (residual + shortcut).clamp_min(0)
    logits = x.mean((2, 3)) @ take("weight").T + take("bias")
    assert next(tensors, None) is None
    return logits


def randomised(network: nn.Module) -> nn.Module:
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if "norm" in name or "stem.1" in name:
                tensor.copy_(torch.rand(tensor.shape) + 0.5)
    return network


@norms
@pytest.mark.parametrize("size", [4, (5, 9), 32])
def test_cifar_resnet_matches_literal_transcription(norm, size):
    torch.manual_seed(0)
    network = randomised(CIFARResNet(2, size, 3, depth=14, base_width=4, norm=norm).double()).eval()
    x = torch.randn(3, 2, *((size, size) if isinstance(size, int) else size), dtype=torch.float64)
    with torch.no_grad():
        logits, features = network(x), network.features(x)
        torch.testing.assert_close(logits, reference(network, x, norm), rtol=1e-10, atol=1e-10)
    assert features.shape == (3, 16) == (3, network.num_features)
    assert torch.equal(network.head(features), logits)
    assert features.min() >= 0


@norms
@pytest.mark.parametrize(("depth", "count"), [(8, 75_290), (14, 172_506), (20, 269_722)])  # 0.27M in Table 6
def test_cifar_resnet_parameter_counts_match_paper(norm, depth, count):
    network = CIFARResNet(depth=depth, norm=norm)
    assert num_parameters(network) == count
    convolutions = [part for part in network.modules() if isinstance(part, nn.Conv2d)]
    assert len(convolutions) + 1 == depth
    assert {part.out_channels for part in convolutions} == {16, 32, 64}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depth": 2}, r"depth: expected 6n \+ 2 with n of at least 1: 8, 14, 20, ..., got 2"),
        ({"depth": 18}, "depth: .* got 18"),
        ({"base_width": 0}, "base_width: expected an even number of at least 2, got 0"),
        ({"base_width": 7}, "base_width: .* got 7"),
        ({"norm": "layer"}, "norm: expected one of group, batch, got 'layer'"),
        ({"image_size": 3}, "image_size: expected at least 4, got 3"),
        ({"in_channels": 0}, "in_channels: expected at least 1, got 0"),
        ({"num_classes": 0}, "num_classes: expected at least 1, got 0"),
    ],
)
def test_cifar_resnet_invalid_argument_raises_user_error(arguments, message):
    with pytest.raises(UserError, match=message):
        CIFARResNet(**arguments)


@norms
def test_cifar_resnet_channels_last_gives_same_output(norm):
    network = CIFARResNet(1, 12, 3, norm=norm).double().eval()
    x = torch.randn(2, 1, 12, 12, dtype=torch.float64)
    expected = network(x)
    network = network.to(memory_format=torch.channels_last)
    x = x.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(network(x), expected)
    maps = network.groups(network.stem(x))
    assert maps.is_contiguous(memory_format=torch.channels_last)


def test_cifar_resnet_group_norm_trains_on_single_samples():
    torch.manual_seed(0)
    network = multi_exit(CIFARResNet(1, 4, 2), num_classes=2)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05)
    samples = [(torch.randn(1, 1, 4, 4), torch.tensor([label])) for label in (0, 1)]
    losses = []
    for _ in range(20):
        for x, label in samples:
            optimizer.zero_grad()
            loss = sum(F.cross_entropy(logits, label) for logits in network(x))
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert all(parameter.grad is not None for parameter in network.parameters())
    assert max(losses[-2:]) < 0.1 * min(losses[:2])


def test_cifar_resnet_exit_costs_match_manual_count():
    costs = exit_costs(multi_exit(CIFARResNet(), num_classes=10), (3, 32, 32))
    stem, wide = 2 * 9 * 3 * 16 * 32**2, 2 * 9 * 16 * 16 * 32**2
    assert costs.stages == (stem + 2 * wide, wide // 2 + wide, wide // 2 + wide)
    assert costs.heads == (320, 640, 1280)


@norms
@pytest.mark.usefixtures("undrawn")
def test_cifar_resnet_fedavg_averages_weights_and_statistics(norm, npz):
    model = {"class_path": "CIFARResNet", "init_args": {"base_width": 4, "norm": norm}}
    run = Orchestrator(
        FedAvg(finetune_epochs=0),
        data=FederatedDataModule(str(npz), num_clients=2, alpha=5.0, batch_size=8),
        client=ClientOptions(local_epochs=1, private_model=model, exits=3),
        trainer=TrainerFactory(accelerator="cpu", precision="32-true", threads=1),
        rounds=RoundOptions(rounds=1),
    )
    run.run()
    states = [client.networks["private"].state_dict() for _, client in sorted(run.engine.clients.items())]
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    statistics = [tensor for name, tensor in states[0].items() if "running_mean" in name]
    assert len(statistics) == (7 if norm == "batch" else 0)
    assert all(tensor.abs().max() > 0 for tensor in statistics)
