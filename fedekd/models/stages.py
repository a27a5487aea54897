"""Split a plain network into stages with exits, without changing its output."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import ConvNeXt, ResNet, SwinTransformer, VisionTransformer

from fedekd.errors import UserError, require, shorten
from fedekd.models.build import eval_mode
from fedekd.models.cnn import Conv3, PrivateCNN, ProxyCNN, height_and_width
from fedekd.models.image_classifier import ImageClassifier
from fedekd.models.mlp import MLP
from fedekd.models.multi_exit import ClassToken, ExitHead, Layout, MultiExitNetwork
from fedekd.models.resnet import CIFARResNet
from fedekd.models.stage_split import Stages, StageSplit, equal_groups, take_out
from fedekd.models.timm_stages import is_of_timm, split_timm

_LAYOUTS: dict[int, Layout] = {4: "nchw", 3: "tokens", 2: "flat"}  # by number of dimensions


def multi_exit(
    backbone: nn.Module,
    num_classes: int,
    exits: int | None = None,
    *,
    grid: int = 1,
    cifar_stem: bool = False,
    split: Sequence[nn.Module] | None = None,
) -> MultiExitNetwork:
    """Split a network into stages with one exit each; the last is its output.

    The last head is the network's last linear layer, and everything before it (pooling, norm, flattening) belongs to
    the last stage. The other heads are new `ExitHead`s, whose initial weights come from torch's global generator; seed
    it before the call. The given network is modified.

    | network | stages |
    | --- | --- |
    | `PrivateCNN`, `Conv3`, `ProxyCNN` | one per convolution with its pool and ReLU: 3, 3 and 2 |
    | `CIFARResNet` | its three groups of blocks, the stem in the first |
    | torchvision's `ResNet`, `ConvNeXt`, `SwinTransformer` (v1, v2) | their four stages, the stem in the first |
    | torchvision's `VisionTransformer` | equal groups of blocks, 4 by default |
    | timm's ResNet, RegNet, EfficientNet, MobileNet, ConvNeXt, Swin | four, at strides 4 to 32, the stem in the first |
    | timm's ViT and DeiT | equal groups of blocks, 4 by default |
    | `ImageClassifier` | those of its backbone |
    | `MLP` | one per hidden layer |

    Other networks of timm (`pip install 'fedekd[timm]'`) work, too, if they are a sequence of modules with a
    `feature_info`: the outputs of the stages are compared with those of a copy of the network.

    Args:
        backbone: A network of a class in the table (not of a subclass); any network with `split`. A `MultiExitNetwork`
            is returned unchanged.
        num_classes: Number of outputs of the backbone: classes, or 1 for regression.
        exits: Number of exits, at least 1; default as in the table. With fewer, the deepest stages are merged.
        grid: Cells per side of the pooling in the new heads, at least 1; see `ExitHead`.
        cifar_stem: For small images: replace a ResNet's first convolution by a new 3x3 one with stride 1, and remove
            its max-pool. No effect on other families.
        split: Modules whose composition is the backbone (not checked); the last one ends in its last linear layer. The
            others must return maps (B, C, H, W), tokens (B, N, D) with the class token first, or features (B, F). Their
            widths are measured on images of 64 x 64 pixels, or of the backbone's `image_size`.

    Returns:
        The network with exits, on the backbone's device and in its floating-point type.

    Raises:
        UserError: If the class of the backbone is unknown and `split` is missing, it does not end in a linear layer of
            `num_classes` outputs, `exits` or `grid` is out of range, or a stage of `split` does not fit.

    Example:
        >>> network = multi_exit(PrivateCNN(), num_classes=10, exits=2)
        >>> [tuple(logits.shape) for logits in network(torch.zeros(4, 1, 28, 28))]
        [(4, 10), (4, 10)]
    """
    name = type(getattr(backbone, "backbone", backbone)).__name__
    if isinstance(backbone, MultiExitNetwork):
        _check_outputs(name, backbone.head, num_classes)
        if exits not in (None, backbone.num_exits):
            raise UserError(f"exits: expected {backbone.num_exits}, the exits of the given network, got {exits}")
        return backbone
    if split is not None and cifar_stem:
        raise UserError("cifar_stem: expected False with split, got True. Replace the stem before the split")
    stage_split = _split(backbone) if split is None else _split_by_modules(backbone, split)
    num_stages = len(stage_split.stages)
    number = (stage_split.default or num_stages) if exits is None else exits
    require(1 <= number <= num_stages, "exits", f"1 to {num_stages} for {name}", exits)
    head = stage_split.head or _last_linear(stage_split.stages[-1], name)
    _check_outputs(name, head, num_classes)
    if cifar_stem:
        _replace_stems(backbone)
        stage_split = _split(backbone)
    bounds = stage_split.group(num_stages, number)
    stages = [nn.Sequential(*chain.from_iterable(stage_split.stages[start:stop])) for start, stop in pairwise(bounds)]
    take_out(head, stages[-1])
    heads = [
        ExitHead(width, num_classes, layout, grid).to(head.weight)
        for width, layout in _widths(stages, head, stage_split.image_size, stage_split.layout)
    ]
    return MultiExitNetwork(stages, [*heads, head])


def _check_outputs(name: str, head: nn.Linear, num_classes: int) -> None:
    require(head.out_features == num_classes, "num_classes", f"{head.out_features}, the outputs of {name}", num_classes)


def _last_linear(modules: Sequence[nn.Module], name: str) -> nn.Linear:
    leaves = [part for part in nn.ModuleList(modules).modules() if not [*part.children()]]
    last = next((leaf for leaf in reversed(leaves) if not isinstance(leaf, nn.Identity)), leaves[-1])
    if not isinstance(last, nn.Linear):  # a final softmax, for example, would be lost
        raise UserError(f"{name}: expected a linear layer as the last one, got {type(last).__name__}")
    return last


def _is_resnet_of_timm(network: nn.Module) -> bool:
    return type(network).__module__ == "timm.models.resnet" and type(network).__name__ == "ResNet"


def _replace_stems(network: nn.Module) -> None:
    resnets: list[Any] = [part for part in network.modules() if isinstance(part, ResNet) or _is_resnet_of_timm(part)]
    for resnet in resnets:
        old = next(part for part in resnet.conv1.modules() if isinstance(part, nn.Conv2d))  # some have three
        conv = nn.Conv2d(old.in_channels, resnet.bn1.num_features, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")  # as in torchvision
        resnet.conv1 = conv.to(old.weight)
        resnet.maxpool = nn.Identity()


def _widths(
    stages: Sequence[nn.Module], head: nn.Linear, image_size: int | Sequence[int], layout: Layout | None
) -> list[tuple[int, Layout]]:
    """Measure width and layout of the outputs of all stages but the last."""
    widths: list[tuple[int, Layout]] = []
    network = nn.ModuleList([*stages, head])
    first = next(part for part in network.modules() if isinstance(part, nn.Conv2d | nn.Linear))
    one = (first.in_features,) if isinstance(first, nn.Linear) else (first.in_channels, *height_and_width(image_size))
    x = torch.zeros(2, *one, device=head.weight.device, dtype=head.weight.dtype)
    buffers = [(buffer, buffer.clone()) for buffer in network.buffers()]
    with eval_mode(network), torch.no_grad():
        try:
            for number, stage in enumerate(stages[:-1], start=1):
                x = _output(stage, x, number)
                stage_layout = layout or _LAYOUTS[x.ndim]
                widths.append((x.shape[1 if stage_layout == "nchw" else -1], stage_layout))
        finally:
            for buffer, original in buffers:  # eval mode protects BatchNorm's buffers, but not all layers'
                if not torch.equal(buffer, original):
                    buffer.copy_(original)
    return widths


def _output(stage: nn.Module, x: Tensor, number: int) -> Tensor:
    try:
        output = stage(x)
    except Exception as error:  # a user's module may raise anything
        message = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"stage {number}: expected to accept inputs of {tuple(x.shape)}. It failed: {message}"
        ) from error
    if isinstance(output, Tensor) and output.ndim in _LAYOUTS:
        return output
    actual = tuple(output.shape) if isinstance(output, Tensor) else f"a {type(output).__name__}"
    raise UserError(f"stage {number}: expected a tensor of 2, 3 or 4 dimensions, got {actual}")


class _ThreeChannels(nn.Module):
    """First step of an `ImageClassifier`: images (B, 1 or 3, H, W) to (B, 3, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.expand(-1, 3, -1, -1)


class _Tokens(nn.Module):
    """First step of a `VisionTransformer`: (B, C, H, W) to (B, N + 1, D)."""

    def __init__(self, network: VisionTransformer) -> None:
        super().__init__()
        self.image_size = network.image_size
        self.conv_proj = network.conv_proj
        self.class_token = network.class_token
        self.pos_embedding = network.encoder.pos_embedding
        self.dropout = network.encoder.dropout

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-2:] != (self.image_size, self.image_size):
            size = f"{self.image_size} x {self.image_size}"
            raise UserError(f"images: expected {size} for this network, got {x.shape[-2]} x {x.shape[-1]}")
        patches = self.conv_proj(x).flatten(2).permute(0, 2, 1)
        tokens = torch.cat([self.class_token.expand(len(x), -1, -1), patches], dim=1)
        embedded: Tensor = self.dropout(tokens + self.pos_embedding)
        return embedded


def _split_cnn(network: PrivateCNN | ProxyCNN) -> StageSplit:
    layers = [*network.convolutions]
    stages = [layers[start : start + 3] for start in range(0, len(layers), 3)]
    stages[-1] += [network.fully_connected, network.head]
    return StageSplit(stages)


def _split_mlp(network: MLP) -> StageSplit:
    stages: Stages = [[layer] for layer in network.layers]
    stages[-1].append(network.head)
    return StageSplit(stages)


def _split_conv3(network: Conv3) -> StageSplit:
    layers = [*network.convolutions]
    return StageSplit([layers[:3], layers[3:6], [*layers[6:], network.pool, network.head]])


def _split_cifar_resnet(network: CIFARResNet) -> StageSplit:
    first, second, third = network.groups
    return StageSplit([[network.stem, first], [second], [third, network.pool, network.head]])


def _split_resnet(network: ResNet) -> StageSplit:
    stem = [network.conv1, network.bn1, network.relu, network.maxpool]
    last = [network.layer4, network.avgpool, nn.Flatten(), network.fc]
    return StageSplit([[*stem, network.layer1], [network.layer2], [network.layer3], last])


def _split_convnext(network: ConvNeXt) -> StageSplit:
    stages = _pairs(network.features)
    stages[-1] += [network.avgpool, network.classifier]
    return StageSplit(stages)


def _split_swin(network: SwinTransformer) -> StageSplit:
    stages = _pairs(network.features)
    stages[-1] += [network.norm, network.permute, network.avgpool, network.flatten, network.head]
    return StageSplit(stages, layout="nhwc")


def _split_vit(network: VisionTransformer) -> StageSplit:
    stages: Stages = [[block] for block in network.encoder.layers]
    stages[0].insert(0, _Tokens(network))
    stages[-1] += [network.encoder.ln, ClassToken(), network.heads]
    return StageSplit(stages, equal_groups, default=min(4, len(stages)), image_size=network.image_size)


def _split_image_classifier(network: ImageClassifier) -> StageSplit:
    stage_split = _split(network.backbone)
    if network.repeats_channels:
        stage_split.stages[0].insert(0, _ThreeChannels())
    return stage_split._replace(head=network.head)


def _pairs(features: nn.Sequential) -> Stages:
    """Group each stage with the stem or the downsampling before it."""
    parts = [*features]
    return [parts[start : start + 2] for start in range(0, len(parts), 2)]


STAGE_SPLITTERS: dict[type[nn.Module], Callable[[Any], StageSplit]] = {
    PrivateCNN: _split_cnn,
    ProxyCNN: _split_cnn,
    Conv3: _split_conv3,
    CIFARResNet: _split_cifar_resnet,
    MLP: _split_mlp,
    ResNet: _split_resnet,
    ConvNeXt: _split_convnext,
    SwinTransformer: _split_swin,
    VisionTransformer: _split_vit,
    ImageClassifier: _split_image_classifier,
}


def _split_by_modules(network: nn.Module, split: Sequence[nn.Module]) -> StageSplit:
    require(len(split) > 0, "split", "at least one module", split)
    return StageSplit([[module] for module in split], image_size=getattr(network, "image_size", 64))


def _full_name(family: type[nn.Module]) -> str:
    return shorten(f"{family.__module__}.{family.__qualname__}")


def _split(network: nn.Module) -> StageSplit:
    # Exact class: a subclass may override forward, which the stages would not follow.
    splitter = split_timm if is_of_timm(network) else STAGE_SPLITTERS.get(type(network))
    if splitter is None:
        known = ", ".join(f"{family.__module__.partition('.')[0]}'s {family.__name__}" for family in STAGE_SPLITTERS)
        raise UserError(
            f"model: expected one of {known} (no subclass) to add exits, got {_full_name(type(network))}. Pass the"
            " stages of another network as split=[...]"
        )
    return splitter(network)
