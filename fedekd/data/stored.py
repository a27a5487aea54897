"""Inputs that are not resident: they are read when a batch needs them."""

from __future__ import annotations

import multiprocessing
import signal
import warnings
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fedekd.child_process import die_with_parent
from fedekd.data.transforms import Transform, augment, seeded_generators
from fedekd.errors import UserError, describe_error
from fedekd.global_state import exclusive

#: Samples of a split that are read for its digest, at regular steps.
DIGEST_SAMPLES = 64


@dataclass(frozen=True, eq=False)
class StoredPart:
    """Items of one source.

    Args:
        items: Object with `__len__` and `__getitem__(i)`, which returns an input: a tensor (C, H, W), uint8 or float;
            an array (H, W) or (H, W, C); or a PIL image.
        title: Name of the source in errors, such as `site 'a'`.
        identity: Enters the digest if the items have no method `digest()`.
        is_pair: Items are `(input, label)`.
    """

    items: Any
    title: str = "data.dataset"
    identity: str = ""
    is_pair: bool = False

    def __len__(self) -> int:
        return len(self.items)

    def read(self, index: int) -> Tensor:
        """Read one input, a tensor (C, H, W) or (F,), uint8 or float32.

        Raises:
            UserError: If it cannot be read, or is not as described above.
        """
        return self.to_input(self.read_item(index), index)

    def read_item(self, index: int) -> Any:
        """Return one item as it is.

        Raises:
            UserError: If it cannot be read.
        """
        try:
            return self.items[index]
        except UserError:
            raise
        except Exception as error:  # a user's data set may raise anything
            raise UserError(
                f"{self.title}: expected to read sample {index}. It failed: {describe_error(error)}"
            ) from error

    def to_input(self, item: Any, index: int) -> Tensor:
        """Convert an item to a tensor.

        Raises:
            UserError: If the item is not as described above.
        """
        if self.is_pair:
            if not (isinstance(item, tuple | list) and len(item) == 2):
                raise UserError(f"{self.title}: expected items (input, label), got {_kind(item)} as sample {index}")
            item = item[0]
        if not isinstance(item, Tensor):
            item = _array_tensor(item, f"{self.title}: sample {index}")
        if item.dtype != torch.uint8 and not item.dtype.is_floating_point:
            raise UserError(f"{self.title}: expected uint8 or float inputs, got {item.dtype} as sample {index}")
        item = item.detach().as_subclass(Tensor).cpu()  # not torchvision's Image
        if item.dtype == torch.uint8:
            return item  # type: ignore[no-any-return]
        if not bool(item.isfinite().all()):
            raise UserError(f"{self.title}: expected finite inputs, got NaN or infinity in sample {index}")
        return item.float()  # type: ignore[no-any-return]

    def digest(self) -> bytes:
        """Return a digest of the source, without the content of its items."""
        if callable(own := getattr(self.items, "digest", None)):
            return str(own()).encode()
        kind = type(self.items)
        return f"{kind.__module__}.{kind.__qualname__} {self.identity} {len(self.items)}".encode()


def _array_tensor(item: Any, where: str) -> Tensor:
    if hasattr(item, "convert") and hasattr(item, "mode"):  # a PIL image
        item = np.asarray(item.convert({"1": "L", "P": "RGB"}.get(item.mode, item.mode)))
    if not isinstance(item, np.ndarray) or item.ndim not in (1, 2, 3):
        raise UserError(f"{where}: expected a tensor (C, H, W), an array (H, W, C) or a PIL image, got {_kind(item)}")
    try:
        tensor = torch.from_numpy(np.array(item))  # a copy: arrays of images are read-only
    except TypeError as error:
        raise UserError(f"{where}: expected uint8 or float values, got {item.dtype}") from error
    if tensor.ndim == 1:
        return tensor
    return tensor[None] if tensor.ndim == 2 else tensor.permute(2, 0, 1)


def _kind(item: Any) -> str:
    shape = f" of shape {tuple(item.shape)}" if hasattr(item, "shape") else ""
    return f"a {type(item).__name__}{shape}"


class _Job(NamedTuple):
    """One batch: numbers of samples, and the seed of the augmentation."""

    samples: list[int]
    seed: int
    transform: Transform | None


class _Reader(Dataset[Any]):
    """Reads batches, in this process or in one that a DataLoader starts."""

    def __init__(self, parts: Sequence[StoredPart], shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.parts, self.shape, self.dtype = tuple(parts), shape, dtype
        self.first = np.cumsum([0, *(len(part) for part in parts)])

    def place(self, sample: int) -> tuple[int, int]:
        """Return the number of the part and the position within it."""
        part = int(np.searchsorted(self.first, sample, side="right")) - 1
        return part, sample - int(self.first[part])

    def read(self, sample: int) -> Tensor:
        part, index = self.place(sample)
        x = self.parts[part].read(index)
        if tuple(x.shape) != self.shape or x.dtype != self.dtype:
            raise UserError(
                f"{self.parts[part].title}: expected inputs {self.shape}, {self.dtype}, as sample 0"
                f"{'' if part == 0 else ' of ' + self.parts[0].title}, got {tuple(x.shape)}, {x.dtype}, as sample"
                f" {index}. Resize and convert all to one shape and type"
            )
        return x

    def __getitem__(self, job: _Job) -> Tensor:
        with seeded_generators(job.seed):  # items may be random, and must not advance the generators of training
            inputs = torch.stack([self.read(sample) for sample in job.samples])
        return inputs if job.transform is None else augment(inputs, job.transform, job.seed)


class _Failure(NamedTuple):
    text: str


class _SafeReader(_Reader):
    """Returns errors: raised in a worker, one would get the traceback as text."""

    def __getitem__(self, job: _Job) -> Any:
        try:
            return super().__getitem__(job)
        except UserError as error:
            return _Failure(str(error))


class _Jobs:
    """Sampler whose batches change from pass to pass, so that the workers can stay."""

    def __init__(self) -> None:
        self.jobs: list[_Job] = []

    def __iter__(self) -> Iterator[_Job]:
        return iter(self.jobs)

    def __len__(self) -> int:
        return len(self.jobs)


def _unchanged(batch: Any) -> Any:
    return batch


def _init_worker(number: int) -> None:
    """Let this worker end with its parent, which handles the signals."""
    die_with_parent()
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.SIG_IGN)


class _Workers:
    """Processes that read the batches of one pass after another."""

    def __init__(self, reader: _Reader, count: int) -> None:
        self.jobs = _Jobs()
        self.count = count
        self.is_busy = False
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of more workers than cores
            self.loader: DataLoader[Any] = DataLoader(
                _SafeReader(reader.parts, reader.shape, reader.dtype),
                batch_size=None,
                sampler=self.jobs,
                num_workers=count,
                collate_fn=_unchanged,
                persistent_workers=True,
                worker_init_fn=_init_worker,
                generator=torch.Generator(),  # the default one is that of the layers
            )

    def read(self, jobs: list[_Job]) -> Iterator[Tensor]:
        """Yield the batches in order.

        Raises:
            UserError: If a batch cannot be read, or a worker ended.
        """
        self.jobs.jobs, self.is_busy = jobs, True
        try:
            # A forked worker could wait forever for a lock that another thread holds.
            with exclusive(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of a fork with threads
                batches = iter(self.loader)
            for batch in batches:
                if isinstance(batch, _Failure):
                    raise UserError(batch.text)
                yield batch
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise UserError(
                "data.num_workers: a process that reads inputs ended, perhaps for lack of memory"
                f" ({describe_error(error, 120)}). Lower it, or use 0, and continue with fit --resume"
            ) from error
        finally:
            self.is_busy = False

    def close(self) -> None:
        """End the processes."""
        iterator: Any = getattr(self.loader, "_iterator", None)
        if iterator is not None:
            iterator._shutdown_workers()
            for process in iterator._workers:
                process.kill()  # one that still reads
            self.loader._iterator = None


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
        self._reader = _Reader(parts, tuple(first.shape), first.dtype)
        for start in self._reader.first[:-1]:
            self._reader.read(int(start))
        self._index: npt.NDArray[np.int64] | None = None
        self._workers: list[_Workers] = []  # shared with copies
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
        return self._reader[self._job(indices)].to(self.device) if len(indices) else self._none()

    def _none(self) -> Tensor:
        return torch.empty(0, *self._reader.shape, dtype=self.dtype, device=self.device)

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

    def _job(self, indices: Tensor, seed: int = 0, transform: Transform | None = None) -> _Job:
        numbers = indices.cpu().numpy()
        return _Job((numbers if self._index is None else self._index[numbers]).tolist(), seed, transform)

    def _free_workers(self) -> _Workers | None:
        # Daemonic processes, as those of MultiProcess, cannot have children.
        if self.num_workers < 1 or multiprocessing.current_process().daemon:
            return None
        if self._workers and self._workers[0].count != self.num_workers:
            self.close()
        if not self._workers:
            with exclusive():
                self._workers.append(_Workers(self._reader, self.num_workers))
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

    def __init__(self, reader: _Reader, index: npt.NDArray[np.int64]) -> None:
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

    At least one of them is stored.

    Args:
        arrays: Arrays (N, H, W[, C]), `StoredInputs`, or objects whose items are arrays (H, W[, C]).
        titles: Names of the sources in errors.
    """
    parts: list[StoredPart] = []
    for array, title in zip(arrays, titles, strict=True):
        if isinstance(array, StoredInputs):
            parts += array._whole_parts()
        else:
            content = sha256(array.tobytes()).hexdigest() if isinstance(array, np.ndarray) else ""
            parts.append(StoredPart(array, title, content))
    return StoredInputs(parts)
