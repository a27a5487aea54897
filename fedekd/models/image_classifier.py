"""Any torchvision classifier as a client's model: grey images too, and its features within reach."""

from __future__ import annotations

from torch import Tensor, nn

from fedekd.errors import UserError


class ImageClassifier(nn.Module):
    """A classifier made for three channels, split into `features` and `head`; its logits stay what they were.

    Images of one channel are repeated to three. The classifier's last linear layer becomes `head`, and an
    identity takes its place in `backbone`: the network that was given is changed and belongs to this one
    from then on.

    Args:
        backbone: A network whose last step is an `nn.Linear` with `num_classes` outputs, such as
            torchvision's ResNet, MobileNet, EfficientNet, ConvNeXt, DenseNet, Swin or ViT.
        num_classes: Outputs: the number of classes, or 1 for regression.
        in_channels: Channels of an image: 1 or 3.

    Attributes:
        num_features: Width of `features(x)`.
        head: The last linear layer; `forward(x)` is `head(features(x))`.

    Raises:
        UserError: `in_channels` is neither 1 nor 3, or the network's last linear layer has not `num_classes`
            outputs (SqueezeNet, say, ends in a convolution).

    Example:
        >>> import torch
        >>> plain = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 10))
        >>> network = ImageClassifier(plain, num_classes=10, in_channels=1)
        >>> network.features(torch.zeros(4, 1, 8, 8)).shape, network(torch.zeros(4, 1, 8, 8)).shape
        (torch.Size([4, 12]), torch.Size([4, 10]))
    """

    def __init__(self, backbone: nn.Module, num_classes: int, in_channels: int) -> None:
        super().__init__()
        if in_channels not in (1, 3):
            raise UserError(
                f"{type(backbone).__name__} takes images of 1 or 3 channels, but in_channels is {in_channels}"
            )
        self.head = _take_head(backbone, num_classes)
        self.num_features = self.head.in_features
        self.backbone = backbone

    def features(self, x: Tensor) -> Tensor:
        """What the head sees: images (B, 1 or 3, H, W) to features (B, num_features)."""
        features: Tensor = self.backbone(x.expand(-1, 3, -1, -1))
        return features

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, 1 or 3, H, W) to logits (B, num_classes)."""
        logits: Tensor = self.head(self.features(x))
        return logits


def _take_head(backbone: nn.Module, num_classes: int) -> nn.Linear:
    linear = {name: part for name, part in backbone.named_modules() if name and isinstance(part, nn.Linear)}
    name, head = next(reversed(linear.items()), ("", None))
    if head is None or head.out_features != num_classes:
        found = "has none" if head is None else f"has {head.out_features} outputs in its last one"
        raise UserError(f"{type(backbone).__name__} must end in a linear layer of {num_classes} outputs, but {found}")
    parent, _, attribute = name.rpartition(".")
    setattr(backbone.get_submodule(parent), attribute, nn.Identity())
    return head
