"""Wrapper of torchvision classifiers for grey images, with access to features."""

from __future__ import annotations

from torch import Tensor, nn

from fedekd.errors import UserError


class ImageClassifier(nn.Module):
    """A classifier for three-channel images, split into `features` and `head`.

    The logits are unchanged. Images of one channel are repeated to three. The last linear layer of the backbone becomes
    `head` and is replaced by an identity in `backbone`, so the given network is modified.

    Args:
        backbone: A network whose last layer is an `nn.Linear` with `num_classes` outputs, such as torchvision's ResNet,
            MobileNet, EfficientNet, ConvNeXt, DenseNet, Swin or ViT.
        num_classes: Number of classes; 1 for regression.
        in_channels: Channels of an image: 1 or 3; with `repeat=False` any number.
        repeat: Repeat images of one channel to three; False for a backbone of `in_channels` channels.

    Attributes:
        num_features: Dimension of `features(x)`.
        head: The last linear layer; `forward(x)` is `head(features(x))`.
        repeats_channels: `repeat`.

    Raises:
        UserError: If images are repeated and `in_channels` is neither 1 nor 3, or the last layer is not linear with
            `num_classes` outputs (SqueezeNet ends in a convolution).

    Example:
        >>> import torch
        >>> plain = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 10))
        >>> network = ImageClassifier(plain, num_classes=10, in_channels=1)
        >>> network.features(torch.zeros(4, 1, 8, 8)).shape, network(torch.zeros(4, 1, 8, 8)).shape
        (torch.Size([4, 12]), torch.Size([4, 10]))
    """

    def __init__(self, backbone: nn.Module, num_classes: int, in_channels: int, repeat: bool = True) -> None:
        super().__init__()
        if repeat and in_channels not in (1, 3):
            raise UserError(f"in_channels: expected 1 or 3 for {type(backbone).__name__}, got {in_channels}")
        self.head = _take_head(backbone, num_classes)
        self.num_features = self.head.in_features
        self.backbone = backbone
        self.repeats_channels = repeat  # not named as the argument, which would change fingerprints of networks

    def features(self, x: Tensor) -> Tensor:
        """Map images (B, in_channels, H, W) to features (B, num_features)."""
        features: Tensor = self.backbone(x.expand(-1, 3, -1, -1) if self.repeats_channels else x)
        return features

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, in_channels, H, W) to logits (B, num_classes)."""
        logits: Tensor = self.head(self.features(x))
        return logits


def replace_head(backbone: nn.Module, num_classes: int) -> None:
    """Replace the last linear layer by a new one of another number of outputs.

    A layer of `num_classes` outputs is kept, and a network without linear layers is not changed. Initial weights come
    from torch's global generator.

    Args:
        backbone: The network; it is changed.
        num_classes: Number of classes; 1 for regression.
    """
    name, head = last_linear(backbone)
    if head is not None and head.out_features != num_classes:
        new = nn.Linear(head.in_features, num_classes, bias=head.bias is not None)
        _replace(backbone, name, new.to(head.weight))


def _take_head(backbone: nn.Module, num_classes: int) -> nn.Linear:
    name, head = last_linear(backbone)
    if head is None or head.out_features != num_classes:
        actual = "none" if head is None else f"one with {head.out_features} outputs"
        raise UserError(
            f"{type(backbone).__name__}: expected a last linear layer with {num_classes} outputs, got {actual}"
        )
    _replace(backbone, name, nn.Identity())
    return head


def last_linear(backbone: nn.Module) -> tuple[str, nn.Linear | None]:
    """Return the name of the last linear layer of a network, and the layer.

    The order is that of `named_modules`. Without one, and for a network that is itself a linear layer, the result is an
    empty name and None.
    """
    linear = {name: part for name, part in backbone.named_modules() if name and isinstance(part, nn.Linear)}
    return next(reversed(linear.items()), ("", None))


def _replace(backbone: nn.Module, name: str, part: nn.Module) -> None:
    parent, _, attribute = name.rpartition(".")
    setattr(backbone.get_submodule(parent), attribute, part)
