"""Batches of samples: sliced from tensors in memory, or read by workers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fedekd.data.stored import Inputs, StoredInputs
from fedekd.data.transforms import Transform, augment
from fedekd.seeding import derive_seed


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
        inputs: Images, shape (N, C, H, W), or features, float32, shape (N, F). Pixels are scaled per batch, see
            `scale`. Stored inputs are read by their workers.
        targets: All targets, shape (N,).
        indices: Samples to iterate over, int64, shape (n,).
        batch_size: Samples per batch, at least 1; the last batch has the remaining samples.
        generator: CPU generator from which each pass draws its permutation, or a function from the number of the
            pass (0, 1, ...) to a generator. None (default) keeps the order of `indices`.
        extras: Tensors of n rows, aligned with `indices`, such as outputs of a frozen teacher; each is one more item
            of a batch.
        min_batch: A last batch of fewer samples is dropped unless it is the only one. BatchNorm needs 2. Default 1.
        channels_last: Use the channels-last memory format. Default False.
        transform: Augmentation of each sample before the pixels are scaled; needs a generator, of whose seed and the
            number of the batch it depends. Default None.

    Attributes:
        is_plain: Whether a batch is a function of tensors only, which a CUDA graph can hold.

    Example:
        >>> images, targets = torch.zeros(5, 1, 8, 8, dtype=torch.uint8), torch.arange(5)
        >>> [y.tolist() for x, y in TensorBatches(images, targets, torch.tensor([4, 2, 0]), batch_size=2)]
        [[4, 2], [0]]
    """

    def __init__(
        self,
        inputs: Inputs,
        targets: Tensor,
        indices: Tensor,
        batch_size: int,
        *,
        generator: torch.Generator | Callable[[int], torch.Generator] | None = None,
        extras: tuple[Tensor, ...] = (),
        min_batch: int = 1,
        channels_last: bool = False,
        transform: Transform | None = None,
    ) -> None:
        self.inputs, self.targets = inputs, targets
        self.indices = indices.to(inputs.device)
        self.batch_size, self.generator, self.extras = batch_size, generator, extras
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        remainder = len(indices) % batch_size
        is_dropped = 0 < remainder < min_batch and len(indices) > batch_size
        self.num_visited = len(indices) - remainder if is_dropped else len(indices)
        self.transform = transform
        self.is_plain = transform is None and not isinstance(inputs, StoredInputs)
        self._passes, self._seed = 0, 0

    def __len__(self) -> int:
        return -(-self.num_visited // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        parts = torch.split(self.draw_positions(), self.batch_size) if self.num_visited else ()
        if self.is_plain:
            yield from map(self.take, parts)
            return
        seeds = [derive_seed(self._seed, "transform", number) for number in range(len(parts))]
        for part, inputs in zip(parts, self._read(parts, seeds), strict=True):
            yield self._batch(inputs, part)

    def draw_positions(self) -> Tensor:
        """Begin a pass and return its positions within `indices`, shape (num_visited,)."""
        n, device = len(self.indices), self.indices.device
        if self.generator is None:
            order = torch.arange(n, device=device)
        elif callable(self.generator):
            generator = self.generator(self._passes)
            self._seed = generator.initial_seed()
            order = torch.randperm(n, generator=generator).to(device)
        else:  # one generator for all passes
            self._seed = derive_seed(self.generator.initial_seed(), self._passes)
            order = torch.randperm(n, generator=self.generator).to(device)
        self._passes += 1
        return order[: self.num_visited]

    def take(self, positions: Tensor) -> tuple[Any, ...]:
        """Return the batch at `positions` within `indices`, without augmentation."""
        return self._batch(self.inputs[self.indices[positions]], positions)

    def _read(self, parts: Sequence[Tensor], seeds: Sequence[int]) -> Iterator[Tensor]:
        """Yield the inputs of the batches, augmented but not scaled."""
        indices = [self.indices[part] for part in parts]
        if isinstance(self.inputs, StoredInputs):
            yield from self.inputs.batches(indices, seeds, self.transform)
            return
        assert self.transform is not None
        for part, seed in zip(indices, seeds, strict=True):
            yield augment(self.inputs[part], self.transform, seed)

    def _batch(self, inputs: Tensor, positions: Tensor) -> tuple[Any, ...]:
        x = in_memory_format(scale(inputs), self.memory_format)
        return (x, self.targets[self.indices[positions]], *(extra[positions] for extra in self.extras))
