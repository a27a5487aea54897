"""Data module: a data set partitioned across clients."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import lightning
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedekd.data.batches import TensorBatches
from fedekd.data.near_copies import find_near_copies, near_copy_warning
from fedekd.data.partition import (
    PARTITIONS,
    PartitionFunction,
    check_fractions,
    checked_parts,
    cut_validation,
    split_indices,
)
from fedekd.data.samples import Samples, content_digest
from fedekd.data.sources import load_samples
from fedekd.errors import UserError, describe_error, listed, nearest, shorten
from fedekd.seeding import derive_seed
from fedekd.tasks import Task, require_task


@dataclass(frozen=True, eq=False)
class ClientSplits:
    """The samples of one client: int64 index tensors in ascending order.

    Args:
        client: Number of the client, from 0.
        train: Training samples.
        validation: Validation samples; the union of tuning, calibration and holdout.
        test: Samples of the reported score.
        tuning: Samples for thresholds and choices.
        calibration: Samples for exits and conformal sets.
        holdout: Samples for the do-no-harm comparison.
    """

    client: int
    train: Tensor
    validation: Tensor
    test: Tensor
    tuning: Tensor
    calibration: Tensor
    holdout: Tensor

    def __len__(self) -> int:
        return len(self.train) + len(self.validation) + len(self.test)

    def digest(self, samples: Samples) -> str:
        """Return the SHA-256 (hex) of the pixels and targets of all splits, in order.

        Independent of the positions of the samples in the data set: a cache key for results of this client's data.
        """
        return content_digest(samples, [self.train, self.validation, self.test])

    def validation_digest(self, samples: Samples) -> str:
        """Return the SHA-256 (hex) of tuning, calibration and holdout, in order."""
        return content_digest(samples, [self.tuning, self.calibration, self.holdout])


class FederatedDataModule(lightning.LightningDataModule):
    """Images partitioned across clients, each with training, validation and test.

    The data loaders serve the samples of all clients, or of one client, to a Lightning Trainer.

    Args:
        dataset: Name of a data set (digits, fashionmnist, cifar10, cifar100, tinyimagenet, diabetic_retinopathy, or a
            2D flag of MedMNIST such as retinamnist or organamnist_64), or path of an .npz file in MedMNIST's layout.
        num_clients: Number of clients, at least 1.
        alpha: Concentration of the Dirichlet partition, above 0. Smaller values give more different clients.
        partition: label (Dirichlet over classes), cluster (Dirichlet over k-means clusters of the images), iid, or the
            import path of a function (images, num_clients, alpha, seed, min_samples) -> index arrays. Default: label
            for classification, cluster for regression.
        root: Folder of the data files; a name is first searched as ROOT/NAME.npz.
        batch_size: Samples per training batch, at least 1.
        eval_batch_size: Samples per evaluation batch, at least 1; affects outputs only in the last bits. 64 to 128 is
            fastest on CPUs.
        fractions: Fractions of training, validation and test per client; they sum to 1, only validation may be 0.
        min_samples: Smallest number of samples per client, at least 2; the partition is redrawn until it holds.
        seed: Seed of the partition, splits and order of batches.
        task: classification or regression. Default: the task of the data set.
        num_classes: Number of classes or grades, at least 2. Default: that of the data set.
        download: Download the data set if it is not in root.
        client: Number of the client whose samples are served, from 0. Default: all clients.
        ignore_label: Label that means "unknown", such as 255 or -1: its samples are left out of every split. Default:
            none.

    Raises:
        UserError: If an argument is out of range.

    Example:
        >>> data = FederatedDataModule("digits", num_clients=3, alpha=0.5)
        >>> data.samples.inputs.shape, len(data.clients)
        (torch.Size([1797, 1, 8, 8]), 3)
    """

    def __init__(
        self,
        dataset: str,
        num_clients: int = 6,
        alpha: float = 0.1,
        partition: str | None = None,
        root: str = "data",
        batch_size: int = 64,
        eval_batch_size: int = 128,
        fractions: tuple[float, float, float] = (0.6, 0.2, 0.2),
        min_samples: int = 10,
        seed: int = 0,
        task: Task | None = None,
        num_classes: int | None = None,
        download: bool = True,
        client: int | None = None,
        ignore_label: int | None = None,
    ) -> None:
        super().__init__()
        lowest = {"num_clients": 1, "batch_size": 1, "eval_batch_size": 1, "min_samples": 2, "num_classes": 2}
        values = locals()
        for argument, minimum in lowest.items():
            if values[argument] is not None and values[argument] < minimum:
                raise UserError(f"data.{argument}: expected at least {minimum}, got {values[argument]}")
        if not (alpha > 0 and np.isfinite(alpha)):
            raise UserError(f"data.alpha: expected a finite number above 0, got {alpha}")
        if client is not None and not 0 <= client < num_clients:
            raise UserError(
                f"data.client: expected 0..{num_clients - 1} (data.num_clients is {num_clients}), got {client}"
            )
        check_fractions(fractions)
        self.dataset, self.root, self.download = dataset, root, download
        self.num_clients, self.alpha, self.min_samples = num_clients, alpha, min_samples
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.fractions, self.seed, self.client = fractions, seed, client
        self._task = None if task is None else require_task(task)
        self._num_classes, self._ignore_label = num_classes, ignore_label
        self._partition = None if partition is None else _partition_function(partition)
        self._samples: Samples | None = None
        self._clients: list[ClientSplits] | None = None

    def __str__(self) -> str:
        # Lightning's __str__ would load the data, and fail because TensorBatches is not a DataLoader.
        return f"FederatedDataModule(dataset={self.dataset!r}, num_clients={self.num_clients}, seed={self.seed})"

    def adopt(self, samples: Samples) -> None:
        """Use images that are already in memory instead of loading them."""
        self._samples = samples

    def prepare_data(self) -> None:
        """Load the images; download them if needed and allowed.

        Raises:
            UserError: If the data set is unknown, missing or corrupt.
        """
        if self._samples is None:
            self._samples = load_samples(
                self.dataset, self.root, self._task, self._num_classes, self.download, self._ignore_label
            )

    def setup(self, stage: str | None = None) -> None:
        """Load and partition the images on the first call; later calls do nothing.

        Raises:
            UserError: If the data cannot be loaded, or the partition is impossible.
        """
        self.prepare_data()
        samples = cast(Samples, self._samples)
        if self._clients is None:
            default = PARTITIONS["label" if samples.task == "classification" else "cluster"]
            partition = self._partition or default
            seed = derive_seed(self.seed, "partition")
            try:
                # A generator fails while it is read.
                parts = partition(samples, self.num_clients, self.alpha, seed, self.min_samples)
                arrays = checked_parts(parts, self.num_clients, len(samples))
            except UserError:
                raise
            except Exception as error:  # from a user's function
                if partition in PARTITIONS.values():
                    raise
                raise UserError(
                    "data.partition: expected a function (images, num_clients, alpha, seed, min_samples) -> list of"
                    f" arrays, which failed with {describe_error(error)}"
                ) from error
            self._clients = [
                split_client(client, part, self.fractions, self.seed) for client, part in enumerate(arrays)
            ]

    @property
    def samples(self) -> Samples:
        """All images and targets, loaded on first use."""
        self.setup()
        return cast(Samples, self._samples)

    @property
    def clients(self) -> list[ClientSplits]:
        """Samples of each client, loaded and partitioned on first use."""
        self.setup()
        return cast("list[ClientSplits]", self._clients)

    @property
    def task(self) -> Task:
        """`classification` or `regression`."""
        return self.samples.task

    @property
    def num_classes(self) -> int:
        """Number of classes or grades."""
        return self.samples.num_classes

    def warnings(self) -> list[str]:
        """Return what a user should know of the data before training, as lines."""
        return data_warnings(self.samples, self.clients)

    def class_counts(self) -> npt.NDArray[np.int64]:
        """Return the samples per client and class, shape (num_clients, num_classes)."""
        labels = self.samples.labels
        counts = [
            torch.bincount(labels[torch.cat([part.train, part.validation, part.test])], minlength=self.num_classes)
            for part in self.clients
        ]
        return np.asarray(torch.stack(counts).numpy())

    def train_dataloader(self) -> TensorBatches:
        """Return training batches `(x, y)`, x in [-1, 1], in a new seeded order per pass."""
        owner = "pooled" if self.client is None else self.client
        generator = torch.Generator().manual_seed(derive_seed(self.seed, owner, "batches"))
        return self._batches(lambda splits: splits.train, self.batch_size, generator)

    def val_dataloader(self) -> TensorBatches:
        """Return validation batches `(x, y)` in fixed order."""
        return self._batches(lambda splits: splits.validation, self.eval_batch_size)

    def test_dataloader(self) -> TensorBatches:
        """Return test batches `(x, y)` in fixed order."""
        return self._batches(lambda splits: splits.test, self.eval_batch_size)

    def predict_dataloader(self) -> TensorBatches:
        """Return the test batches."""
        return self.test_dataloader()

    def _batches(
        self, split: Callable[[ClientSplits], Tensor], size: int, generator: torch.Generator | None = None
    ) -> TensorBatches:
        clients = self.clients if self.client is None else [self.clients[self.client]]
        indices = torch.cat([split(splits) for splits in clients])
        return TensorBatches(self.samples.inputs, self.samples.targets, indices, size, generator=generator)


def split_client(
    client: int, indices: npt.NDArray[np.int64], fractions: tuple[float, float, float], seed: int
) -> ClientSplits:
    """Split a client's samples into training, validation with its thirds, and test.

    Args:
        client: Number of the client; it enters the seeds of the splits.
        indices: Samples of the client, shape (n,).
        fractions: Fractions of training, validation and test.
        seed: Seed of the data module.

    Returns:
        The splits of the client.

    Raises:
        UserError: As `split_indices`.
    """
    train, validation, test = split_indices(indices, fractions, derive_seed(seed, client, "split"))
    parts = cut_validation(validation, derive_seed(seed, client, "validation"))
    return ClientSplits(client, *(torch.from_numpy(part) for part in (train, validation, test, *parts)))


def data_warnings(samples: Samples, clients: Sequence[ClientSplits]) -> list[str]:
    """Return what a user should know of samples and splits, as lines.

    Args:
        samples: The samples.
        clients: Splits of the clients; held-out images are compared with training images of the same client.
    """
    copies = near_copy_warning(find_near_copies(samples.inputs, clients))
    return [*samples.warnings, *([] if copies is None else [copies])]


def _partition_function(partition: str) -> PartitionFunction:
    if partition in PARTITIONS:
        return PARTITIONS[partition]
    module, _, function = partition.rpartition(".")
    if not module:
        raise UserError(
            f"data.partition: expected one of {listed(PARTITIONS)}, or the import path of a function, got"
            f" {shorten(repr(partition))}. {nearest(partition, PARTITIONS)}"
        )
    try:
        imported: Any = getattr(importlib.import_module(module), function)
    except Exception as error:  # a user's module may raise anything
        raise UserError(
            f"data.partition: expected a function that can be imported, got {shorten(repr(partition))}."
            f" {describe_error(error)}"
        ) from error
    if not callable(imported):
        raise UserError(f"data.partition: expected a function, got '{partition}', a {type(imported).__name__}")
    return cast(PartitionFunction, imported)
