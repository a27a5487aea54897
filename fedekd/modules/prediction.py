"""What a network says of a batch, and how it is asked.

A network answers with a tensor, or with a list of tensors, one per exit. Everything above this file sees a
`ModelOutput` and needs no second case for networks with exits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedekd.errors import UserError
from fedekd.models import MultiExitNetwork
from fedekd.models.modes import eval_mode


@dataclass(frozen=True)
class ModelOutput:
    """The outputs of a network for B samples.

    Attributes:
        exits: One tensor per exit, shallow to deep, each (B, C) logits or (B, 1) values; a plain network has one.
        features: (B, F), the input of the last layer, if it was asked for.
    """

    exits: tuple[Tensor, ...]
    features: Tensor | None = None

    @property
    def output(self) -> Tensor:
        """The last exit's output, (B, C)."""
        return self.exits[-1]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The last exit's output and, if there are any, the features: what a batch carries of a teacher."""
        return (self.output,) if self.features is None else (self.output, self.features)

    @classmethod
    def from_tensors(cls, tensors: tuple[Tensor, ...]) -> ModelOutput:
        """The inverse of `tensors`."""
        return cls((tensors[0],), *tensors[1:2])

    def detach(self) -> ModelOutput:
        """The same numbers, cut from the graph."""
        features = None if self.features is None else self.features.detach()
        return ModelOutput(tuple(exit_.detach() for exit_ in self.exits), features)


def predict(network: nn.Module, x: Tensor, with_features: bool = False) -> ModelOutput:
    """Run a network on images `x` (B, C, H, W).

    Args:
        network: Gives a tensor, or a list of tensors, one per exit.
        x: The images.
        with_features: Also keep the features; the network must then offer `features(x)` and `head`.

    Raises:
        UserError: If features are asked of a network that has none to show.
    """
    if with_features:
        network_: Any = network
        if isinstance(network, MultiExitNetwork):
            exits, features = network.exits_and_features(x)
            return ModelOutput(tuple(exits), features)
        if not (callable(getattr(network, "features", None)) and callable(getattr(network, "head", None))):
            raise UserError(
                f"energy 'feature' needs networks with features(x) and head, and {type(network).__name__} has not both;"
                " wrap it in fedekd.models.ImageClassifier or choose another energy"
            )
        features = network_.features(x)
        return ModelOutput((network_.head(features),), features)
    output = network(x)
    return ModelOutput((output,) if isinstance(output, Tensor) else tuple(output))


@torch.no_grad()
def teacher_forward(network: nn.Module, x: Tensor, with_features: bool = False) -> ModelOutput:
    """Run a frozen teacher: in evaluation mode, without a graph."""
    with eval_mode(network):
        return predict(network, x, with_features)
