"""Model outputs of a batch, and the forward pass that produces them.

A network returns a tensor, or a list of tensors, one per exit. Modules and methods use `ModelOutput`, so that they need
no separate code for networks with exits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedekd.errors import UserError
from fedekd.models import MultiExitNetwork, eval_mode


@dataclass(frozen=True)
class ModelOutput:
    """Outputs of a network for B samples.

    Attributes:
        exits: One tensor per exit, shallow to deep, logits (B, C) or values (B, 1); a plain network has one.
        features: Input of the last layer, shape (B, F), or None.
    """

    exits: tuple[Tensor, ...]
    features: Tensor | None = None

    @property
    def output(self) -> Tensor:
        """Output of the last exit, shape (B, C)."""
        return self.exits[-1]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Output of the last exit and, if present, features."""
        return (self.output,) if self.features is None else (self.output, self.features)

    @classmethod
    def from_tensors(cls, tensors: tuple[Tensor, ...]) -> ModelOutput:
        """Create the output from `tensors`."""
        return cls((tensors[0],), *tensors[1:2])

    def detach(self) -> ModelOutput:
        """Return the output without its graph."""
        features = None if self.features is None else self.features.detach()
        return ModelOutput(tuple(exit_.detach() for exit_ in self.exits), features)

    def finite_teacher_of(self, student: ModelOutput) -> ModelOutput:
        """Return the output as a teacher whose values are finite where the student's are.

        A sample with NaN or infinity in an exit or in the features gets the student's output there, which has no
        divergence from the student and so no gradient. Its energy of 0 still enters the gate's normalisation.

        Args:
            student: Output for the same samples. Its exits replace those of the teacher in order, or its last exit
                replaces all if the numbers of exits differ.
        """
        finite_features, features = None, self.features
        if features is not None:
            finite_features = features.isfinite().flatten(1).all(dim=1, keepdim=True)
            features = torch.where(finite_features, features, 0.0)
        is_paired = len(student.exits) == len(self.exits)
        own = student.exits if is_paired else (student.output,) * len(self.exits)
        exits = [_finite(*pair, finite_features) for pair in zip(self.exits, own, strict=True)]
        return ModelOutput(tuple(exits), features)


def _finite(output: Tensor, own: Tensor, finite_features: Tensor | None) -> Tensor:
    """Return an exit's output (B, C), with `own` for samples that are not finite."""
    own = own.detach().to(output.dtype)
    if own.shape != output.shape:  # of a user's loss that compares other outputs
        own = torch.zeros_like(output)
    finite = output.isfinite().flatten(1).all(dim=1, keepdim=True)
    return torch.where(finite if finite_features is None else finite & finite_features, output, own)


def predict(network: nn.Module, x: Tensor, with_features: bool = False) -> ModelOutput:
    """Run a network on a batch of images.

    Args:
        network: Returns a tensor, or a list of tensors, one per exit.
        x: Images, shape (B, C, H, W).
        with_features: Also return the features; the network must then have `features(x)` and `head`.

    Raises:
        UserError: If `with_features` is set and the network has no `features` and `head`.

    Example:
        >>> output = predict(nn.Flatten(), torch.zeros(2, 1, 2, 2))
        >>> len(output.exits), output.output.shape
        (1, torch.Size([2, 4]))
    """
    if with_features:
        network_: Any = network
        if isinstance(network, MultiExitNetwork):
            exits, features = network.exits_and_features(x)
            return ModelOutput(tuple(exits), features)
        if not (callable(getattr(network, "features", None)) and callable(getattr(network, "head", None))):
            raise UserError(
                f"energy 'feature': expected a network with features(x) and head, got {type(network).__name__}. Wrap"
                " it in fedekd.models.ImageClassifier or choose another energy"
            )
        features = network_.features(x)
        return ModelOutput((network_.head(features),), features)
    output = network(x)
    return ModelOutput((output,) if isinstance(output, Tensor) else tuple(output))


@torch.no_grad()
def teacher_forward(network: nn.Module, x: Tensor, with_features: bool = False) -> ModelOutput:
    """Run a frozen teacher without a graph; arguments as in `predict`."""
    with eval_mode(network):
        return predict(network, x, with_features)
