"""The papers' convolutional networks: two of FedeKD (Appendix H), and one of CAFEDistill.

The paper fixes the widths. What it leaves open is read plainly: 3x3 kernels, padding 1, and a 2x2 max-pool
and a ReLU after each convolution. For regression both networks have a scalar output: `num_classes=1`.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from fedekd.errors import UserError

_MIN_IMAGE_SIZE = 8  # three 2x2 max-pools leave one pixel of it
_MIN_UNPADDED_SIZE = 22  # each 3x3 convolution takes two more


def height_and_width(image_size: int | Sequence[int]) -> tuple[int, int]:
    """`image_size` as (H, W); a single number is a square.

    Raises:
        UserError: It is neither a number nor a pair of numbers.

    Example:
        >>> height_and_width(28), height_and_width([28, 32])
        ((28, 28), (28, 32))
    """
    size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if len(size) != 2:
        raise UserError(f"image_size must be a number or (height, width), but is {image_size}")
    return size


class _ConvNet(nn.Module):
    """Convolutions, each with a max-pool and a ReLU, then one fully connected layer and a linear head."""

    def __init__(
        self,
        channels: Sequence[int],
        num_features: int,
        *,
        in_channels: int,
        image_size: int | Sequence[int],
        num_classes: int,
    ) -> None:
        super().__init__()
        for name, value in (("in_channels", in_channels), ("num_classes", num_classes)):
            if value < 1:
                raise UserError(f"{name} must be at least 1, but is {value}")
        height, width = height_and_width(image_size)
        if min(height, width) < _MIN_IMAGE_SIZE:
            raise UserError(f"image_size must be at least {_MIN_IMAGE_SIZE}, but is {image_size}")
        layers: list[nn.Module] = []
        for out_channels in channels:
            # Pooling first is the same function, as ReLU is monotone, and was measured 8% faster a step.
            layers += [nn.Conv2d(in_channels, out_channels, 3, padding=1), nn.MaxPool2d(2), nn.ReLU()]
            in_channels, height, width = out_channels, height // 2, width // 2
        self.convolutions = nn.Sequential(*layers)
        self.fully_connected = nn.Sequential(
            nn.Flatten(), nn.Linear(in_channels * height * width, num_features), nn.ReLU()
        )
        self.num_features = num_features
        self.head = nn.Linear(num_features, num_classes)

    def features(self, x: Tensor) -> Tensor:
        """What the head sees: images (B, in_channels, H, W) to features (B, num_features), at least 0."""
        features: Tensor = self.fully_connected(self.convolutions(x))
        return features

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, in_channels, H, W) to logits (B, num_classes)."""
        logits: Tensor = self.head(self.features(x))
        return logits


class PrivateCNN(_ConvNet):
    """The larger network, which stays with its client: convolutions 64-128-128, then 256 features.

    Args:
        in_channels: Channels of an image, at least 1.
        image_size: Height and width of an image, at least 8; a single number is a square.
        num_classes: Outputs: the number of classes, or 1 for regression.
        width: All widths are multiplied by this and rounded, in (0, 1]: for clients that have less to compute with.

    Attributes:
        num_features: 256 times the width, that of `features(x)`.
        head: The last linear layer; `forward(x)` is `head(features(x))`.

    Raises:
        UserError: An argument is out of its range.

    Example:
        >>> import torch
        >>> network = PrivateCNN(in_channels=3, image_size=(8, 16), num_classes=5)
        >>> network(torch.zeros(2, 3, 8, 16)).shape
        torch.Size([2, 5])
    """

    def __init__(
        self,
        in_channels: int = 1,
        image_size: int | Sequence[int] = 28,
        num_classes: int = 10,
        width: float = 1.0,
    ) -> None:
        if not 0 < width <= 1:
            raise UserError(f"width must be above 0 and at most 1, but is {width}")
        *channels, num_features = (max(1, round(width * full)) for full in (64, 128, 128, 256))
        super().__init__(
            channels, num_features, in_channels=in_channels, image_size=image_size, num_classes=num_classes
        )


class ProxyCNN(_ConvNet):
    """The light network, which travels to the server and back: convolutions 32-64, then 128 features.

    Args:
        in_channels: Channels of an image, at least 1.
        image_size: Height and width of an image, at least 8; a single number is a square.
        num_classes: Outputs: the number of classes, or 1 for regression.

    Attributes:
        num_features: 128, the width of `features(x)`.
        head: The last linear layer; `forward(x)` is `head(features(x))`.

    Raises:
        UserError: An argument is out of its range.

    Example:
        >>> import torch
        >>> ProxyCNN(num_classes=1)(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 1])
    """

    def __init__(self, in_channels: int = 1, image_size: int | Sequence[int] = 28, num_classes: int = 10) -> None:
        super().__init__((32, 64), 128, in_channels=in_channels, image_size=image_size, num_classes=num_classes)


class Conv3(nn.Module):
    """CAFEDistill's network for CIFAR-10: three convolutions of 128 channels, then the mean over what is left.

    3x3 kernels without padding, a 2x2 max-pool and a ReLU after each, as the authors' code has it
    (arXiv 2601.10015 does not say).

    Args:
        in_channels: Channels of an image, at least 1.
        image_size: Height and width of an image, at least 22; a single number is a square.
        num_classes: Outputs: the number of classes, or 1 for regression.

    Attributes:
        num_features: 128, the width of `features(x)`.
        head: The last linear layer; `forward(x)` is `head(features(x))`.

    Raises:
        UserError: An argument is out of its range.

    Example:
        >>> import torch
        >>> Conv3(in_channels=3, image_size=32)(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(self, in_channels: int = 3, image_size: int | Sequence[int] = 32, num_classes: int = 10) -> None:
        super().__init__()
        for name, value in (("in_channels", in_channels), ("num_classes", num_classes)):
            if value < 1:
                raise UserError(f"{name} must be at least 1, but is {value}")
        if min(height_and_width(image_size)) < _MIN_UNPADDED_SIZE:
            raise UserError(f"image_size must be at least {_MIN_UNPADDED_SIZE} for Conv3, but is {image_size}")
        layers: list[nn.Module] = []
        for channels in (in_channels, 128, 128):
            layers += [nn.Conv2d(channels, 128, 3), nn.MaxPool2d(2), nn.ReLU()]
        self.convolutions = nn.Sequential(*layers)
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.num_features = 128
        self.head = nn.Linear(128, num_classes)

    def features(self, x: Tensor) -> Tensor:
        """What the head sees: images (B, in_channels, H, W) to features (B, 128), at least 0."""
        features: Tensor = self.pool(self.convolutions(x))
        return features

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, in_channels, H, W) to logits (B, num_classes)."""
        logits: Tensor = self.head(self.features(x))
        return logits
