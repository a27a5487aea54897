"""Readers of inputs that are not resident, in this process or in workers."""

from __future__ import annotations

import signal
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fedekd.child_process import die_with_parent
from fedekd.data.pixels import widened
from fedekd.data.transforms import Transform, augment, seeded_generators
from fedekd.errors import UserError, describe_error
from fedekd.global_state import exclusive


@dataclass(frozen=True, eq=False)
class StoredPart:
    """Items of one source.

    Args:
        items: Object with `__len__` and `__getitem__(i)`, which returns an input: a tensor (C, H, W), uint8 or float;
            an array (H, W) or (H, W, C); or a PIL image.
        title: Name of the source in errors, such as `site 'a'`.
        identity: Enters the digest if the items have no method `digest()`.
        is_pair: Items are `(input, label)`.
        is_widened: Convert uint8 pixels to float32 in [-1, 1], as those of other sources are.
    """

    items: Any
    title: str = "data.dataset"
    identity: str = ""
    is_pair: bool = False
    is_widened: bool = False

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
            return torch.from_numpy(widened(item.numpy())) if self.is_widened else item
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


class Job(NamedTuple):
    """One batch: numbers of samples, and the seed of the augmentation."""

    samples: list[int]
    seed: int
    transform: Transform | None


class Reader(Dataset[Any]):
    """Reads batches, in this process or in one that a DataLoader starts."""

    def __init__(self, parts: Sequence[StoredPart], shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.parts, self.shape, self.dtype = tuple(parts), shape, dtype
        self.first = np.cumsum([0, *(len(part) for part in parts)])

    def place(self, sample: int) -> tuple[int, int]:
        """Return the number of the part and the position within it."""
        part = int(np.searchsorted(self.first, sample, side="right")) - 1
        return part, sample - int(self.first[part])

    def read(self, sample: int) -> Tensor:
        """Read one input.

        Raises:
            UserError: If it cannot be read, or has another shape or type than the first one.
        """
        part, index = self.place(sample)
        x = self.parts[part].read(index)
        if tuple(x.shape) != self.shape or x.dtype != self.dtype:
            raise UserError(
                f"{self.parts[part].title}: expected inputs {self.shape}, {self.dtype}, as sample 0"
                f"{'' if part == 0 else ' of ' + self.parts[0].title}, got {tuple(x.shape)}, {x.dtype}, as sample"
                f" {index}. Resize and convert all to one shape and type"
            )
        return x

    def __getitem__(self, job: Job) -> Tensor:
        if not job.samples:
            return torch.empty(0, *self.shape, dtype=self.dtype)
        with seeded_generators(job.seed):  # items may be random, and must not advance the generators of training
            inputs = torch.stack([self.read(sample) for sample in job.samples])
        return inputs if job.transform is None else augment(inputs, job.transform, job.seed)


class _Failure(NamedTuple):
    text: str


class _SafeReader(Reader):
    """Returns errors: raised in a worker, one would get the traceback as text."""

    def __getitem__(self, job: Job) -> Any:
        try:
            return super().__getitem__(job)
        except UserError as error:
            return _Failure(str(error))


class _Jobs:
    """Sampler whose batches change from pass to pass, so that the workers can stay."""

    def __init__(self) -> None:
        self.jobs: list[Job] = []

    def __iter__(self) -> Iterator[Job]:
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


class Workers:
    """Processes that read the batches of one pass after another."""

    def __init__(self, reader: Reader, count: int) -> None:
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

    def read(self, jobs: list[Job]) -> Iterator[Tensor]:
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
