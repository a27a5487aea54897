"""Inputs that are not resident: they are read when a batch needs them."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import replace
from hashlib import sha256
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedekd.data.readers import Job, Reader, StoredPart, Workers
from fedekd.data.transforms import Transform
from fedekd.errors import UserError
from fedekd.global_state import exclusive

#: Samples of a split that are read for its digest, at regular steps.
DIGEST_SAMPLES = 64


class StoredInputs:
    """Inputs of N samples that are read when they are needed.

    It takes the place of the tensor `Samples.inputs`: an index tensor reads a batch.

    Args:
        parts: Sources, in order.
        num_workers: Processes that read the batches of a pass; 0 reads in this process. A worker of `MultiProcess`
            reads in its own process in any case: clients already run in parallel.

    Attributes:
        shape: (N, C, H, W).
        dtype: uint8 or float32.
        device: Device to which batches are moved.

    Raises:
        UserError: If there is no sample, or the first ones of the sources cannot be read or differ in shape or type.

    Example:
        >>> inputs = StoredInputs([StoredPart(np.zeros((5, 8, 8, 3), np.uint8))])
        >>> inputs.shape, inputs[torch.tensor([4, 2])].shape
        (torch.Size([5, 3, 8, 8]), torch.Size([2, 3, 8, 8]))
    """

    def __init__(self, parts: Sequence[StoredPart], num_workers: int = 0) -> None:
        if empty := [part.title for part in parts if not len(part)]:
            raise UserError(f"{empty[0]}: expected at least one sample, got none")
        first = parts[0].read(0)
        self._reader = Reader(parts, tuple(first.shape), first.dtype)
        for start in self._reader.first[:-1]:
            self._reader.read(int(start))
        self._index: npt.NDArray[np.int64] | None = None
        self._workers: list[Workers] = []  # shared with copies
        self.num_workers, self.device = num_workers, torch.device("cpu")

    def _whole_parts(self) -> Sequence[StoredPart]:
        if self._index is None:
            return self._reader.parts
        return [StoredPart(_Rows(self._reader, self._index), self._reader.parts[0].title)]

    @property
    def shape(self) -> torch.Size:
        """Number of samples, and shape of one."""
        return torch.Size([len(self), *self._reader.shape])

    @property
    def ndim(self) -> int:
        """Number of dimensions, that of the samples included."""
        return len(self.shape)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the batches."""
        return self._reader.dtype

    def __len__(self) -> int:
        return int(self._reader.first[-1]) if self._index is None else len(self._index)

    def __getitem__(self, indices: Tensor) -> Tensor:
        """Read the samples at `indices`, int64, shape (n,)."""
        return self._reader[self._job(indices)].to(self.device)

    def take(self, indices: Any) -> StoredInputs:
        """Return the samples at an index or mask; nothing is read."""
        chosen = self._copy()
        everything = np.arange(len(self)) if self._index is None else self._index
        chosen._index = everything[indices.cpu().numpy() if isinstance(indices, Tensor) else indices]
        return chosen

    def to(self, device: torch.device) -> StoredInputs:
        """Return the same samples, whose batches are moved to a device."""
        moved = self._copy()
        moved.device = torch.device(device)
        return moved

    def _copy(self) -> StoredInputs:
        made = copy(self)
        made._workers = self._workers  # `copy` leaves them out, as pickle does
        return made

    def batches(
        self, parts: Sequence[Tensor], seeds: Sequence[int] | None = None, transform: Transform | None = None
    ) -> Iterator[Tensor]:
        """Yield the batches at index tensors, in order.

        The values depend neither on the number of workers nor on the global generators.

        Args:
            parts: Index tensors, int64.
            seeds: Seed of each batch; default 0.
            transform: Augmentation of each sample; see `augment`.

        Raises:
            UserError: If a sample cannot be read.
        """
        seeds = seeds or [0] * len(parts)
        jobs = [self._job(part, seed, transform) for part, seed in zip(parts, seeds, strict=True)]
        workers = self._free_workers() if len(jobs) > 1 else None
        read = map(self._reader.__getitem__, jobs) if workers is None else workers.read(jobs)
        for batch in read:
            yield batch.to(self.device)

    def _job(self, indices: Tensor, seed: int = 0, transform: Transform | None = None) -> Job:
        numbers = indices.cpu().numpy()
        return Job((numbers if self._index is None else self._index[numbers]).tolist(), seed, transform)

    def _free_workers(self) -> Workers | None:
        # Daemonic processes, as those of MultiProcess, cannot have children.
        if self.num_workers < 1 or multiprocessing.current_process().daemon:
            return None
        if self._workers and self._workers[0].count != self.num_workers:
            self.close()
        if not self._workers:
            with exclusive():
                self._workers.append(Workers(self._reader, self.num_workers))
        return None if self._workers[0].is_busy else self._workers[0]

    def close(self) -> None:
        """End the processes that read; the next pass starts them again."""
        while self._workers:
            self._workers.pop().close()

    def digest(self, indices: Tensor) -> bytes:
        """Return a digest of samples, int64, shape (n,), without reading all of them.

        It covers the sources, the positions of the samples in them, and the content of up to `DIGEST_SAMPLES` samples
        at regular steps.
        """
        places = [self._reader.place(sample) for sample in self._job(indices).samples]
        digest = sha256()
        for part in dict.fromkeys(part for part, _ in places):
            digest.update(sha256(self._reader.parts[part].digest()).digest())
        digest.update(np.asarray([index for _, index in places], dtype=np.int64).tobytes())
        steps = torch.linspace(0, len(indices) - 1, min(DIGEST_SAMPLES, len(indices)), dtype=torch.float64)
        for batch in self.batches(torch.split(indices[steps.long()], 16)):
            digest.update(batch.cpu().numpy().tobytes())
        return digest.digest()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_workers": []}


class _Rows:
    """Some samples of a reader as items."""

    def __init__(self, reader: Reader, index: npt.NDArray[np.int64]) -> None:
        self.reader, self.index = reader, index

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, index: int) -> Tensor:
        return self.reader.read(int(self.index[index]))

    def digest(self) -> str:
        sources = [sha256(part.digest()).digest() for part in self.reader.parts]
        return sha256(b"".join([*sources, self.index.tobytes()])).hexdigest()


Inputs = Tensor | StoredInputs
"""Inputs of samples: resident or stored."""


def take_inputs(inputs: Any, indices: Any) -> Any:
    """Return inputs at an index or mask; stored ones are not read."""
    return inputs[indices] if isinstance(inputs, Tensor | np.ndarray) else inputs.take(indices)


def input_batches(inputs: Inputs, indices: Sequence[Tensor]) -> Iterator[Tensor]:
    """Yield the inputs at index tensors on the device of the inputs."""
    return inputs.batches(indices) if isinstance(inputs, StoredInputs) else (inputs[part] for part in indices)


def split_inputs(inputs: Inputs, size: int) -> Iterator[Tensor]:
    """Yield all inputs in batches of at most `size`."""
    if isinstance(inputs, StoredInputs):
        return inputs.batches(torch.split(torch.arange(len(inputs)), size) if len(inputs) else ())
    return iter(torch.split(inputs, size))


def close_inputs(inputs: Inputs) -> None:
    """End the processes that read stored inputs."""
    if isinstance(inputs, StoredInputs):
        inputs.close()


def join_inputs(arrays: Sequence[Any], titles: Sequence[str]) -> StoredInputs:
    """Concatenate inputs of several sources without reading.

    uint8 pixels become float32 in [-1, 1] if other sources have float inputs.

    Args:
        arrays: Arrays (N, H, W[, C]), `StoredInputs`, or objects whose items are arrays (H, W[, C]).
        titles: Names of the sources in errors.
    """
    parts: list[StoredPart] = []
    for array, title in zip(arrays, titles, strict=True):
        if isinstance(array, StoredInputs):
            parts += array._whole_parts()
        else:
            parts.append(StoredPart(array, title, _content(array) if isinstance(array, np.ndarray) else ""))
    if len({part.read(0).dtype for part in parts if len(part)}) > 1:
        parts = [replace(part, is_widened=True) for part in parts]
    return StoredInputs(parts)


def _content(array: npt.NDArray[Any]) -> str:
    """Return the SHA-256 (hex) of an array, without a copy of all of it."""
    content = sha256()
    for row in array:
        content.update(np.ascontiguousarray(row).data)
    return content.hexdigest()
