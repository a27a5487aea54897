"""Multilayer perceptron for the features of a table."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from fedekd.errors import require
from fedekd.models.cnn import scaled_widths


class MLP(nn.Module):
    """Multilayer perceptron: linear layers with ReLU and dropout, linear head.

    Args:
        in_features: Features of a sample, at least 1.
        num_classes: Number of classes; 1 for regression.
        hidden: Width of each hidden layer, at least one layer. With exits, each hidden layer is a stage.
        dropout: Probability with which a hidden unit is zeroed in training, in [0, 1).
        width: Factor of all hidden widths, rounded, in (0, 1].

    Attributes:
        num_features: Dimension of `features(x)`, the width of the last hidden layer times `width`.
        head: The last linear layer; `forward(x)` is `head(features(x))`.

    Raises:
        UserError: If an argument is out of range.

    Example:
        >>> import torch
        >>> MLP(in_features=13, num_classes=2)(torch.zeros(4, 13)).shape
        torch.Size([4, 2])
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        hidden: Sequence[int] = (64, 64, 32),
        dropout: float = 0.0,
        width: float = 1.0,
    ) -> None:
        super().__init__()
        for name, value in (("in_features", in_features), ("num_classes", num_classes)):
            require(value >= 1, name, "at least 1", value)
        require(len(hidden) > 0 and min(hidden) >= 1, "hidden", "at least one width, each at least 1", hidden)
        require(0 <= dropout < 1, "dropout", "a number in [0, 1)", dropout)
        hidden = scaled_widths(hidden, width)
        self.layers = nn.Sequential(
            *(
                nn.Sequential(nn.Linear(inputs, outputs), nn.ReLU(), nn.Dropout(dropout))
                for inputs, outputs in pairwise([in_features, *hidden])
            )
        )
        self.num_features = hidden[-1]
        self.head = nn.Linear(hidden[-1], num_classes)

    def features(self, x: Tensor) -> Tensor:
        """Map features of samples (B, in_features) to (B, num_features), at least 0."""
        features: Tensor = self.layers(x)
        return features

    def forward(self, x: Tensor) -> Tensor:
        """Map features of samples (B, in_features) to logits (B, num_classes)."""
        logits: Tensor = self.head(self.features(x))
        return logits
