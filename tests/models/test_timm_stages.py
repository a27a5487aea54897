from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedekd.early_exit import early_exit_forward
from fedekd.errors import UserError
from fedekd.models import ImageClassifier, build_model, exit_costs, multi_exit, network_flops

timm = pytest.importorskip("timm")
pytestmark = pytest.mark.timm

CLASSES = 5

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 6, "num_heads": 3}
SWIN = {"img_size": 64, "depths": (1, 1, 1, 1), "embed_dim": 8, "num_heads": (1, 1, 2, 2), "window_size": 4}
CONVNEXT = {"depths": (1, 1, 1, 1), "dims": (8, 12, 16, 20)}

#: By name: the arguments, the size of an image, and the widths of the heads.
NETWORKS = {
    "resnet10t": ({"drop_rate": 0.3}, 48, [64, 128, 256, 512]),
    "regnetx_002": ({}, 48, [24, 56, 152, 368]),
    "tinynet_e": ({"drop_path_rate": 0.1}, 48, [16, 24, 56, 1280]),
    "mobilenetv3_small_050": ({}, 48, [8, 16, 24, 1024]),
    "convnext_atto": (CONVNEXT, 48, [8, 12, 16, 20]),
    "vit_tiny_patch16_224": (VIT, 32, [24, 24, 24, 24]),
    "deit_tiny_patch16_224": ({**VIT, "global_pool": "avg"}, 32, [24, 24, 24, 24]),
    "swin_tiny_patch4_window7_224": (SWIN, 64, [8, 16, 32, 64]),
}
every_network = pytest.mark.parametrize(("name", "arguments", "size", "widths"), [(n, *v) for n, v in NETWORKS.items()])


def create(name: str, **arguments) -> nn.Module:
    """Build a network in which no norm and no bias keeps a value that could hide a mistake."""
    torch.manual_seed(0)
    network = timm.create_model(name, num_classes=CLASSES, **arguments)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim <= 1 or not parameter.any():
                parameter += 0.2 * torch.randn_like(parameter)
    return network


@every_network
def test_multi_exit_timm_equals_backbone(name, arguments, size, widths):
    backbone = create(name, **arguments)
    plain = copy.deepcopy(backbone)
    torch.manual_seed(1)
    network = multi_exit(backbone, CLASSES)
    x = torch.randn(3, 3, size, size)
    new = {key for key in network.state_dict() if key.startswith("heads.") and not key.startswith("heads.3.")}
    assert len(network.state_dict()) == len(plain.state_dict()) + len(new)
    assert exit_costs(network, (3, size, size)).full == network_flops(plain, (3, size, size))
    assert [head.num_features for head in network.heads[:-1]] + [network.num_features] == widths
    for training in (False, True):  # with equal draws of dropout
        outputs = []
        for part in (plain, network):
            torch.manual_seed(2)
            outputs.append(part.train(training)(x))
        assert torch.equal(outputs[0], outputs[1][-1])
        assert outputs[0].std(0).min() > 1e-6
    sum(F.cross_entropy(logits, torch.tensor([0, 1, 4])) for logits in outputs[1]).backward()
    assert [key for key, parameter in network.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("name", ["resnet10t", "mobilenetv3_small_050", "swin_tiny_patch4_window7_224"])
def test_multi_exit_timm_stages_end_at_feature_info(name):
    arguments, size, _ = NETWORKS[name]
    backbone = create(name, **arguments).eval()
    plain = copy.deepcopy(backbone)
    names = [info["module"] for info in plain.feature_info if info["reduction"] >= 4]
    seen = []
    for path in names:
        plain.get_submodule(path).register_forward_hook(lambda part, given, output: seen.append(output))
    network = multi_exit(backbone, CLASSES).eval()
    x = torch.randn(2, 3, size, size)
    with torch.no_grad():
        plain(x)
        for stage, expected in zip(network.stages[:-1], seen, strict=False):
            x = stage(x)
            assert torch.equal(x, expected)
    assert len(seen) == 4


@pytest.mark.parametrize(
    ("exits", "blocks"), [(1, [6]), (2, [3, 3]), (3, [2, 2, 2]), (None, [1, 2, 1, 2]), (6, [1] * 6)]
)
def test_multi_exit_timm_vit_has_equal_groups_of_blocks(exits, blocks):
    network = multi_exit(create("vit_tiny_patch16_224", **VIT), CLASSES, exits)
    block = timm.models.vision_transformer.Block
    assert [sum(isinstance(part, block) for part in stage.modules()) for stage in network.stages] == blocks


@pytest.mark.parametrize(
    ("arguments", "pool"),
    [
        ({}, lambda tokens: tokens[:, 0]),
        ({"class_token": False, "global_pool": "avg"}, lambda tokens: tokens.mean(1)),
    ],
)
def test_multi_exit_timm_head_pools_tokens_as_backbone(arguments, pool):
    network = multi_exit(create("vit_tiny_patch16_224", **VIT, **arguments), CLASSES, 2).double()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    head = network.heads[0]
    pooled = pool(network.stages[0](x))
    expected = head.linear(F.layer_norm(pooled, (24,), head.norm.weight, head.norm.bias))
    torch.testing.assert_close(network(x)[0], expected)


def test_multi_exit_timm_keeps_backbone_modes_and_generator():
    backbone = create("resnet10t").train()
    backbone.layer1.eval()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    torch.manual_seed(0)
    network = multi_exit(backbone, CLASSES, 1)
    after = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(after, torch.rand(1))
    state = network.state_dict()
    assert all(any(torch.equal(value, other) for other in state.values()) for value in before.values())
    modes = [(part.training, type(part).__name__) for part in network.modules()]
    assert (False, "BatchNorm2d") in modes
    assert (True, "BatchNorm2d") in modes


def test_multi_exit_timm_networks_of_one_architecture_differ_in_image_size():
    for size in (32, 64, 32):
        network = multi_exit(create("vit_tiny_patch16_224", **{**VIT, "img_size": size}), CLASSES)
        assert network(torch.zeros(1, 3, size, size))[0].shape == (1, CLASSES)


def test_multi_exit_timm_cifar_stem_keeps_resolution():
    for stem in ("", "deep"):  # one and three convolutions
        backbone = create("resnet18", stem_type=stem, stem_width=32, layers=(1, 1, 1, 1), channels=(8, 8, 8, 8))
        network = multi_exit(backbone, CLASSES, cifar_stem=True)
        assert backbone.conv1.weight.shape == (64, 3, 3, 3)
        assert network.stages[0](torch.zeros(2, 3, 16, 16)).shape == (2, 8, 16, 16)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_build_model_timm_network_takes_channels_and_size_of_data(channels):
    spec = {
        "class_path": "timm.create_model",
        "init_args": {"model_name": "vit_tiny_patch16_224"},
        "dict_kwargs": {name: value for name, value in VIT.items() if name != "img_size"},
    }
    wrapped = build_model(spec, input_shape=(channels, 32, 32), num_classes=CLASSES)
    assert isinstance(wrapped, ImageClassifier)
    assert wrapped.backbone.patch_embed.proj.in_channels == channels
    x = torch.randn(2, channels, 32, 32)
    expected = wrapped.eval()(x)
    assert torch.equal(wrapped.head(wrapped.features(x)), expected)
    network = multi_exit(wrapped, CLASSES, 3).eval()
    assert torch.equal(network(x)[-1], expected)
    assert torch.equal(network.head(network.features(x)), expected)


def test_multi_exit_timm_early_exits_equal_full_forward():
    network = multi_exit(create("mobilenetv3_small_050"), CLASSES).eval()
    x = torch.randn(16, 3, 48, 48)
    with torch.no_grad():
        exits = network(x)
    scores = torch.stack([logits.softmax(1).amax(1) for logits in exits])
    thresholds = [float(scores[0].median()), float(scores[1].median()), float("inf"), float("-inf")]
    output = early_exit_forward(network, x, thresholds)
    assert {0, 3} <= {*output.exits.tolist()} <= {0, 1, 3}
    expected = torch.stack([exits[exit_][row] for row, exit_ in enumerate(output.exits.tolist())])
    torch.testing.assert_close(output.logits, expected)
    closed = early_exit_forward(network, x, [float("inf")] * 4)
    torch.testing.assert_close(closed.logits, exits[-1], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["resnet10t", "vit_tiny_patch16_224"])
def test_multi_exit_timm_network_is_copied_and_loaded(name):
    arguments, size, _ = NETWORKS[name]
    network = multi_exit(create(name, **arguments), CLASSES).eval()
    other = multi_exit(timm.create_model(name, num_classes=CLASSES, **arguments), CLASSES).eval()
    other.load_state_dict(network.state_dict())
    x = torch.randn(2, 3, size, size)
    for same in (other, copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert torch.equal(same(x)[-1], network(x)[-1])


ResNet = timm.models.resnet.ResNet


class Scaled(ResNet):
    def forward_features(self, x: Tensor) -> Tensor:
        x = self.layer1(self.maxpool(self.act1(self.bn1(self.conv1(x)))))
        return self.layer4(self.layer3(1.001 * self.layer2(x)))


class Branched(ResNet):
    """A second branch that starts at zero."""

    def __init__(self, *arguments, **options) -> None:
        super().__init__(*arguments, **options)
        self.gain = nn.Parameter(torch.zeros(1))

    def forward_features(self, x: Tensor) -> Tensor:
        return super().forward_features(x) + self.gain * x.mean()


class Noisy(ResNet):
    """Dropout between the stages, in training only."""

    def forward_features(self, x: Tensor) -> Tensor:
        x = self.layer1(self.maxpool(self.act1(self.bn1(self.conv1(x)))))
        return self.layer4(self.layer3(F.dropout(self.layer2(x), 0.1, self.training)))


class AfterHead(ResNet):
    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return -super().forward_head(x, pre_logits)


@pytest.mark.parametrize("kind", [Scaled, Branched, Noisy, AfterHead])
def test_multi_exit_timm_other_forward_raises_user_error(kind, monkeypatch):
    monkeypatch.setattr(kind, "__module__", "timm.models.resnet")
    backbone = kind(timm.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=CLASSES)
    message = f"got {kind.__name__}: the composition of its modules has other outputs. Pass its stages as split="
    with pytest.raises(UserError, match=message):
        multi_exit(backbone, CLASSES)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("deit_tiny_distilled_patch16_224", VIT, "its classifier is not one linear layer but a tuple"),
        ("resnetv2_50", {"layers": (1, 1, 1, 1)}, "its classifier is not one linear layer but a Conv2d"),
        ("cait_xxs24_224", {**VIT, "num_heads": 2, "depth": 2}, r"its modules cannot be called in sequence \(TypeE"),
    ],
)
def test_multi_exit_timm_other_network_raises_one_line_user_error(name, arguments, message):
    with pytest.raises(UserError, match=rf"got {name} \(\w+\): {message}.*Pass its stages as split=\[") as error:
        multi_exit(create(name, **arguments), CLASSES)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) <= 390
