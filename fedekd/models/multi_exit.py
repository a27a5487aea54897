"""Networks with exits: a sequence of stages, and a head after each of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, cast

from torch import Tensor, nn
from torchvision.ops import Permute

from fedekd.errors import UserError, require, require_choice

Layout = Literal["nchw", "nhwc", "tokens", "patches", "flat"]


class ClassToken(nn.Module):
    """Select the class token of a transformer: (B, N, D) to (B, D)."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the first of the N tokens."""
        return x[:, 0]


class MeanToken(nn.Module):
    """Average the tokens of a transformer: (B, N, D) to (B, D)."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the mean of the N tokens."""
        return x.mean(1)


class ExitHead(nn.Module):
    """Head of an exit before the last: pooling, layer norm, linear layer.

    Args:
        width: Channels of the stage's output (C, D or F below), at least 1.
        num_classes: Number of classes; 1 for regression.
        layout: Layout of the stage's output. `"nchw"`: maps (B, C, H, W), averaged over `grid` x `grid` cells;
            `"nhwc"`: maps (B, H, W, C), as in Swin; `"tokens"`: (B, N, D), reduced to the class token `[:, 0]`;
            `"patches"`: (B, N, D), reduced to the mean of all tokens; `"flat"`: features (B, F).
        grid: Cells of the average pooling per side, at least 1; 1 is global average pooling. In maps smaller than the
            grid, pixels are repeated. Unused for tokens and flat features.

    Attributes:
        num_features: Inputs of norm and linear layer: `width`, times `grid` squared for maps.

    Raises:
        UserError: If an argument is out of range.

    Example:
        >>> import torch
        >>> head = ExitHead(8, num_classes=5, grid=2)
        >>> head.num_features, head(torch.zeros(3, 8, 7, 7)).shape
        (32, torch.Size([3, 5]))
    """

    def __init__(self, width: int, num_classes: int, layout: Layout = "nchw", grid: int = 1) -> None:
        super().__init__()
        for name, value in (("width", width), ("num_classes", num_classes), ("grid", grid)):
            require(value >= 1, name, "at least 1", value)
        pools: dict[str, list[nn.Module]] = {
            "nchw": [nn.AdaptiveAvgPool2d(grid), nn.Flatten()],
            "nhwc": [Permute([0, 3, 1, 2]), nn.AdaptiveAvgPool2d(grid), nn.Flatten()],
            "tokens": [ClassToken()],
            "patches": [MeanToken()],
            "flat": [],
        }
        require_choice("layout", layout, pools)
        self.num_features = width * grid**2 if layout in ("nchw", "nhwc") else width
        self.pool = nn.Sequential(*pools[layout])
        self.norm = nn.LayerNorm(self.num_features)
        self.linear = nn.Linear(self.num_features, num_classes)

    def features(self, x: Tensor) -> Tensor:
        """Map a stage's output, in the head's layout, to features (B, num_features)."""
        features: Tensor = self.norm(self.pool(x))
        return features

    def forward(self, x: Tensor) -> Tensor:
        """Map a stage's output, in the head's layout, to logits (B, num_classes)."""
        logits: Tensor = self.linear(self.features(x))
        return logits


class MultiExitNetwork(nn.Module):
    """A network with E exits: head e applied to the output of stage e.

    `multi_exit` splits a plain network into stages and heads. Both are public, so that inference can stop after any
    stage.

    Args:
        stages: E modules, E at least 1; the output of each is the input of the next, and the first takes images.
        heads: E modules, each from the output of its stage to logits (B, C). The last one is an `ExitHead`, or an
            `nn.Linear` on features (B, F).

    Attributes:
        stages: Stages, shallow to deep, an `nn.ModuleList`.
        heads: Heads, an `nn.ModuleList`.

    Raises:
        UserError: If the numbers of stages and heads differ or are 0, or the last head is neither an `nn.Linear` nor an
            `ExitHead`.

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
                f"stages, heads: expected one head per stage and at least one stage, got {len(self.stages)} stages and"
                f" {len(self.heads)} heads"
            )
        if not isinstance(self.heads[-1], nn.Linear | ExitHead):
            kind = type(self.heads[-1]).__name__
            raise UserError(f"heads: expected nn.Linear or ExitHead as the last one, got {kind}")

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
        """F, the dimension of `features(x)`."""
        return self.head.in_features

    def features(self, x: Tensor) -> Tensor:
        """Map images (B, C, H, W) to the inputs of the last layer (B, num_features)."""
        for stage in self.stages:
            x = stage(x)
        return self._embed(x)

    def _embed(self, x: Tensor) -> Tensor:
        last = self.heads[-1]
        return last.features(x) if isinstance(last, ExitHead) else x

    def exits_and_features(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return `forward(x)` and `features(x)` of one pass."""
        exits = []
        for stage, head in zip(self.stages, self.heads, strict=True):
            x = stage(x)
            exits.append(head(x))
        return exits, self._embed(x)

    def shallow(self, depth: int) -> MultiExitNetwork:
        """Return the network of the first stages and their exits, with the same modules.

        Args:
            depth: Number of stages, in 1..E.

        Raises:
            UserError: If `depth` is out of range.
        """
        require(1 <= depth <= self.num_exits, "depth", f"1 to {self.num_exits}", depth)
        return MultiExitNetwork(self.stages[:depth], self.heads[:depth]).train(self.training)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Map images (B, C, H, W) to the logits (B, num_classes) of each exit."""
        return self.exits_and_features(x)[0]
