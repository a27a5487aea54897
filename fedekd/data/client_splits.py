"""The samples of one client and their splits."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import combinations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedekd.data.partition import Indices, cut_validation, split_indices
from fedekd.data.raw import SPLITS
from fedekd.data.samples import Samples, content_digest
from fedekd.errors import UserError, shorten
from fedekd.seeding import derive_seed


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
        name: Name of the site that is the client; None for a client of a partition.
        target_shift: Added to the outputs in the unit of the targets, after `target_scale`; real-valued targets only.
        target_scale: Factor from the outputs of networks to the unit of the targets; real-valued targets only.
    """

    client: int
    train: Tensor
    validation: Tensor
    test: Tensor
    tuning: Tensor
    calibration: Tensor
    holdout: Tensor
    name: str | None = field(default=None, kw_only=True)
    target_shift: float = field(default=0.0, kw_only=True)
    target_scale: float = field(default=1.0, kw_only=True)

    @property
    def title(self) -> str:
        """Name of the client in messages and tables: that of its site, or its number."""
        return str(self.client) if self.name is None else self.name

    @property
    def label(self) -> str:
        """Client in sentences: `client 3`, or `site 'cleveland'`."""
        return client_label(self.client, self.name)

    def __len__(self) -> int:
        return len(self.train) + len(self.validation) + len(self.test)

    def digest(self, samples: Samples) -> str:
        """Return the SHA-256 (hex) of the inputs and targets of all splits, in order.

        Independent of the positions of the samples in the data set: a cache key for results of this client's data.
        """
        return content_digest(samples, [self.train, self.validation, self.test])

    def validation_digest(self, samples: Samples) -> str:
        """Return the SHA-256 (hex) of tuning, calibration and holdout, in order."""
        return content_digest(samples, [self.tuning, self.calibration, self.holdout])


def client_label(client: int, name: str | None) -> str:
    """Return a client in sentences: `client 3`, or `site 'cleveland'`."""
    return f"client {client}" if name is None else f"site {name!r}"


def split_client(
    client: int,
    indices: Indices,
    samples: Samples,
    fractions: tuple[float, float, float],
    seed: int,
    splits: str = "random",
    name: str | None = None,
) -> ClientSplits:
    """Split a client's samples into training, validation with its thirds, and test.

    Args:
        client: Number of the client; it enters the seeds of the splits.
        indices: Samples of the client, shape (n,).
        samples: The data set, with groups and given splits.
        fractions: Fractions of training, validation and test.
        seed: Seed of the data module.
        splits: `random`, or `given` for those in the data.
        name: Name of the site, if the client is one.

    Returns:
        The splits of the client.

    Raises:
        UserError: If the client has too few samples, or lacks a given split, or a group is in two given splits.
    """
    where = client_label(client, name)
    groups = None if samples.group is None else samples.group.numpy()
    if splits == "given":
        train, validation, test = _given_splits(where, indices, samples, groups)
    else:
        units = indices if groups is None else np.unique(groups[indices])
        if name is not None and len(units) < 2:
            raise UserError(
                f"data.sites: {where}: expected at least 2 {'samples' if groups is None else 'groups'}, to train and"
                f" test, got {len(units)}"
            )
        train, validation, test = split_indices(
            indices, fractions, derive_seed(seed, client, "split"), None if groups is None else groups[indices]
        )
    thirds = cut_validation(
        validation, derive_seed(seed, client, "validation"), None if groups is None else groups[validation]
    )
    parts = [torch.from_numpy(part) for part in (train, validation, test, *thirds)]
    return ClientSplits(client, *parts, name=name)


def _given_splits(
    where: str, indices: Indices, samples: Samples, groups: npt.NDArray[np.int64] | None
) -> tuple[Indices, Indices, Indices]:
    """Return the given training, validation and test samples of a client."""
    if samples.split is None:
        raise UserError("data.splits: expected random, because the data have no splits, got given")
    split = samples.split.numpy()[indices]
    train, validation, test = (indices[split == number] for number in range(len(SPLITS)))
    for part, title in ((train, "train"), (test, "test")):
        if not len(part):
            raise UserError(f"data.splits: {where}: expected samples in the split {title}, got none. Use random splits")
    if groups is not None:
        for one, other in combinations((train, validation, test), 2):
            if shared := np.intersect1d(groups[one], groups[other]).tolist():
                name = samples.group_names[shared[0]] if samples.group_names else str(shared[0])
                raise UserError(
                    f"data.splits: {where}: expected each group in one split, got {len(shared)} groups in two, such as"
                    f" {shorten(repr(name))}. Use random splits"
                )
    return train, validation, test
