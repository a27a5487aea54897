"""Convolutional networks of FedeKD (Appendix H) and of CAFEDistill.

The FedeKD paper gives the widths of its two networks. The rest is chosen here: 3x3 kernels, padding 1, and a 2x2
max-pool and a ReLU after each convolution. For regression the networks have one output: `num_classes=1`.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from fedekd.errors import require

_MIN_IMAGE_SIZE = 8  # three 2x2 max-pools reduce it to one pixel
_MIN_UNPADDED_SIZE = 22  # each 3x3 convolution without padding removes two pixels


def height_and_width(image_size: int | Sequence[int]) -> tuple[int, int]:
    """Convert an image size to (H, W); a number is a square.

    Raises:
        UserError: If it is neither a number nor a pair of numbers.

    Example:
        >>> height_and_width(28), height_and_width([28, 32])
        ((28, 28), (28, 32))
    """
    size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    require(len(size) == 2, "image_size", "a number or (height, width)", image_size)
    return size[0], size[1]


def scaled_widths(widths: Sequence[int], width: float) -> list[int]:
    """Multiply the widths of a network's layers by a factor, rounded.

    Raises:
        UserError: If the factor is not in (0, 1].

    Example:
        >>> scaled_widths((64, 128, 2), 0.25)
        [16, 32, 1]
    """
    require(0 < width <= 1, "width", "a number in (0, 1]", width)
    return [max(1, round(width * full)) for full in widths]


class _ConvNet(nn.Module):
    """Convolutions with max-pool and ReLU, one fully connected layer, linear head.

    Attributes:
        widths: Channels of the convolutions, and features, at width 1.
    """

    widths: tuple[int, ...]

    def __init__(
        self,
        in_channels: int = 1,
        image_size: int | Sequence[int] = 28,
        num_classes: int = 10,
        width: float = 1.0,
    ) -> None:
        super().__init__()
        *channels, num_features = scaled_widths(self.widths, width)
        for name, value in (("in_channels", in_channels), ("num_classes", num_classes)):
            require(value >= 1, name, "at least 1", value)
        rows, columns = height_and_width(image_size)
        require(min(rows, columns) >= _MIN_IMAGE_SIZE, "image_size", f"at least {_MIN_IMAGE_SIZE}", image_size)
        layers: list[nn.Module] = []
        for out_channels in channels:
            # Pooling before ReLU gives the same function (ReLU is monotone) and is 8% faster per step.
            layers += [nn.Conv2d(in_channels, out_channels, 3, padding=1), nn.MaxPool2d(2), nn.ReLU()]
            in_channels, rows, columns = out_channels, rows // 2, columns // 2
        self.convolutions = nn.Sequential(*layers)
        self.fully_connected = nn.Sequential(
            nn.Flatten(), nn.Linear(in_channels * rows * columns, num_features), nn.ReLU()
        )
        self.num_features = num_features
        self.head = nn.Linear(num_features, num_classes)

    def features(self, x: Tensor) -> Tensor:
        """Map images (B, in_channels, H, W) to features (B, num_features), at least 0."""
        features: Tensor = self.fully_connected(self.convolutions(x))
        return features

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, in_channels, H, W) to logits (B, num_classes)."""
        logits: Tensor = self.head(self.features(x))
        return logits


class PrivateCNN(_ConvNet):
    """Private model of FedeKD: convolutions 64-128-128, 256 features.

    Args:
        in_channels: Channels of an image, at least 1.
        image_size: Height and width of an image, at least 8; a single number is a square.
        num_classes: Number of classes; 1 for regression.
        width: Factor of all widths, rounded, in (0, 1]; for clients with less compute.

    Attributes:
        num_features: Dimension of `features(x)`, 256 times `width`.
        head: The last linear layer; `forward(x)` is `head(features(x))`.

    Raises:
        UserError: If an argument is out of range.

    Example:
        >>> import torch
        >>> network = PrivateCNN(in_channels=3, image_size=(8, 16), num_classes=5)
        >>> network(torch.zeros(2, 3, 8, 16)).shape
        torch.Size([2, 5])
    """

    widths = (64, 128, 128, 256)


class ProxyCNN(_ConvNet):
    """Proxy of FedeKD, exchanged with the server: convolutions 32-64, 128 features.

    Args:
        in_channels: Channels of an image, at least 1.
        image_size: Height and width of an image, at least 8; a single number is a square.
        num_classes: Number of classes; 1 for regression.
        width: Factor of all widths, rounded, in (0, 1]; for fewer bytes per round.

    Attributes:
        num_features: Dimension of `features(x)`, 128 times `width`.
        head: The last linear layer; `forward(x)` is `head(features(x))`.

    Raises:
        UserError: If an argument is out of range.

    Example:
        >>> import torch
        >>> ProxyCNN(num_classes=1)(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 1])
    """

    widths = (32, 64, 128)


class Conv3(nn.Module):
    """Network of CAFEDistill: three convolutions, global average pooling.

    The convolutions have 128 channels, 3x3 kernels without padding, a 2x2 max-pool and a ReLU, as in the authors' code
    (arXiv 2601.10015 does not specify them).

    Args:
        in_channels: Channels of an image, at least 1.
        image_size: Height and width of an image, at least 22; a single number is a square.
        num_classes: Number of classes; 1 for regression.

    Attributes:
        num_features: Dimension of `features(x)`, 128.
        head: The last linear layer; `forward(x)` is `head(features(x))`.

    Raises:
        UserError: If an argument is out of range.

    Example:
        >>> import torch
        >>> Conv3(in_channels=3, image_size=32)(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(self, in_channels: int = 3, image_size: int | Sequence[int] = 32, num_classes: int = 10) -> None:
        super().__init__()
        for name, value in (("in_channels", in_channels), ("num_classes", num_classes)):
            require(value >= 1, name, "at least 1", value)
        smallest = min(height_and_width(image_size))
        require(smallest >= _MIN_UNPADDED_SIZE, "image_size", f"at least {_MIN_UNPADDED_SIZE} for Conv3", image_size)
        layers: list[nn.Module] = []
        for channels in (in_channels, 128, 128):
            layers += [nn.Conv2d(channels, 128, 3), nn.MaxPool2d(2), nn.ReLU()]
        self.convolutions = nn.Sequential(*layers)
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.num_features = 128
        self.head = nn.Linear(128, num_classes)

    def features(self, x: Tensor) -> Tensor:
        """Map images (B, in_channels, H, W) to features (B, 128), at least 0."""
        features: Tensor = self.pool(self.convolutions(x))
        return features

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, in_channels, H, W) to logits (B, num_classes)."""
        logits: Tensor = self.head(self.features(x))
        return logits
