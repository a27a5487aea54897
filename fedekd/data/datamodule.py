"""A data set dealt to clients: what a federation trains and tests on."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import lightning
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedekd.data.batches import TensorBatches
from fedekd.data.images import ImageData, content_digest
from fedekd.data.partition import (
    PARTITIONS,
    PartitionFunction,
    check_fractions,
    cut_validation,
    split_indices,
)
from fedekd.data.sources import load_images
from fedekd.errors import UserError, nearest
from fedekd.seeding import derive_seed
from fedekd.tasks import Task, require_task


@dataclass(frozen=True, eq=False)
class ClientSplits:
    """One client's samples: int64 index tensors into the images, each sorted ascending.

    Args:
        client: Number of the client, from 0.
        train: What its models are trained on.
        validation: Held out from training and test; the union of the next three.
        test: What it is scored on.
        tuning: Validation samples on which thresholds and choices are tuned.
        calibration: Validation samples on which exits and conformal sets are calibrated.
        holdout: Validation samples on which do-no-harm is decided.
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

    def digest(self, images: ImageData) -> str:
        """SHA-256 (hex) of the pixels and targets of training, validation and test, in order.

        Equal for equal contents, wherever the samples lie in the data set: a cache key for what was computed
        from this client's data.
        """
        return content_digest(images, [self.train, self.validation, self.test])


class FederatedDataModule(lightning.LightningDataModule):
    """Images dealt to clients, each client's split into training, validation and test.

    Its loaders serve the clients' samples pooled, or those of one client, to an ordinary Lightning Trainer.

    Args:
        dataset: A name (digits, fashionmnist, cifar10, cifar100, tinyimagenet, diabetic_retinopathy, or a 2D flag
            of MedMNIST such as retinamnist or organamnist_64), or the path of an .npz file in MedMNIST's layout.
        num_clients: Number of clients.
        alpha: Concentration of the Dirichlet partition, over 0; the smaller, the less alike the clients.
        partition: label (skewed class by class), cluster (skewed by k-means clusters of the images), iid, or
            the import path of a function (images, num_clients, alpha, seed, min_samples) -> index arrays. By
            default label for classification and cluster for regression.
        root: Folder of the data files; a name is first looked for as ROOT/NAME.npz.
        batch_size: Samples a training batch.
        eval_batch_size: Samples an evaluation batch, a frozen teacher's too; changes outputs in their last bits alone.
            64 to 128 was measured fastest on CPUs.
        fractions: Shares of training, validation and test of each client's samples; they sum to 1.
        min_samples: Fewest samples a client may have; a partition that gives one fewer is drawn anew.
        seed: Seed of partition, splits and order of batches.
        task: classification or regression. By default the data set's own.
        num_classes: Number of classes or grades. By default the data set's own.
        download: Whether a data set that is not under root may be downloaded.
        client: Serve this client's samples only, counted from 0. By default all clients', pooled.

    Raises:
        UserError: If an argument is out of range.
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
    ) -> None:
        super().__init__()
        lowest = {"num_clients": 1, "batch_size": 1, "eval_batch_size": 1, "min_samples": 2, "num_classes": 2}
        given = locals()
        for argument, least in lowest.items():
            if given[argument] is not None and given[argument] < least:
                raise UserError(f"data.{argument}={given[argument]}: at least {least} is needed")
        if not (alpha > 0 and np.isfinite(alpha)):
            raise UserError(f"data.alpha={alpha}: the Dirichlet concentration must be a finite number over 0")
        if client is not None and not 0 <= client < num_clients:
            raise UserError(
                f"data.client={client}: allowed are 0..{num_clients - 1} with data.num_clients={num_clients}"
            )
        check_fractions(fractions)
        self.dataset, self.root, self.download = dataset, root, download
        self.num_clients, self.alpha, self.min_samples = num_clients, alpha, min_samples
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.fractions, self.seed, self.client = fractions, seed, client
        self._task = None if task is None else require_task(task)
        self._num_classes = num_classes
        self._partition = None if partition is None else _partition_function(partition)
        self._images: ImageData | None = None
        self._clients: list[ClientSplits] | None = None

    def __str__(self) -> str:
        # Lightning's own loads the data and fails on loaders that are no DataLoader.
        return f"FederatedDataModule(dataset={self.dataset!r}, num_clients={self.num_clients}, seed={self.seed})"

    def adopt(self, images: ImageData) -> None:
        """Use images that are in memory already: what `load_images` gave for the same data set."""
        self._images = images

    def prepare_data(self) -> None:
        """Load the images, and download them where that is needed and allowed.

        Raises:
            UserError: If the data set is unknown, missing or damaged.
        """
        if self._images is None:
            self._images = load_images(self.dataset, self.root, self._task, self._num_classes, self.download)

    def setup(self, stage: str | None = None) -> None:
        """Load the images and deal them to the clients, once; further calls change nothing.

        Raises:
            UserError: If the data cannot be loaded, or not be dealt as asked.
        """
        self.prepare_data()
        images = cast(ImageData, self._images)
        if self._clients is None:
            default = PARTITIONS["label" if images.task == "classification" else "cluster"]
            partition = self._partition or default
            seed = derive_seed(self.seed, "partition")
            try:
                parts = list(partition(images, self.num_clients, self.alpha, seed, self.min_samples))
            except UserError:
                raise
            except Exception as error:  # a function of one's own may fail in any way
                if partition in PARTITIONS.values():
                    raise
                raise UserError(
                    "data.partition: its function, called with (images, num_clients, alpha, seed, min_samples) for a"
                    f" list of arrays, has failed: {type(error).__name__}: {error}"
                ) from error
            _check_partition(parts, self.num_clients, len(images))
            self._clients = [split_client(client, part, self.fractions, self.seed) for client, part in enumerate(parts)]

    @property
    def images(self) -> ImageData:
        """All images and targets; loaded on first use."""
        self.setup()
        return cast(ImageData, self._images)

    @property
    def clients(self) -> list[ClientSplits]:
        """The samples of each client; loaded and dealt on first use."""
        self.setup()
        return cast("list[ClientSplits]", self._clients)

    @property
    def task(self) -> Task:
        """`classification` or `regression`."""
        return self.images.task

    @property
    def num_classes(self) -> int:
        """Number of classes or grades."""
        return self.images.num_classes

    def class_counts(self) -> npt.NDArray[np.int64]:
        """Samples of each class or grade that each client has, shape (num_clients, num_classes)."""
        labels = self.images.labels
        counts = [
            torch.bincount(labels[torch.cat([own.train, own.validation, own.test])], minlength=self.num_classes)
            for own in self.clients
        ]
        return np.asarray(torch.stack(counts).numpy())

    def train_dataloader(self) -> TensorBatches:
        """Training batches `(x, y)`, x in [-1, 1]; every pass in a new order that the seed decides."""
        whose = "pooled" if self.client is None else self.client
        generator = torch.Generator().manual_seed(derive_seed(self.seed, whose, "batches"))
        return self._batches(lambda own: own.train, self.batch_size, generator)

    def val_dataloader(self) -> TensorBatches:
        """Validation batches `(x, y)` in fixed order."""
        return self._batches(lambda own: own.validation, self.eval_batch_size)

    def test_dataloader(self) -> TensorBatches:
        """Test batches `(x, y)` in fixed order."""
        return self._batches(lambda own: own.test, self.eval_batch_size)

    def predict_dataloader(self) -> TensorBatches:
        """The test batches."""
        return self.test_dataloader()

    def _batches(
        self, split: Callable[[ClientSplits], Tensor], size: int, generator: torch.Generator | None = None
    ) -> TensorBatches:
        chosen = self.clients if self.client is None else [self.clients[self.client]]
        indices = torch.cat([split(own) for own in chosen])
        return TensorBatches(self.images.pixels, self.images.targets, indices, size, generator=generator)


def split_client(
    client: int, indices: npt.NDArray[np.int64], fractions: tuple[float, float, float], seed: int
) -> ClientSplits:
    """A client's samples, split into training, validation and test, and validation into its three parts.

    Args:
        client: Its number; another number splits the same samples otherwise.
        indices: Its samples.
        fractions: Shares of training, validation and test.
        seed: The data's.
    """
    train, validation, test = split_indices(indices, fractions, derive_seed(seed, client, "split"))
    parts = cut_validation(validation, derive_seed(seed, client, "validation"))
    return ClientSplits(client, *(torch.from_numpy(part) for part in (train, validation, test, *parts)))


def _partition_function(partition: str) -> PartitionFunction:
    if partition in PARTITIONS:
        return PARTITIONS[partition]
    module, _, function = partition.rpartition(".")
    if not module:
        raise UserError(
            f"data.partition: unknown partition '{partition}'; {nearest(partition, PARTITIONS)} "
            "(or the import path of a function)"
        )
    try:
        found: Any = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"data.partition: cannot import '{partition}' ({error})") from error
    if not callable(found):
        raise UserError(f"data.partition: '{partition}' is a {type(found).__name__}; a function is needed")
    return cast(PartitionFunction, found)


def _check_partition(parts: list[npt.NDArray[np.int64]], num_clients: int, num_samples: int) -> None:
    """Hold a partition of one's own to what everything else relies on."""
    dealt = np.sort(np.asarray([index for part in parts for index in np.ravel(part)], dtype=np.int64))
    distinct = len(np.unique(dealt)) == len(dealt)
    inside = len(dealt) > 0 and dealt[0] >= 0 and dealt[-1] < num_samples
    if len(parts) != num_clients or not (distinct and inside):
        raise UserError(
            f"data.partition: its function gave {len(parts)} arrays with {len(dealt)} indices; needed are "
            f"{num_clients} arrays (data.num_clients) of distinct indices in 0..{num_samples - 1}"
        )
