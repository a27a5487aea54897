from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision import models

from fedekd.errors import UserError
from fedekd.models import (
    CIFARResNet,
    ExitHead,
    ImageClassifier,
    MultiExitNetwork,
    PrivateCNN,
    ProxyCNN,
    multi_exit,
    num_parameters,
)

CLASSES = 5


def vit(**arguments) -> models.VisionTransformer:
    sizes = {"image_size": 32, "patch_size": 8, "num_layers": 4, "num_heads": 2, "hidden_dim": 32, "mlp_dim": 64}
    return models.VisionTransformer(**{**sizes, "num_classes": CLASSES, **arguments})


def small_swin(**arguments) -> models.SwinTransformer:
    sizes = {"patch_size": [4, 4], "embed_dim": 8, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 2, 2]}
    return models.SwinTransformer(**sizes, window_size=[2, 2], num_classes=CLASSES, **arguments)


def resnet18() -> models.ResNet:
    return models.resnet18(num_classes=CLASSES)


def with_dropout_before_its_head() -> nn.Module:
    network = models.resnet18(num_classes=CLASSES)
    network.fc = nn.Sequential(nn.Dropout(), nn.Linear(512, CLASSES))
    return network


# By name: the network, the channels of its images, and the widths of its heads.
NETWORKS = {
    "PrivateCNN": (lambda: PrivateCNN(1, 32, CLASSES), 1, [64, 128, 256]),
    "ProxyCNN": (lambda: ProxyCNN(2, 32, CLASSES), 2, [32, 128]),
    "CIFARResNet": (lambda: CIFARResNet(4, 64, CLASSES, norm="batch"), 4, [16, 32, 64]),
    "CIFARResNet14": (lambda: CIFARResNet(1, 64, CLASSES, depth=14, base_width=6), 1, [6, 12, 24]),
    "resnet18": (resnet18, 3, [64, 128, 256, 512]),
    "resnet50": (lambda: models.resnet50(num_classes=CLASSES), 3, [256, 512, 1024, 2048]),
    "resnet18_dropout": (with_dropout_before_its_head, 3, [64, 128, 256, 512]),
    "convnext_tiny": (lambda: models.convnext_tiny(num_classes=CLASSES), 3, [96, 192, 384, 768]),
    "swin_t": (lambda: models.swin_t(num_classes=CLASSES), 3, [96, 192, 384, 768]),
    "swin_v2_t": (lambda: models.swin_v2_t(num_classes=CLASSES), 3, [96, 192, 384, 768]),
    "vit": (vit, 3, [32, 32, 32, 32]),
    "vit_pre_logits": (lambda: vit(representation_size=24, dropout=0.1), 3, [32, 32, 32, 24]),
    "wrapped_resnet18": (
        lambda: ImageClassifier(models.resnet18(num_classes=CLASSES), CLASSES, in_channels=1),
        1,
        [64, 128, 256, 512],
    ),
    "wrapped_vit": (lambda: ImageClassifier(vit(), CLASSES, in_channels=1), 1, [32, 32, 32, 32]),
    "wrapped_PrivateCNN": (
        lambda: ImageClassifier(PrivateCNN(3, 32, CLASSES), CLASSES, in_channels=1),
        1,
        [64, 128, 256],
    ),
}
every_network = pytest.mark.parametrize(("build", "channels", "widths"), NETWORKS.values(), ids=NETWORKS)


def randomised(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """No weight or running statistic keeps a value, such as a zero, under which a mistake would not show."""
    torch.manual_seed(seed)
    network = build()
    with torch.no_grad():
        for parameter in network.parameters():
            spread = 0.5 / max(1, parameter[0].numel()) ** 0.5 if parameter.ndim > 1 else 0.2
            parameter.add_(torch.randn_like(parameter) * spread)
        for part in network.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.running_mean.normal_(std=0.1)
                part.running_var.uniform_(0.5, 2)
    return network.eval()


@every_network
def test_multi_exit_last_exit_equals_backbone(build, channels, widths):
    backbone = randomised(build)
    plain = copy.deepcopy(backbone)
    network = multi_exit(backbone, CLASSES)
    fixed = any(isinstance(part, PrivateCNN | ProxyCNN | models.VisionTransformer) for part in plain.modules())
    size = 32 if fixed else 64  # a last map of 2 x 2 pixels: of a single one, all poolings are the same
    x = torch.randn(3, channels, size, size)
    with torch.no_grad():
        expected = plain(x)
        exits = network(x)
        features = network.features(x)
        assert (exits[-1] - expected).abs().max() == 0
        assert torch.equal(network.head(features), expected)
    assert expected.std(0).min() > 1e-3
    assert network.num_exits == len(exits) == len(widths)
    assert [tuple(logits.shape) for logits in exits] == [(3, CLASSES)] * len(widths)
    assert features.shape == (3, network.num_features) == (3, widths[-1])
    assert [head.num_features for head in network.heads[:-1]] == widths[:-1]
    assert network.head is network.heads[-1]
    new = sum(2 * width + width * CLASSES + CLASSES for width in widths[:-1])
    assert num_parameters(network) == num_parameters(plain) + new


@every_network
def test_multi_exit_gradient_reaches_every_parameter(build, channels, widths):
    network = multi_exit(randomised(build), CLASSES).train()
    for part in network.modules():
        if hasattr(part, "p"):  # dropout and stochastic depth may hide a part for a step
            part.p = 0.0
    exits = network(torch.randn(3, channels, 32, 32))
    sum(F.cross_entropy(logits, torch.tensor([0, 1, 4])) for logits in exits).backward()
    silent = [name for name, parameter in network.named_parameters() if parameter.grad is None]
    assert silent == []
    assert all(head.weight.grad.abs().max() > 0 for head in [network.head, *(h.linear for h in network.heads[:-1])])


@pytest.mark.parametrize("wrapped", [False, True])
def test_multi_exit_cifar_stem_replaces_only_stem(wrapped):
    resnet = randomised(resnet18).double()
    backbone = ImageClassifier(resnet, CLASSES, in_channels=3) if wrapped else resnet
    before = resnet.conv1
    torch.manual_seed(3)
    network = multi_exit(backbone, CLASSES, cifar_stem=True)
    conv = resnet.conv1
    assert conv is not before
    assert (conv.kernel_size, conv.stride, conv.padding, conv.bias) == ((3, 3), (1, 1), (1, 1), None)
    assert (conv.in_channels, conv.out_channels, conv.weight.dtype) == (3, 64, torch.float64)
    torch.manual_seed(3)
    nn.Conv2d(3, 64, 3, bias=False)  # PyTorch's initialisation is drawn first, then torchvision's
    expected = torch.empty(64, 3, 3, 3).normal_(std=(2 / (64 * 9)) ** 0.5)
    torch.testing.assert_close(conv.weight.detach(), expected.double())
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        assert network.stages[0](x).shape == (2, 64, 32, 32)
        modified = backbone(x)
        assert torch.equal(network(x)[-1], modified)


def test_multi_exit_cifar_stem_keeps_other_families():
    one, other = (multi_exit(randomised(vit), CLASSES, cifar_stem=stem).eval() for stem in (False, True))
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(one(x)[-1], other(x)[-1])


@pytest.mark.parametrize(
    ("build", "watched"),
    [
        (resnet18, ["layer1", "layer2", "layer3"]),
        (lambda: models.convnext_tiny(num_classes=CLASSES), ["features.1", "features.3", "features.5"]),
        (small_swin, ["features.1", "features.3", "features.5"]),
        (vit, [f"encoder.layers.encoder_layer_{block}" for block in range(3)]),
        (lambda: PrivateCNN(3, 32, CLASSES), ["convolutions.2", "convolutions.5"]),
    ],
    ids=["resnet18", "convnext_tiny", "swin", "vit", "PrivateCNN"],
)
def test_multi_exit_stages_match_hooks_in_backbone(build, watched):
    backbone = randomised(build)
    plain = copy.deepcopy(backbone)
    seen = []
    for name in watched:
        plain.get_submodule(name).register_forward_hook(lambda part, given, output: seen.append(output.clone()))
    network = multi_exit(backbone, CLASSES).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        plain(x)
        exits = network(x)
        for stage, expected, head, logits in zip(network.stages, seen, network.heads, exits, strict=False):
            x = stage(x)
            assert torch.equal(x, expected)
            assert torch.equal(logits, head(expected))
    assert len(seen) == len(watched) == network.num_exits - 1


def blocks_of(network: MultiExitNetwork) -> list[int]:
    kind = models.vision_transformer.EncoderBlock
    return [sum(isinstance(part, kind) for part in stage) for stage in network.stages]


@pytest.mark.parametrize(
    ("layers", "exits", "blocks"),
    [
        (4, None, [1, 1, 1, 1]),
        (6, 3, [2, 2, 2]),
        (6, 4, [1, 2, 1, 2]),
        (3, None, [1, 1, 1]),
        (5, 1, [5]),
        (2, 2, [1, 1]),
    ],
)
def test_multi_exit_vit_has_equal_groups_of_blocks(layers, exits, blocks):
    backbone = randomised(lambda: vit(num_layers=layers))
    plain = copy.deepcopy(backbone)
    network = multi_exit(backbone, CLASSES, exits).eval()
    assert blocks_of(network) == blocks
    assert max(blocks) - min(blocks) <= 1
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(network(x)[-1], plain(x))


def test_multi_exit_vit_other_image_size_raises_user_error():
    network = multi_exit(vit(), CLASSES)
    with pytest.raises(UserError, match="images: expected 32 x 32 for this network, got 64 x 16"):
        network(torch.zeros(2, 3, 64, 16))


@pytest.mark.parametrize("exits", [1, 2, 3, 4])
@pytest.mark.parametrize("wrapped", [False, True])
def test_multi_exit_fewer_exits_merge_deepest_stages(exits, wrapped):
    backbone = randomised(resnet18)
    plain = copy.deepcopy(backbone)
    if wrapped:
        backbone = ImageClassifier(backbone, CLASSES, in_channels=1)
    network = multi_exit(backbone, CLASSES, exits).eval()
    assert network.num_exits == exits
    x = torch.randn(2, 1 if wrapped else 3, 32, 32)
    assert [head.num_features for head in network.heads[:-1]] == [64, 128, 256][: exits - 1]
    assert torch.equal(network(x)[-1], plain(x.expand(-1, 3, -1, -1)))


@pytest.mark.parametrize("name", ["PrivateCNN", "vit", "wrapped_resnet18"])
def test_multi_exit_state_loads_into_equal_network(name):
    build, channels, _ = NETWORKS[name]
    one, other = (multi_exit(randomised(build, seed), CLASSES).eval() for seed in (1, 2))
    x = torch.randn(2, channels, 32, 32)
    assert not torch.equal(one(x)[-1], other(x)[-1])
    other.load_state_dict(one.state_dict())
    for logits, expected in zip(other(x), one(x), strict=True):
        assert torch.equal(logits, expected)
    assert torch.equal(copy.deepcopy(one)(x)[0], one(x)[0])


def test_multi_exit_new_heads_follow_global_seed():
    built = []
    for seed in (1, 1, 2):
        backbone = PrivateCNN()
        torch.manual_seed(seed)
        built.append(multi_exit(backbone, 10).heads[0].linear.weight)
    assert torch.equal(built[0], built[1])
    assert not torch.equal(built[0], built[2])


class Counting(nn.Module):
    """Counts its calls in a buffer, in evaluation mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return x


def test_multi_exit_keeps_modes_buffers_dtypes_and_generator():
    shallow = [nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Dropout(), Counting()]
    backbone = nn.Sequential(*shallow, nn.Flatten(), nn.Linear(3, CLASSES)).double()
    backbone[1].eval()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    torch.manual_seed(0)
    network = multi_exit(backbone, CLASSES, split=[backbone[:4], backbone[4:]])
    after = torch.rand(1)
    torch.manual_seed(0)
    ExitHead(3, CLASSES)
    assert torch.equal(after, torch.rand(1))  # the heads drew, and nothing else
    assert [part.training for part in shallow] == [True, False, True, True]
    kept = network.stages[0][0].state_dict()
    assert all(torch.equal(value, before[name]) for name, value in kept.items())
    assert all(parameter.dtype == torch.float64 for parameter in network.parameters())


class TwoBranches(nn.Module):
    """A user's network whose shallow part returns outputs of the given shape."""

    def __init__(self, shape: str, image_size: int = 64) -> None:
        super().__init__()
        self.image_size = image_size
        shallow = {
            "maps": [nn.Conv2d(1, 6, 3, padding=1)],
            "tokens": [nn.Conv2d(1, 9, 3, padding=1), nn.Flatten(2), nn.Linear(image_size**2, 7)],
            "flat": [nn.Conv2d(1, 2, 1), nn.Flatten(), nn.Linear(2 * image_size**2, 8)],
        }[shape]
        self.shallow = nn.Sequential(*shallow)
        self.deep = nn.Sequential(nn.ReLU(), nn.Flatten(), nn.LazyLinear(4), nn.Tanh(), nn.Linear(4, CLASSES))
        self.eval()(torch.zeros(1, 1, image_size, image_size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.deep(self.shallow(x))


@pytest.mark.parametrize(("shape", "width"), [("maps", 6), ("tokens", 7), ("flat", 8)])
@pytest.mark.parametrize("image_size", [64, 12])
def test_multi_exit_split_by_modules(shape, width, image_size):
    backbone = randomised(lambda: TwoBranches(shape, image_size))
    plain = copy.deepcopy(backbone)
    network = multi_exit(backbone, CLASSES, split=[backbone.shallow, backbone.deep])
    x = torch.randn(3, 1, image_size, image_size)
    shallow = plain.shallow(x)
    pooled = {"maps": lambda: shallow.mean((2, 3)), "tokens": lambda: shallow[:, 0], "flat": lambda: shallow}[shape]()
    exits = network(x)
    assert torch.equal(exits[1], plain(x))
    head = network.heads[0]
    torch.testing.assert_close(exits[0], head.linear(F.layer_norm(pooled, (width,), head.norm.weight, head.norm.bias)))
    assert network.num_features == 4
    assert multi_exit(plain, CLASSES, 1, split=[plain.shallow, plain.deep]).num_exits == 1


def test_multi_exit_split_of_perceptron_needs_no_image_size():
    layers = [nn.Flatten(), nn.Linear(30, 8), nn.ReLU(), nn.Linear(8, CLASSES)]
    backbone = nn.Sequential(*layers)
    plain = copy.deepcopy(backbone)
    network = multi_exit(backbone, CLASSES, split=[backbone[:3], layers[3]])
    x = torch.randn(2, 1, 5, 6)
    assert torch.equal(network(x)[1], plain(x))
    assert network.head is layers[3]


@pytest.mark.parametrize("grid", [1, 2, 3])
@pytest.mark.parametrize("size", [(6, 6), (12, 6), (1, 1), (2, 7)])
def test_exit_head_averages_cells_of_maps(grid, size):
    torch.manual_seed(0)
    head = ExitHead(4, CLASSES, grid=grid).double()
    x = torch.randn(3, 4, *size, dtype=torch.float64)
    assert head(x).shape == (3, CLASSES)
    last = ExitHead(4, CLASSES, "nhwc", grid).double()
    last.load_state_dict(head.state_dict())
    torch.testing.assert_close(last(x.permute(0, 2, 3, 1)), head(x))
    assert head.num_features == last.num_features == 4 * grid**2
    if all(pixels % grid == 0 for pixels in size):
        cells = x.reshape(3, 4, grid, size[0] // grid, grid, size[1] // grid).mean((3, 5)).flatten(1)
        centred = cells - cells.mean(1, keepdim=True)
        normal = centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt()
        torch.testing.assert_close(head(x), normal @ head.linear.weight.T + head.linear.bias)


@pytest.mark.parametrize(("layout", "pool"), [("tokens", lambda x: x[:, 0]), ("patches", lambda x: x.mean(1))])
def test_exit_head_reduces_tokens(layout, pool):
    head = ExitHead(4, CLASSES, layout).double()
    x = torch.randn(3, 6, 4, dtype=torch.float64)
    expected = head.linear(F.layer_norm(pool(x), (4,), head.norm.weight, head.norm.bias))
    torch.testing.assert_close(head(x), expected)


def test_multi_exit_grid_is_passed_to_new_heads():
    network = multi_exit(PrivateCNN(1, 32, CLASSES), CLASSES, grid=2)
    assert [head.num_features for head in network.heads[:-1]] == [256, 512]
    assert network(torch.zeros(1, 1, 32, 32))[0].shape == (1, CLASSES)


def test_multi_exit_network_with_exits_is_returned():
    network = multi_exit(PrivateCNN(), 10, 2)
    assert multi_exit(network, 10) is network
    assert multi_exit(network, 10, 2) is network
    with pytest.raises(UserError, match="exits: expected 2, the exits of the given network, got 3"):
        multi_exit(network, 10, 3)
    with pytest.raises(UserError, match="num_classes: expected 10, the outputs of MultiExitNetwork, got 4"):
        multi_exit(network, 4)


class OwnForward(PrivateCNN):
    """What it computes is not what its stages would."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return -super().forward(x)


def ends_in_softmax() -> nn.Module:
    network = models.resnet18(num_classes=CLASSES)
    network.fc = nn.Sequential(network.fc, nn.LogSoftmax(1))
    return network


@pytest.mark.parametrize(
    ("build", "arguments", "message"),
    [
        (PrivateCNN, {"num_classes": 7}, "num_classes: expected 10, the outputs of PrivateCNN, got 7"),
        (PrivateCNN, {"exits": 4}, "exits: expected 1 to 3 for PrivateCNN, got 4"),
        (PrivateCNN, {"exits": 0}, "exits: expected 1 to 3 for PrivateCNN, got 0"),
        (PrivateCNN, {"grid": 0}, "grid: expected at least 1, got 0"),
        (lambda: vit(num_classes=10), {"exits": 5}, "exits: expected 1 to 4 for VisionTransformer, got 5"),
        (
            lambda: ImageClassifier(models.resnet18(num_classes=10), 10, 1),
            {"exits": 5},
            "exits: expected 1 to 4 for ResNet, got 5",
        ),
        (
            models.alexnet,
            {},
            "expected one of fedekd's PrivateCNN, .*torchvision's VisionTransformer.* got .*AlexNet.* split=",
        ),
        (lambda: ImageClassifier(models.alexnet(num_classes=10), 10, 3), {}, "got .*AlexNet"),
        (OwnForward, {}, "got .*OwnForward"),
        (ends_in_softmax, {"num_classes": CLASSES}, "ResNet: expected a linear layer .* got LogSoftmax"),
    ],
)
def test_multi_exit_invalid_backbone_raises_one_line_user_error(build, arguments, message):
    with pytest.raises(UserError, match=message) as error:
        multi_exit(build(), **{"num_classes": 10, **arguments})
    assert "\n" not in str(error.value)


def test_multi_exit_error_keeps_stem():
    backbone = models.resnet18(num_classes=CLASSES)
    before = backbone.conv1
    with pytest.raises(UserError, match="num_classes"):
        multi_exit(backbone, 9, cifar_stem=True)
    assert backbone.conv1 is before


class PrivateProxyPair(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x, x


@pytest.mark.parametrize(
    ("stages", "arguments", "message"),
    [
        ([], {}, "split: expected at least one module"),
        ([nn.Conv2d(1, 2, 3), nn.Conv2d(2, 10, 3)], {}, "Sequential: expected a linear layer .* got Conv2d"),
        ([nn.Conv2d(1, 2, 3), nn.Linear(8, 4)], {}, "num_classes: expected 4, the outputs of Sequential, got 10"),
        ([nn.Conv2d(1, 2, 3), nn.Linear(8, 10)], {"exits": 3}, "exits: expected 1 to 2 for Sequential, got 3"),
        ([nn.Conv2d(1, 2, 3), nn.Linear(8, 10)], {"cifar_stem": True}, "cifar_stem: expected False with split"),
        (
            [nn.Conv2d(1, 2, 3), nn.Conv2d(3, 2, 3), nn.Linear(8, 10)],
            {},
            r"stage 2: expected to accept inputs of \(2, 2, 62, 62\)",
        ),
        (
            [nn.Sequential(nn.Conv2d(1, 2, 3), PrivateProxyPair()), nn.Linear(8, 10)],
            {},
            "stage 1: expected a tensor .* got a tuple",
        ),
        (
            [nn.Sequential(nn.Conv2d(1, 2, 3), nn.Unflatten(1, (1, 2))), nn.Linear(8, 10)],
            {},
            r"stage 1: expected a tensor of 2, 3 or 4 dimensions, got \(2, 1, 2, 62, 62\)",
        ),
    ],
)
def test_multi_exit_invalid_split_raises_one_line_user_error(stages, arguments, message):
    with pytest.raises(UserError, match=message) as error:
        multi_exit(nn.Sequential(*stages), 10, split=stages, **arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"width": 0}, "width: expected at least 1, got 0"),
        ({"num_classes": 0}, "num_classes: expected at least 1, got 0"),
        ({"grid": -1}, "grid: expected at least 1, got -1"),
        ({"layout": "nwhc"}, "layout: .* got 'nwhc'. Did you mean 'nhwc'"),
    ],
)
def test_exit_head_invalid_arguments_raise_user_error(arguments, message):
    with pytest.raises(UserError, match=message):
        ExitHead(**{"width": 3, "num_classes": 2, **arguments})


@pytest.mark.parametrize(
    ("stages", "heads", "message"),
    [
        (0, [], "0 stages and 0 heads"),
        (2, [nn.Linear(2, 2)], "2 stages and 1 heads"),
        (1, [nn.Linear(2, 2), nn.Linear(2, 2)], "1 stages and 2 heads"),
        (1, [nn.Identity()], "expected nn.Linear or ExitHead as the last one, got Identity"),
    ],
)
def test_multi_exit_network_invalid_heads_raise_user_error(stages, heads, message):
    with pytest.raises(UserError, match=message):
        MultiExitNetwork([nn.Identity() for _ in range(stages)], heads)


def test_multi_exit_class_of_a_known_name_is_named_in_full() -> None:
    class ResNet(models.ResNet):
        pass

    network = ResNet(models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=3)
    with pytest.raises(
        UserError, match=r"torchvision's ResNet, .* \(no subclass\) .*got .*<locals>\.ResNet\. Pass the"
    ):
        multi_exit(network, 3)
