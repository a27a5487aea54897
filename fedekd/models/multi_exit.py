"""Networks with several exits: a chain of stages, and a head behind each of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, cast

from torch import Tensor, nn
from torchvision.ops import Permute

from fedekd.errors import UserError, nearest

Layout = Literal["nchw", "nhwc", "tokens", "flat"]


class ClassToken(nn.Module):
    """The class token of a transformer: (B, N, D) to (B, D)."""

    def forward(self, x: Tensor) -> Tensor:
        """The first of the N tokens."""
        return x[:, 0]


class ExitHead(nn.Module):
    """A light head for an exit in mid-network: pool, layer norm, linear.

    Args:
        width: Channels of the stage before it: C, D or F below.
        num_classes: Outputs: the number of classes, or 1 for regression.
        layout: What the stage gives. `"nchw"`: maps (B, C, H, W), averaged over `grid` x `grid` cells; `"nhwc"`: the
            same of maps (B, H, W, C), as Swin has them; `"tokens"`: (B, N, D), of which the class token `[:, 0]` is
            taken; `"flat"`: features (B, F) as they are.
        grid: Cells of the average pooling along each side, at least 1; 1 is global average pooling. Maps smaller than
            the grid are allowed: their pixels are repeated. Tokens and flat features have no use for it.

    Attributes:
        num_features: Width of what the norm and the linear layer see: `width`, times `grid` squared for maps.

    Raises:
        UserError: An argument is out of its range.

    Example:
        >>> import torch
        >>> head = ExitHead(8, num_classes=5, grid=2)
        >>> head.num_features, head(torch.zeros(3, 8, 7, 7)).shape
        (32, torch.Size([3, 5]))
    """

    def __init__(self, width: int, num_classes: int, layout: Layout = "nchw", grid: int = 1) -> None:
        super().__init__()
        for name, value in (("width", width), ("num_classes", num_classes), ("grid", grid)):
            if value < 1:
                raise UserError(f"{name} must be at least 1, but is {value}")
        pools: dict[str, list[nn.Module]] = {
            "nchw": [nn.AdaptiveAvgPool2d(grid), nn.Flatten()],
            "nhwc": [Permute([0, 3, 1, 2]), nn.AdaptiveAvgPool2d(grid), nn.Flatten()],
            "tokens": [ClassToken()],
            "flat": [],
        }
        if layout not in pools:
            raise UserError(f"layout is {layout!r}, which is not known; {nearest(str(layout), pools)}")
        self.num_features = width * grid**2 if layout in ("nchw", "nhwc") else width
        self.pool = nn.Sequential(*pools[layout])
        self.norm = nn.LayerNorm(self.num_features)
        self.linear = nn.Linear(self.num_features, num_classes)

    def features(self, x: Tensor) -> Tensor:
        """What the linear layer sees: a stage's output, in the head's layout, to (B, num_features)."""
        features: Tensor = self.norm(self.pool(x))
        return features

    def forward(self, x: Tensor) -> Tensor:
        """A stage's output, in the head's layout, to logits (B, num_classes)."""
        logits: Tensor = self.linear(self.features(x))
        return logits


class MultiExitNetwork(nn.Module):
    """E stages in a row and E heads: exit e is head e on the output of stage e.

    Stages and heads are public, so that inference may stop after any of them; `multi_exit` makes them of a plain
    network.

    Args:
        stages: E modules, E at least 1, the output of each the input of the next. The first takes images.
        heads: E modules, each from the output of its stage to logits (B, C); the last one is an `nn.Linear`, and the
            last stage gives its features (B, F), or it is an `ExitHead`.

    Attributes:
        stages: The stages, an `nn.ModuleList`, shallow to deep.
        heads: Their heads, an `nn.ModuleList`.

    Raises:
        UserError: There is no stage, there are more or fewer heads than stages, or the last head is neither an
            `nn.Linear` nor an `ExitHead`.

    Example:
        >>> import torch
        >>> stages = [nn.Conv2d(1, 4, 3), nn.Flatten()]
        >>> network = MultiExitNetwork(stages, [ExitHead(4, num_classes=5), nn.Linear(4 * 36, 5)])
        >>> [tuple(logits.shape) for logits in network(torch.zeros(2, 1, 8, 8))]
        [(2, 5), (2, 5)]
    """

    def __init__(self, stages: Iterable[nn.Module], heads: Iterable[nn.Module]) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.heads = nn.ModuleList(heads)
        if not len(self.stages) == len(self.heads) >= 1:
            raise UserError(
                f"{len(self.stages)} stages and {len(self.heads)} heads were given; one head a stage is needed, and at"
                " least one stage"
            )
        if not isinstance(self.heads[-1], nn.Linear | ExitHead):
            kind = type(self.heads[-1]).__name__
            raise UserError(f"the last of heads must be an nn.Linear or an ExitHead, but is a {kind}")

    @property
    def num_exits(self) -> int:
        """E, the number of exits."""
        return len(self.stages)

    @property
    def head(self) -> nn.Linear:
        """The last linear layer; `forward(x)[-1]` is `head(features(x))`."""
        last = self.heads[-1]
        return last.linear if isinstance(last, ExitHead) else cast(nn.Linear, last)

    @property
    def num_features(self) -> int:
        """F, the width of `features(x)`."""
        return self.head.in_features

    def features(self, x: Tensor) -> Tensor:
        """What the last linear layer sees: images (B, C, H, W) to features (B, num_features)."""
        for stage in self.stages:
            x = stage(x)
        return self._embed(x)

    def _embed(self, x: Tensor) -> Tensor:
        last = self.heads[-1]
        return last.features(x) if isinstance(last, ExitHead) else x

    def exits_and_features(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """`forward(x)` and `features(x)` in one pass."""
        exits = []
        for stage, head in zip(self.stages, self.heads, strict=True):
            x = stage(x)
            exits.append(head(x))
        return exits, self._embed(x)

    def shallow(self, depth: int) -> MultiExitNetwork:
        """The network of the first stages and their exits alone, of the same modules under the same names.

        Args:
            depth: How many stages, 1..E.

        Raises:
            UserError: There are not so many.
        """
        if not 1 <= depth <= self.num_exits:
            raise UserError(f"depth must be from 1 to {self.num_exits}, but is {depth}")
        return MultiExitNetwork(self.stages[:depth], self.heads[:depth]).train(self.training)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Images (B, C, H, W) to the logits (B, num_classes) of each exit, shallow to deep."""
        return self.exits_and_features(x)[0]
