"""Residual networks for small images (He et al., 2016), for training on CPUs."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from fedekd.errors import require, require_choice
from fedekd.models.cnn import height_and_width

_MIN_IMAGE_SIZE = 4  # two strides of 2 reduce it to one pixel
_NUM_GROUPS = 2  # of GroupNorm, as in Reddi et al., 2021
_LAYERS_PER_GROUP = 6  # depth 6n + 2: three groups of n blocks with two convolutions, the stem, the linear layer

NORMS = ("group", "batch")


def _norm(kind: str, channels: int) -> nn.Module:
    return nn.GroupNorm(_NUM_GROUPS, channels) if kind == "group" else nn.BatchNorm2d(channels)


def _convolution(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    conv = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv


class _Block(nn.Module):
    """Two 3x3 convolutions and a shortcut without parameters (option A).

    With a stride, or more channels than before, the shortcut is every second pixel, and zeros in the new channels.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, norm: str) -> None:
        super().__init__()
        self.conv1 = _convolution(in_channels, out_channels, stride)
        self.norm1 = _norm(norm, out_channels)
        self.conv2 = _convolution(out_channels, out_channels)
        self.norm2 = _norm(norm, out_channels)
        self.stride = stride
        self.new_channels = out_channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        residual = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        if self.new_channels:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.new_channels))
        return F.relu(residual + x)


class CIFARResNet(nn.Module):
    r"""ResNet for small images: three groups of blocks, global average pooling.

    The network of He et al., section 4.2, has depth $6n + 2$: a 3x3 convolution, three groups of $n$ blocks with 16, 32
    and 64 channels, the second and the third with stride 2, and a linear layer. A block computes

    $$y = \mathrm{ReLU}(F(x) + s(x)), \qquad F = \mathrm{norm} \circ \mathrm{conv} \circ \mathrm{ReLU} \circ
    \mathrm{norm} \circ \mathrm{conv}$$

    with the identity $s$; at the start of a group $s$ takes every second pixel and adds channels of zeros (option A).
    With exits (`multi_exit`), each group is a stage.

    Args:
        in_channels: Channels of an image, at least 1.
        image_size: Height and width of an image, at least 4; a single number is a square.
        num_classes: Number of classes; 1 for regression.
        depth: Layers with weights, 6n + 2: 8, 14, 20, ...
        base_width: Channels of the first group, even, at least 2; the others have 2 and 4 times as many.
        norm: `group`: GroupNorm with two groups, as Reddi et al. use for federated learning. It has no running
            statistics to average between clients, and a batch of one sample is enough. `batch`: BatchNorm, as in the
            paper; its statistics are averaged like weights, and a training batch needs at least two samples.

    Attributes:
        num_features: Dimension of `features(x)`, 4 times `base_width`.
        head: The last linear layer; `forward(x)` is `head(features(x))`.

    Raises:
        UserError: If an argument is out of range.

    Example:
        >>> import torch
        >>> network = CIFARResNet(in_channels=3, image_size=32, num_classes=10, depth=20, norm="batch")
        >>> network(torch.zeros(2, 3, 32, 32)).shape, sum(weights.numel() for weights in network.parameters())
        (torch.Size([2, 10]), 269722)

    Reference:
        K. He, X. Zhang, S. Ren, J. Sun, "Deep Residual Learning for Image Recognition", CVPR 2016. S. Reddi et al.,
        "Adaptive Federated Optimization", ICLR 2021.
    """

    def __init__(
        self,
        in_channels: int = 3,
        image_size: int | Sequence[int] = 32,
        num_classes: int = 10,
        depth: int = 8,
        base_width: int = 16,
        norm: str = "group",
    ) -> None:
        super().__init__()
        for name, value in (("in_channels", in_channels), ("num_classes", num_classes)):
            require(value >= 1, name, "at least 1", value)
        smallest = min(height_and_width(image_size))
        require(smallest >= _MIN_IMAGE_SIZE, "image_size", f"at least {_MIN_IMAGE_SIZE}", image_size)
        blocks, rest = divmod(depth - 2, _LAYERS_PER_GROUP)
        require(blocks >= 1 and rest == 0, "depth", "6n + 2 with n of at least 1: 8, 14, 20, ...", depth)
        require(base_width >= 2 and base_width % 2 == 0, "base_width", "an even number of at least 2", base_width)
        require_choice("norm", norm, NORMS)
        self.stem = nn.Sequential(_convolution(in_channels, base_width), _norm(norm, base_width), nn.ReLU())
        self.groups = nn.Sequential()
        channels = base_width
        for width, stride in ((base_width, 1), (2 * base_width, 2), (4 * base_width, 2)):
            first = _Block(channels, width, stride, norm)
            self.groups.append(nn.Sequential(first, *(_Block(width, width, 1, norm) for _ in range(blocks - 1))))
            channels = width
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.num_features = channels
        self.head = nn.Linear(channels, num_classes)

    def features(self, x: Tensor) -> Tensor:
        """Map images (B, in_channels, H, W) to features (B, num_features), at least 0."""
        features: Tensor = self.pool(self.groups(self.stem(x)))
        return features

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, in_channels, H, W) to logits (B, num_classes)."""
        logits: Tensor = self.head(self.features(x))
        return logits
