"""Model outputs of a batch, and the forward pass that produces them.

A network returns a tensor, or a list of tensors, one per exit. Modules and methods use `ModelOutput`, so that they need
no separate code for networks with exits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedekd.errors import UserError, listed
from fedekd.functional import upcast_to_float32
from fedekd.models import MultiExitNetwork, eval_mode

#: Largest absolute output of a teacher: squares of larger ones overflow in float32.
LARGEST_OUTPUT = 1e15


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

        A sample with NaN, infinity or a value above `LARGEST_OUTPUT` in an exit or in the features gets the student's
        output there, which has no divergence from the student and so no gradient. Its energy of 0 still enters the
        gate's normalisation.

        Args:
            student: Output for the same samples. Its exits replace those of the teacher in order, or its last exit
                replaces all if the numbers of exits differ.
        """
        finite_features, features = None, self.features
        if features is not None:
            finite_features = _is_finite(features)
            features = torch.where(_as_mask(finite_features, features), features, 0.0)
        is_paired = len(student.exits) == len(self.exits)
        own = student.exits if is_paired else (student.output,) * len(self.exits)
        exits = [_finite(*pair, finite_features) for pair in zip(self.exits, own, strict=True)]
        return ModelOutput(tuple(exits), features)


def _finite(output: Tensor, own: Tensor, finite_features: Tensor | None) -> Tensor:
    """Return an exit's output (B, ...), with `own` for samples that are not finite."""
    own = own.detach().to(output.dtype)
    if own.shape != output.shape:  # of a user's loss that compares other outputs
        own = torch.zeros_like(output)
    finite = _is_finite(output)
    return torch.where(_as_mask(finite if finite_features is None else finite & finite_features, output), output, own)


def _is_finite(values: Tensor) -> Tensor:
    """Return which samples (B, ...) have only finite values, shape (B,)."""
    is_finite = upcast_to_float32(values).abs() <= LARGEST_OUTPUT
    return is_finite.flatten(1).all(dim=1) if values.ndim > 1 else is_finite


def _as_mask(of_samples: Tensor, values: Tensor) -> Tensor:
    return of_samples.reshape(-1, *[1] * (values.ndim - 1))


def predict(network: nn.Module, x: Tensor, with_features: bool = False) -> ModelOutput:
    """Run a network on a batch of images.

    Args:
        network: Returns a tensor, or a list of tensors, one per exit.
        x: Images, shape (B, C, H, W).
        with_features: Also return the features; the network must then have `features(x)` and `head`.

    Raises:
        UserError: If `with_features` is set and the network has no `features` and `head`, or the network
            returns no tensor, or exits of different shapes.

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
    if isinstance(output, Tensor):
        return ModelOutput((output,))
    is_list = isinstance(output, list | tuple) and len(output) > 0
    if not is_list or not all(isinstance(exit_, Tensor) for exit_ in output):
        expected = "a tensor, or a list with one tensor per exit, at least one"
        raise UserError(f"network: expected {expected}, got a {type(output).__name__}")
    if any(exit_.shape != output[0].shape for exit_ in output):  # not a set: traced sizes have no hash
        shapes = listed(str(tuple(exit_.shape)) for exit_ in output)
        raise UserError(f"network: expected one output per exit, all of one shape, got the shapes {shapes}")
    return ModelOutput(tuple(output))


@torch.no_grad()
def teacher_forward(network: nn.Module, x: Tensor, with_features: bool = False) -> ModelOutput:
    """Run a frozen teacher without a graph; arguments as in `predict`."""
    with eval_mode(network):
        return predict(network, x, with_features)
