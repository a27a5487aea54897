"""Exits for a plain network: it is cut into stages whose composition is the network itself, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchvision.models import ConvNeXt, ResNet, SwinTransformer, VisionTransformer

from fedekd.errors import UserError
from fedekd.models.build import eval_mode
from fedekd.models.cnn import Conv3, PrivateCNN, ProxyCNN, height_and_width
from fedekd.models.image_classifier import ImageClassifier
from fedekd.models.multi_exit import ClassToken, ExitHead, Layout, MultiExitNetwork

_LAYOUTS: dict[int, Layout] = {4: "nchw", 3: "tokens", 2: "flat"}  # by the dimensions of a stage's output

Stages = list[list[nn.Module]]


def _merge_deepest(stages: int, exits: int) -> list[int]:
    return [*range(exits), stages]


def _equal_groups(stages: int, exits: int) -> list[int]:
    return [stages * group // exits for group in range(exits + 1)]


class StageSplit(NamedTuple):
    """How a network of some family is cut.

    Attributes:
        stages: As many as there can be, each a list of modules to be called in turn. The network's last linear layer
            is the last thing in the last of them, unless `head` names it.
        group: Joins them to as many as are wanted: from both numbers to the boundaries of the groups.
        default: How many are wanted if nobody says; None is all.
        layout: Of what the stages but the last give; None is to be read off its dimensions.
        image_size: Of images that the stages can take.
        head: The network's last linear layer, where it lies outside the stages.
    """

    stages: Stages
    group: Callable[[int, int], list[int]] = _merge_deepest
    default: int | None = None
    layout: Layout | None = None
    image_size: int | Sequence[int] = 64
    head: nn.Linear | None = None


def multi_exit(
    backbone: nn.Module,
    num_classes: int,
    exits: int | None = None,
    *,
    grid: int = 1,
    cifar_stem: bool = False,
    split: Sequence[nn.Module] | None = None,
) -> MultiExitNetwork:
    """Cut a network into stages and give each an exit; what it computed is the last exit, to the last bit.

    The last head is the network's own last linear layer, and all that lies before it (pooling, norm, flattening)
    belongs to the last stage. The heads before it are new `ExitHead`s; their initial weights come from torch's global
    generator, so the caller seeds it first. The network that was given is changed and belongs to the new one.

    | network | stages |
    | --- | --- |
    | `PrivateCNN`, `Conv3`, `ProxyCNN` | one a convolution with its pool and ReLU: 3, 3 and 2 |
    | torchvision's `ResNet`, `ConvNeXt`, `SwinTransformer` (v1, v2) | its four, the stem joins the first |
    | torchvision's `VisionTransformer` | its blocks in equal groups, 4 unless `exits` says otherwise |
    | `ImageClassifier` | those of the network in it |

    Args:
        backbone: A network of the table, not of a class derived from one; with `split`, any. A `MultiExitNetwork` is
            returned as it is.
        num_classes: Outputs of the backbone: the number of classes, or 1 for regression.
        exits: Number of exits; by default that of the table. With fewer, the deepest stages are merged.
        grid: Cells along each side of the pooling in the new heads, at least 1; see `ExitHead`.
        cifar_stem: For small images: a ResNet's first convolution becomes a new one of 3 x 3 pixels and stride 1, and
            its max-pool goes. Any other family of the table stays as it is.
        split: Modules whose composition is the backbone, which is the caller's word; the last one ends in its last
            linear layer. What the others give must be maps (B, C, H, W), tokens (B, N, D) with the class token first,
            or features (B, F). Their widths are found on images of 64 x 64 pixels, or of the backbone's `image_size`
            if it has one.

    Returns:
        The network with exits, on the backbone's device and in its floating-point type.

    Raises:
        UserError: The class of the backbone is not known and there is no `split`; it does not end in a linear layer of
            `num_classes` outputs; `exits` or `grid` is out of its range; or a stage of `split` does not fit.

    Example:
        >>> network = multi_exit(PrivateCNN(), num_classes=10, exits=2)
        >>> [tuple(logits.shape) for logits in network(torch.zeros(4, 1, 28, 28))]
        [(4, 10), (4, 10)]
    """
    name = type(getattr(backbone, "backbone", backbone)).__name__
    if isinstance(backbone, MultiExitNetwork):
        _check_outputs(name, backbone.head, num_classes)
        if exits not in (None, backbone.num_exits):
            raise UserError(f"exits is {exits}, but the network given has {backbone.num_exits} exits already")
        return backbone
    if split is not None and cifar_stem:
        raise UserError("cifar_stem is True, which changes a network before it is split; leave it out with split")
    cut = _cut(backbone) if split is None else _cut_by_hand(backbone, split)
    most = len(cut.stages)
    number = (cut.default or most) if exits is None else exits
    if not 1 <= number <= most:
        raise UserError(f"exits must be from 1 to {most} for {name}, but is {exits}")
    head = cut.head or _last_linear(cut.stages[-1], name)
    _check_outputs(name, head, num_classes)
    if cifar_stem:
        _replace_stems(backbone)
        cut = _cut(backbone)
    bounds = cut.group(most, number)
    stages = [nn.Sequential(*chain.from_iterable(cut.stages[start:stop])) for start, stop in pairwise(bounds)]
    _take_out(head, stages[-1])
    heads = [
        ExitHead(width, num_classes, layout, grid).to(head.weight)
        for width, layout in _widths(stages, head, cut.image_size, cut.layout)
    ]
    return MultiExitNetwork(stages, [*heads, head])


def _check_outputs(name: str, head: nn.Linear, num_classes: int) -> None:
    if head.out_features != num_classes:
        raise UserError(f"num_classes is {num_classes}, but {name} has {head.out_features} outputs")


def _last_linear(modules: Sequence[nn.Module], name: str) -> nn.Linear:
    leaves = [part for part in nn.ModuleList(modules).modules() if not [*part.children()]]
    last = next((leaf for leaf in reversed(leaves) if not isinstance(leaf, nn.Identity)), leaves[-1])
    if not isinstance(last, nn.Linear):  # a softmax behind it, say, which would be lost
        raise UserError(f"{name} must end in a linear layer to have exits, but ends in a {type(last).__name__}")
    return last


def _take_out(head: nn.Linear, stage: nn.Module) -> None:
    for path, part in [*stage.named_modules()]:
        if part is head:
            parent, _, attribute = path.rpartition(".")
            setattr(stage.get_submodule(parent), attribute, nn.Identity())


def _replace_stems(network: nn.Module) -> None:
    for resnet in [part for part in network.modules() if isinstance(part, ResNet)]:
        old = resnet.conv1
        conv = nn.Conv2d(old.in_channels, old.out_channels, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")  # as torchvision's own
        resnet.conv1 = conv.to(old.weight)
        resnet.maxpool = nn.Identity()


def _widths(
    stages: Sequence[nn.Module], head: nn.Linear, image_size: int | Sequence[int], layout: Layout | None
) -> list[tuple[int, Layout]]:
    """Width and layout of what each stage but the last gives, seen on two black images."""
    found: list[tuple[int, Layout]] = []
    network = nn.ModuleList([*stages, head])
    first = next(part for part in network.modules() if isinstance(part, nn.Conv2d | nn.Linear))
    one = (first.in_features,) if isinstance(first, nn.Linear) else (first.in_channels, *height_and_width(image_size))
    x = torch.zeros(2, *one, device=head.weight.device, dtype=head.weight.dtype)
    buffers = [(buffer, buffer.clone()) for buffer in network.buffers()]
    with eval_mode(network), torch.no_grad():
        try:
            for number, stage in enumerate(stages[:-1], start=1):
                x = _output(stage, x, number)
                each = layout or _LAYOUTS[x.ndim]
                found.append((x.shape[1 if each == "nchw" else -1], each))
        finally:
            for buffer, kept in buffers:  # evaluation mode leaves BatchNorm's alone, but not everyone's
                if not torch.equal(buffer, kept):
                    buffer.copy_(kept)
    return found


def _output(stage: nn.Module, x: Tensor, number: int) -> Tensor:
    try:
        output = stage(x)
    except Exception as error:  # modules of one's own may fail in any way
        said = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"stage {number} cannot take an input of {tuple(x.shape)}: {said}") from error
    if isinstance(output, Tensor) and output.ndim in _LAYOUTS:
        return output
    given = tuple(output.shape) if isinstance(output, Tensor) else f"a {type(output).__name__}"
    raise UserError(f"stage {number} gives {given}; a tensor of 2, 3 or 4 dimensions is needed")


class _ThreeChannels(nn.Module):
    """What an `ImageClassifier` does first: images (B, 1 or 3, H, W) to (B, 3, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.expand(-1, 3, -1, -1)


class _Tokens(nn.Module):
    """What a `VisionTransformer` does before its blocks: images (B, C, H, W) to tokens (B, N + 1, D)."""

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
            raise UserError(f"images must be {size} for this network, but are {x.shape[-2]} x {x.shape[-1]}")
        patches = self.conv_proj(x).flatten(2).permute(0, 2, 1)
        tokens = torch.cat([self.class_token.expand(len(x), -1, -1), patches], dim=1)
        embedded: Tensor = self.dropout(tokens + self.pos_embedding)
        return embedded


def _cut_cnn(network: PrivateCNN | ProxyCNN) -> StageSplit:
    layers = [*network.convolutions]
    stages = [layers[start : start + 3] for start in range(0, len(layers), 3)]
    stages[-1] += [network.fully_connected, network.head]
    return StageSplit(stages)


def _cut_conv3(network: Conv3) -> StageSplit:
    layers = [*network.convolutions]
    return StageSplit([layers[:3], layers[3:6], [*layers[6:], network.pool, network.head]])


def _cut_resnet(network: ResNet) -> StageSplit:
    stem = [network.conv1, network.bn1, network.relu, network.maxpool]
    last = [network.layer4, network.avgpool, nn.Flatten(), network.fc]
    return StageSplit([[*stem, network.layer1], [network.layer2], [network.layer3], last])


def _cut_convnext(network: ConvNeXt) -> StageSplit:
    stages = _pairs(network.features)
    stages[-1] += [network.avgpool, network.classifier]
    return StageSplit(stages)


def _cut_swin(network: SwinTransformer) -> StageSplit:
    stages = _pairs(network.features)
    stages[-1] += [network.norm, network.permute, network.avgpool, network.flatten, network.head]
    return StageSplit(stages, layout="nhwc")


def _cut_vit(network: VisionTransformer) -> StageSplit:
    stages: Stages = [[block] for block in network.encoder.layers]
    stages[0].insert(0, _Tokens(network))
    stages[-1] += [network.encoder.ln, ClassToken(), network.heads]
    return StageSplit(stages, _equal_groups, default=min(4, len(stages)), image_size=network.image_size)


def _cut_image_classifier(network: ImageClassifier) -> StageSplit:
    cut = _cut(network.backbone)
    cut.stages[0].insert(0, _ThreeChannels())
    return cut._replace(head=network.head)


def _pairs(features: nn.Sequential) -> Stages:
    """Each stage after what makes its resolution: the stem, or a downsampling."""
    parts = [*features]
    return [parts[start : start + 2] for start in range(0, len(parts), 2)]


STAGE_SPLITTERS: dict[type[nn.Module], Callable[[Any], StageSplit]] = {
    PrivateCNN: _cut_cnn,
    ProxyCNN: _cut_cnn,
    Conv3: _cut_conv3,
    ResNet: _cut_resnet,
    ConvNeXt: _cut_convnext,
    SwinTransformer: _cut_swin,
    VisionTransformer: _cut_vit,
    ImageClassifier: _cut_image_classifier,
}


def _cut_by_hand(network: nn.Module, split: Sequence[nn.Module]) -> StageSplit:
    if not split:
        raise UserError("split is empty; it must have a module for each stage, at least one")
    return StageSplit([[module] for module in split], image_size=getattr(network, "image_size", 64))


def _cut(network: nn.Module) -> StageSplit:
    # A derived class may have a forward of its own, which the stages would not follow.
    cut = STAGE_SPLITTERS.get(type(network))
    if cut is None:
        known = ", ".join(family.__name__ for family in STAGE_SPLITTERS)
        raise UserError(
            f"{type(network).__name__} cannot be cut into exits; known are {known}, and split=[...] takes the stages"
            " of any other network"
        )
    return cut(network)
