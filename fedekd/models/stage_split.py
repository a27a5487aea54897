"""Stages of a network before they are merged into those of its exits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import nn

from fedekd.models.multi_exit import Layout

Stages = list[list[nn.Module]]


def merge_deepest(stages: int, exits: int) -> list[int]:
    """Return the boundaries of single stages, the last one with all the rest.

    Example:
        >>> merge_deepest(4, 2)
        [0, 1, 4]
    """
    return [*range(exits), stages]


def equal_groups(stages: int, exits: int) -> list[int]:
    """Return the boundaries of groups whose sizes differ by at most one.

    Example:
        >>> equal_groups(12, 3)
        [0, 4, 8, 12]
    """
    return [stages * group // exits for group in range(exits + 1)]


class StageSplit(NamedTuple):
    """Stages of a network, and how they are merged into fewer.

    Attributes:
        stages: The largest number of stages, each a list of modules that are called in sequence. The last module of the
            last stage is the network's last linear layer, unless `head` is given.
        group: From the numbers of stages and of exits to the boundaries of the merged groups.
        default: Default number of exits; None is all stages.
        layout: Layout of the outputs of all stages but the last; None infers it from the number of dimensions.
        image_size: Size of images that the stages accept.
        head: The network's last linear layer, if it is outside the stages or is not their last module.
    """

    stages: Stages
    group: Callable[[int, int], list[int]] = merge_deepest
    default: int | None = None
    layout: Layout | None = None
    image_size: int | Sequence[int] = 64
    head: nn.Linear | None = None


def take_out(head: nn.Module, stage: nn.Module) -> None:
    """Replace a submodule of a stage by an identity."""
    for path, part in [*stage.named_modules()]:
        if part is head:
            parent, _, attribute = path.rpartition(".")
            setattr(stage.get_submodule(parent), attribute, nn.Identity())
