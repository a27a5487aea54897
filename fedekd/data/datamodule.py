"""Data module: the samples of each client and their splits."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, cast

import lightning
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedekd.data.batches import TensorBatches
from fedekd.data.client_splits import ClientSplits, split_client
from fedekd.data.formats.table import read_features
from fedekd.data.group_checks import group_warnings, require_groups_in_one_split
from fedekd.data.group_values import group_values
from fedekd.data.partition import (
    PARTITIONS,
    Indices,
    PartitionFunction,
    check_fractions,
    checked_parts,
    partition_groups,
)
from fedekd.data.raw import ReadOptions
from fedekd.data.sample_warnings import data_warnings
from fedekd.data.samples import Samples
from fedekd.data.site_warnings import site_warnings
from fedekd.data.sources import DATA_OPTIONS, load_samples
from fedekd.data.stored import StoredInputs
from fedekd.data.subset import draw_extra_test, draw_subset
from fedekd.data.tables import prepare, transform
from fedekd.data.transforms import TransformSpec, build_transform, check_transform
from fedekd.errors import UserError, describe_error, listed, nearest, require_choice, shorten, shorten_path
from fedekd.seeding import derive_seed
from fedekd.tasks import Task, require_task

PARTITION_OPTIONS = {
    "num_clients": 6,
    "alpha": 0.1,
    "partition": None,
    "min_samples": 10,
    "max_samples": None,
    "extra_test": 0,
}
"""Options of a partition, which sites do not have, and their defaults."""


class FederatedDataModule(lightning.LightningDataModule):
    """Samples of each client, with training, validation and test.

    Clients are the sites of the data, or parts of one data set. The data loaders serve the samples of all clients, or
    of one client, to a Lightning Trainer.

    Args:
        dataset: Name of a data set (digits, heart_disease, fashionmnist, cifar10, cifar100, tinyimagenet,
            diabetic_retinopathy, or a 2D flag of MedMNIST such as retinamnist or organamnist_64), or path of a file or
            folder. Default: the data are in sites.
        num_clients: Number of clients of a partition, at least 1. Not used with sites.
        alpha: Concentration of the Dirichlet partition, above 0. Smaller values give more different clients. Not used
            with sites.
        partition: label (Dirichlet over classes), cluster (Dirichlet over k-means clusters of the images), iid, or the
            import path of a function (images, num_clients, alpha, seed, min_samples) -> index arrays. Default: label
            for classification, cluster for regression. Not used with sites.
        root: Folder of the data files; a name is first searched as ROOT/NAME.npz.
        batch_size: Samples per training batch, at least 1.
        eval_batch_size: Samples per evaluation batch, at least 1; affects outputs only in the last bits. 64 to 128 is
            fastest on CPUs.
        fractions: Fractions of training, validation and test per client; they sum to 1, only validation may be 0.
        min_samples: Smallest number of samples per client of a partition, at least 2; the partition is redrawn until
            it holds. Counts groups where there are groups.
        seed: Seed of the partition, splits and order of batches.
        task: classification or regression. Default: the task of the data set.
        num_classes: Number of classes or grades, at least 2. Default: that of the data set.
        download: Download the data set if it is not in root.
        client: Number of the client whose samples are served, from 0. Default: all clients.
        ignore_label: Label that means "unknown", such as 255 or -1: its samples are left out of every split. Default:
            none.
        sites: Folder with a file or subfolder per site, or a mapping from names of sites to paths or
            class_paths. Each site is a client. Default: dataset is partitioned.
        site_column: Column or array of dataset with the name of each sample's site. Each site is a client. Default:
            dataset is partitioned.
        group_column: Column or array with the group of each sample, such as the patient. No group is in two splits or
            at two clients of a partition. Default: each sample is a group.
        splits: random (by fractions) or given: training, validation and test as in the data.
        classes: Names of the classes in the order of their numbers. Default: those in the data, sorted.
        target_column: Column of a manifest or table with the target. Default: label.
        image_size: Height and width, or one number, to which images are resized. Default: unchanged.
        value_range: Lowest and highest value of 16-bit and float images, which are scaled to [-1, 1]. Default: 0 and
            65535, or 0 and 1.
        skip_unreadable: Leave out images that cannot be read, and count them. Default: they are errors.
        categorical_columns: Columns of a table whose numbers are categories. Text columns are categories in any case.
        ignored_columns: Columns of a table that are no features.
        categories: Categories of each categorical column. Default: those in the data.
        memory_limit: Images of more than this many GiB, of all sites together, are read from their files in every epoch
            instead of once.
        num_workers: Processes that read inputs which are not in memory, at least 0; changes no result. With
            MultiProcess each process reads for itself.
        transform: Augmentation of training samples before pixels are scaled: a transform of torchvision.transforms.v2
            by class_path, or a list. It keeps shape and type: uint8, or float in [0, 1]. Evaluation is unchanged.
        max_samples: Largest number of samples of a partition, at least `num_clients`; a random subset by `seed`, drawn
            before the partition, with whole groups. Default: all samples. Not used with sites.
        extra_test: Largest number of further test samples per client, at least 0, from the samples that `max_samples`
            leaves out, with the class mix of the client's training samples. No sample is at two clients. Not used with
            sites, groups, given splits or real-valued targets.

    Raises:
        UserError: If an argument is out of range.

    Example:
        >>> data = FederatedDataModule("digits", num_clients=3, alpha=0.5)
        >>> data.samples.inputs.shape, len(data.clients)
        (torch.Size([1797, 1, 8, 8]), 3)
    """

    def __init__(
        self,
        dataset: str | None = None,
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
        sites: str | dict[str, Any] | None = None,
        site_column: str | None = None,
        group_column: str | None = None,
        splits: str = "random",
        classes: list[str] | None = None,
        target_column: str | None = None,
        image_size: int | list[int] | None = None,
        value_range: list[float] | None = None,
        skip_unreadable: bool = False,
        categorical_columns: list[str] | None = None,
        ignored_columns: list[str] | None = None,
        categories: dict[str, list[Any]] | None = None,
        memory_limit: float = 4.0,
        num_workers: int = 2,
        transform: str | dict[str, Any] | list[Any] | None = None,
        max_samples: int | None = None,
        extra_test: int = 0,
    ) -> None:
        super().__init__()
        values = dict(locals())
        lowest = {
            "num_clients": 1,
            "batch_size": 1,
            "eval_batch_size": 1,
            "min_samples": 2,
            "num_classes": 2,
            "num_workers": 0,
            "memory_limit": 0,
            "max_samples": 1,
            "extra_test": 0,
        }
        for argument, minimum in lowest.items():
            if values[argument] is not None and values[argument] < minimum:
                raise UserError(f"data.{argument}: expected at least {minimum}, got {values[argument]}")
        if not (alpha > 0 and np.isfinite(alpha)):
            raise UserError(f"data.alpha: expected a finite number above 0, got {alpha}")
        self.has_sites = sites is not None or site_column is not None
        if self.has_sites:
            _refuse_partition(values)
        elif client is not None and not 0 <= client < num_clients:
            raise UserError(
                f"data.client: expected 0..{num_clients - 1} (data.num_clients is {num_clients}), got {client}"
            )
        elif max_samples is not None and max_samples < num_clients:
            raise UserError(
                f"data.max_samples: expected at least {num_clients} (data.num_clients), got {max_samples}. Raise it, or"
                " lower data.num_clients."
            )
        if sites is not None and site_column is not None:
            raise UserError(f"data.site_column: expected null with data.sites, got {site_column!r}")
        check_fractions(fractions)
        require_choice("data.splits", splits, ("random", "given"))
        if extra_test and max_samples is None:
            raise UserError(
                f"data.extra_test: expected 0 without data.max_samples, which leaves samples out, got {extra_test}"
            )
        if extra_test and splits == "given":
            raise UserError(f"data.extra_test: expected 0 with data.splits given, got {extra_test}")
        self.dataset, self.root, self.download = dataset, root, download
        self.alpha, self.min_samples = alpha, min_samples
        self.max_samples, self.extra_test = max_samples, extra_test
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.fractions, self.seed, self.client, self.splits = fractions, seed, client, splits
        self.num_workers, self.transform = num_workers, transform
        self._num_clients = num_clients
        self._source = {name: values[name] for name in DATA_OPTIONS if name in values} | {"name": dataset}
        if task is not None:
            require_task(task)
        self._partition = None if partition is None else _partition_function(partition)
        self._samples: Samples | None = None
        self._clients: list[ClientSplits] | None = None
        self._transformers: list[Any] = []
        self._warnings: list[str] = []
        self._only_client: tuple[int, str | None] | None = None

    def __str__(self) -> str:
        # Lightning's __str__ would load the data, and fail because TensorBatches is not a DataLoader.
        source = f"sites={self._source['sites']!r}" if self.dataset is None else f"dataset={self.dataset!r}"
        clients = "" if self.has_sites else f", num_clients={self._num_clients}"
        return f"FederatedDataModule({source}{clients}, seed={self.seed})"

    @property
    def read_options(self) -> ReadOptions:
        """Options that decide how a file is read."""
        return ReadOptions(**{field.name: self._source[field.name] for field in fields(ReadOptions)})

    def adopt(self, samples: Samples) -> None:
        """Use samples that are already in memory instead of loading them."""
        self._samples = samples
        self._set_workers()

    def _set_workers(self) -> None:
        if self._samples is not None and isinstance(self._samples.inputs, StoredInputs):
            self._samples.inputs.num_workers = self.num_workers

    def assign_all(self, client: int, name: str | None = None) -> None:
        """Assign all samples to one client, before they are loaded.

        Args:
            client: Number of the client, which enters the seeds of its splits.
            name: Name of the site that is the client.

        Raises:
            UserError: If `max_samples` is set: a subset is drawn before a partition only.
        """
        if self.max_samples is not None:
            raise UserError(f"data.max_samples: expected null with data of a site, got {self.max_samples}")
        self._only_client = client, name

    def prepare_data(self) -> None:
        """Load the samples; download them if needed and allowed.

        Raises:
            UserError: If the data set is unknown, missing or corrupt.
        """
        if self._samples is None:
            self._samples = load_samples(**self._source)
            self._set_workers()

    def setup(self, stage: str | None = None) -> None:
        """Load, assign and split the samples on the first call.

        Raises:
            UserError: If the data cannot be loaded, or the partition or a split is impossible.
        """
        self.prepare_data()
        samples = cast(Samples, self._samples)
        if self._clients is None:
            if self.transform is not None:
                check_transform(self.transform, samples.inputs[torch.tensor([0])])
            first = 0
            if self._only_client is not None:
                first, only = self._only_client
                parts: list[tuple[str | None, Indices]] = [(only, np.arange(len(samples), dtype=np.int64))]
            else:
                parts = self._parts_of_sites(samples) if self.has_sites else self._parts_of_partition(samples)
            splits = [
                split_client(client, part, samples, self.fractions, self.seed, self.splits, name)
                for client, (name, part) in enumerate(parts, start=first)
            ]
            if self.splits == "given":
                require_groups_in_one_split(samples, splits)
            if self.extra_test:
                splits = self._with_extra_test(samples, splits)
            self._samples, self._clients, self._transformers = prepare(samples, splits)

    def _parts_of_sites(self, samples: Samples) -> list[tuple[str | None, Indices]]:
        """Return the name and the samples of each site."""
        assert samples.site is not None
        site = samples.site.numpy()
        parts: list[tuple[str | None, Indices]] = [
            (name, np.flatnonzero(site == number)) for number, name in enumerate(samples.site_names)
        ]
        if self.client is not None and not 0 <= self.client < len(parts):
            raise UserError(f"data.client: expected 0..{len(parts) - 1} ({len(parts)} sites), got {self.client}")
        return parts

    def _parts_of_partition(self, samples: Samples) -> list[tuple[str | None, Indices]]:
        """Return the samples of each client of the partition."""
        if self.max_samples is not None and self.max_samples < len(samples):
            subset = draw_subset(len(samples), self.max_samples, self.seed, samples.group)
            return [(name, subset[part]) for name, part in self._partitioned(samples.take(subset))]
        return self._partitioned(samples)

    def _partitioned(self, samples: Samples) -> list[tuple[str | None, Indices]]:
        """Return the samples of each client of the partition of all samples."""
        default = PARTITIONS["label" if samples.task == "classification" and samples.num_classes else "cluster"]
        partition = self._partition or default
        arguments = self._num_clients, self.alpha, derive_seed(self.seed, "partition"), self.min_samples
        try:
            if samples.group is not None:
                parts = partition_groups(partition, samples, *arguments)
            else:
                # A generator fails while it is read.
                parts = checked_parts(partition(samples, *arguments), self._num_clients, len(samples))
        except UserError:
            raise
        except Exception as error:  # from a user's function
            if partition in PARTITIONS.values():
                raise
            raise UserError(
                "data.partition: expected a function (images, num_clients, alpha, seed, min_samples) -> list of"
                f" arrays, which failed with {describe_error(error)}"
            ) from error
        return [(None, part) for part in parts]

    def _with_extra_test(self, samples: Samples, splits: list[ClientSplits]) -> list[ClientSplits]:
        """Return the splits with further test samples; note clients with too few."""
        for condition, what in (
            (samples.group is not None, "groups"),
            (not samples.num_classes, "real-valued targets"),
        ):
            if condition:
                raise UserError(f"data.extra_test: expected 0 with {what}, got {self.extra_test}")
        if cast(int, self.max_samples) >= len(samples):
            raise UserError(
                f"data.max_samples: expected fewer than {len(samples)} samples with data.extra_test, which takes its"
                f" samples from those left out, got {self.max_samples}. Lower it, or set data.extra_test to 0."
            )
        subset = draw_subset(len(samples), cast(int, self.max_samples), self.seed)
        pool = np.setdiff1d(np.arange(len(samples)), subset)
        train = [own.train.numpy() for own in splits]
        parts = draw_extra_test(samples.labels.numpy(), pool, train, self.extra_test, self.seed)
        if few := [
            f"{own.label} ({len(part)})" for own, part in zip(splits, parts, strict=True) if len(part) < self.extra_test
        ]:
            self._warnings = [
                f"data.extra_test: {len(few)} of {len(splits)} clients get fewer than {self.extra_test} further test"
                f" samples, because data.max_samples leaves too few of their classes out: {listed(few)}"
            ]
        return [
            replace(own, test=torch.cat([own.test, torch.from_numpy(part)]).sort().values)
            for own, part in zip(splits, parts, strict=True)
        ]

    @property
    def num_clients(self) -> int:
        """Number of clients; the data are loaded if they are sites."""
        return len(self.clients) if self.has_sites else self._num_clients

    @property
    def samples(self) -> Samples:
        """All samples, loaded on first use."""
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
        """Number of classes or grades; 0 for real-valued targets."""
        return self.samples.num_classes

    def warnings(self) -> list[str]:
        """Return warnings on the data before training, one line each."""
        lines = data_warnings(self.samples, self.clients) + self._warnings
        lines += group_warnings(self.samples, self.clients, self.fractions, self.splits)
        if not self.has_sites:
            return lines
        counts = self.class_counts() if self.task == "classification" else np.zeros((len(self.clients), 0))
        tests = [len(splits.test) for splits in self.clients]
        return lines + site_warnings(self.samples.site_names, counts, self.samples.class_names, tests)

    def read_features(self, path: Path, client: int) -> Tensor:
        """Read a table without targets, preprocessed as the samples of a client.

        Args:
            path: A .csv or .parquet file with the feature columns of the data, in any order; others are ignored.
            client: Number of the client.

        Returns:
            Features, float32, shape (N, F).

        Raises:
            UserError: If the data are no table, or the file cannot be read or has other columns or values.
        """
        columns = self.samples.columns
        if not columns:
            raise UserError(f"data.dataset: expected images, as in training, got the table '{shorten_path(path)}'")
        index = [splits.client for splits in self.clients].index(client)
        return transform(self._transformers[index], read_features(path, columns))

    def group_values(self, column: str) -> npt.NDArray[np.str_]:
        """Return the values of a column of the data as names, shape (N,).

        Args:
            column: A column of a table or a manifest, which may be a feature, an array of an .npz file, or an attribute
                of a data set.

        Raises:
            UserError: The data have no such column, or a value is missing.
        """
        return group_values(column, self.samples, **self._source)

    def transformer(self, client: int) -> Any:
        """Return the fitted preprocessing of a client's table; None for images."""
        transformers = self._transformers if self.samples.columns else []
        numbered = {splits.client: each for splits, each in zip(self.clients, transformers, strict=False)}
        return numbered.get(client)

    def class_counts(self) -> npt.NDArray[np.int64]:
        """Return the samples per client and class, shape (num_clients, num_classes)."""
        labels = self.samples.labels
        counts = [
            torch.bincount(labels[torch.cat([part.train, part.validation, part.test])], minlength=self.num_classes)
            for part in self.clients
        ]
        return np.asarray(torch.stack(counts).numpy())[:, : self.num_classes]

    def train_dataloader(self) -> TensorBatches:
        """Return training batches `(x, y)`, x in [-1, 1], in a new seeded order per pass."""
        owner = "pooled" if self.client is None else self.client
        generator = torch.Generator().manual_seed(derive_seed(self.seed, owner, "batches"))
        return self._batches(lambda splits: splits.train, self.batch_size, generator, self.transform)

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
        self,
        split: Callable[[ClientSplits], Tensor],
        size: int,
        generator: torch.Generator | None = None,
        transform: TransformSpec | None = None,
    ) -> TensorBatches:
        processes = getattr(self.trainer, "world_size", 1)
        if processes > 1:  # Lightning gives each process a part of a DataLoader only
            raise UserError(f"trainer.devices: expected 1 with FederatedDataModule, got {processes} processes")
        clients = self.clients if self.client is None else [self.clients[self.client]]
        indices = torch.cat([split(splits) for splits in clients])
        return TensorBatches(
            self.samples.inputs,
            self.samples.targets,
            indices,
            size,
            generator=generator,
            transform=None if transform is None else build_transform(transform),
        )


def _refuse_partition(values: Mapping[str, Any]) -> None:
    """Check that no option of a partition is given with sites.

    Raises:
        UserError: Names the first option that is not the default.
    """
    for name, default in PARTITION_OPTIONS.items():
        if values[name] != default:
            raise UserError(
                f"data.{name}: expected no value with data.{'sites' if values['sites'] else 'site_column'}, whose sites"
                f" are the clients, got {values[name]}. Omit it"
            )


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
