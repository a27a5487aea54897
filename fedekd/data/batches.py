"""Batches sliced from tensors in memory: no workers, no copies, no collation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor


def scale(inputs: Tensor) -> Tensor:
    """Return inputs of a network as floating-point numbers.

    Args:
        inputs: Pixels 0..255, uint8, any shape, which become float32 in [-1, 1]; float inputs are returned unchanged.

    Example:
        >>> scale(torch.tensor([0, 255], dtype=torch.uint8))
        tensor([-1.,  1.])
    """
    return inputs if inputs.is_floating_point() else inputs.float().div_(127.5).sub_(1.0)


def in_memory_format(inputs: Tensor, memory_format: torch.memory_format) -> Tensor:
    """Return images (B, C, H, W) in a memory format; features (B, F) unchanged."""
    return inputs.contiguous(memory_format=memory_format) if inputs.ndim == 4 else inputs


class TensorBatches:
    """Iterable of batches `(x, y, *extras)` that a Trainer takes as a DataLoader.

    Args:
        inputs: Images, shape (N, C, H, W), or features, float32, shape (N, F). `scale` is applied per batch.
        targets: All targets, shape (N,).
        indices: Samples to iterate over, int64, shape (n,).
        batch_size: Samples per batch, at least 1; the last batch has the remaining samples.
        generator: CPU generator from which each pass draws its permutation, or a function from the number of the
            pass (0, 1, ...) to a generator. None (default) keeps the order of `indices`.
        extras: Tensors of n rows, aligned with `indices`, such as outputs of a frozen teacher; each is one more item
            of a batch.
        min_batch: A last batch of fewer samples is dropped unless it is the only one. BatchNorm needs 2. Default 1.
        channels_last: Use the channels-last memory format. Default False.

    Example:
        >>> images, targets = torch.zeros(5, 1, 8, 8, dtype=torch.uint8), torch.arange(5)
        >>> [y.tolist() for x, y in TensorBatches(images, targets, torch.tensor([4, 2, 0]), batch_size=2)]
        [[4, 2], [0]]
    """

    def __init__(
        self,
        inputs: Tensor,
        targets: Tensor,
        indices: Tensor,
        batch_size: int,
        *,
        generator: torch.Generator | Callable[[int], torch.Generator] | None = None,
        extras: tuple[Tensor, ...] = (),
        min_batch: int = 1,
        channels_last: bool = False,
    ) -> None:
        self.inputs, self.targets = inputs, targets
        self.indices = indices.to(inputs.device)
        self.batch_size, self.generator, self.extras = batch_size, generator, extras
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        remainder = len(indices) % batch_size
        is_dropped = 0 < remainder < min_batch and len(indices) > batch_size
        self.num_visited = len(indices) - remainder if is_dropped else len(indices)
        self._passes = 0

    def __len__(self) -> int:
        return -(-self.num_visited // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        positions = self.draw_positions()
        for start in range(0, self.num_visited, self.batch_size):
            yield self.take(positions[start : start + self.batch_size])

    def draw_positions(self) -> Tensor:
        """Begin a pass and return its positions within `indices`, shape (num_visited,)."""
        n, device = len(self.indices), self.indices.device
        if self.generator is None:
            order = torch.arange(n, device=device)
        else:
            generator = self.generator(self._passes) if callable(self.generator) else self.generator
            order = torch.randperm(n, generator=generator).to(device)
        self._passes += 1
        return order[: self.num_visited]

    def take(self, positions: Tensor) -> tuple[Any, ...]:
        """Return the batch of the samples at `positions` within `indices`."""
        samples = self.indices[positions]
        x = in_memory_format(scale(self.inputs[samples]), self.memory_format)
        return (x, self.targets[samples], *(extra[positions] for extra in self.extras))
