"""Networks of the project: plain PyTorch, without fedekd."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Large(nn.Module):
    """Convolutional network for images (B, 1, 8, 8) with logits (B, 10).

    Args:
        width: Channels of the first layer, at least 1.
    """

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(width, 2 * width, 3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(2 * width * 16, 10),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        logits: Tensor = self.layers(x)
        return logits


class Small(nn.Module):
    """Network with one hidden layer for images (B, 1, 8, 8) with logits (B, 10).

    Args:
        hidden: Units of the hidden layer, at least 1.
    """

    def __init__(self, hidden: int = 32) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, 10))

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        logits: Tensor = self.layers(x)
        return logits


def trained(network: nn.Module, checkpoint: str) -> nn.Module:
    """Load the weights of a network from a checkpoint of Lightning.

    Args:
        network: Network of the same architecture; it is changed.
        checkpoint: Path of a checkpoint of a module that has it as `network`.

    Returns:
        The network.
    """
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"]
    prefix = "network."
    network.load_state_dict({name.removeprefix(prefix): state[name] for name in state if name.startswith(prefix)})
    return network
