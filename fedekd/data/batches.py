"""Batches sliced from tensors that already lie where they are needed: no workers, no copies, no collation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor


def scale(images: Tensor) -> Tensor:
    """Pixels 0..255 (uint8, any shape) as float32 in [-1, 1].

    Example:
        >>> scale(torch.tensor([0, 255], dtype=torch.uint8))
        tensor([-1.,  1.])
    """
    return images.float().div_(127.5).sub_(1.0)


class TensorBatches:
    """An iterable of `(x, y)` batches, or `(x, y, *extras)`, over some samples of tensors held in memory.

    It stands in for a DataLoader: a Lightning Trainer takes it as it is.

    Args:
        images: All images, uint8, shape (N, C, H, W). Scaled to [-1, 1] batch by batch.
        targets: All targets, shape (N,).
        indices: Which samples to visit, int64, shape (n,).
        batch_size: Samples a batch; the last batch holds the rest.
        generator: A CPU generator, from which each pass draws the next permutation; or a function that gives the
            generator of pass 0, 1, ...; None visits the samples as `indices` lists them.
        extras: Further tensors of n rows each, aligned with `indices` (a frozen teacher's outputs, say); each
            comes as one more item of the batch.
        min_batch: A last batch of fewer samples is left out, unless it is the only one (BatchNorm cannot
            train on a single sample: give 2).
        channels_last: Lay out the images channels last.
    """

    def __init__(
        self,
        images: Tensor,
        targets: Tensor,
        indices: Tensor,
        batch_size: int,
        *,
        generator: torch.Generator | Callable[[int], torch.Generator] | None = None,
        extras: tuple[Tensor, ...] = (),
        min_batch: int = 1,
        channels_last: bool = False,
    ) -> None:
        self.images, self.targets = images, targets
        self.indices = indices.to(images.device)
        self.batch_size, self.generator, self.extras = batch_size, generator, extras
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        rest = len(indices) % batch_size
        too_small = 0 < rest < min_batch and len(indices) > batch_size
        self.num_visited = len(indices) - rest if too_small else len(indices)
        self._passes = 0

    def __len__(self) -> int:
        return -(-self.num_visited // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        n = len(self.indices)
        device = self.indices.device
        if self.generator is None:
            order = torch.arange(n, device=device)
        else:
            generator = self.generator(self._passes) if callable(self.generator) else self.generator
            order = torch.randperm(n, generator=generator).to(device)
        self._passes += 1
        order = order[: self.num_visited]
        for start in range(0, self.num_visited, self.batch_size):
            positions = order[start : start + self.batch_size]
            chosen = self.indices[positions]
            x = scale(self.images[chosen]).contiguous(memory_format=self.memory_format)
            yield (x, self.targets[chosen], *(extra[positions] for extra in self.extras))
