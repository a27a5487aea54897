"""Checks of groups: in one split at all clients, and enough for the shares."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from fedekd.data.client_splits import ClientSplits
from fedekd.data.samples import Samples
from fedekd.errors import UserError, listed, shorten


def require_groups_in_one_split(samples: Samples, clients: Sequence[ClientSplits]) -> None:
    """Check that each group is in one of the given splits at all sites.

    Raises:
        UserError: Gives the number of such groups and the name of one.
    """
    apart = _groups_apart(samples, clients)
    if len(apart):
        raise UserError(
            f"data.splits: expected each group in one split at all sites, got {len(apart)} groups in several, such as"
            f" {_name(samples, apart[0])}. Correct the splits in the data"
        )


def group_warnings(
    samples: Samples, clients: Sequence[ClientSplits], fractions: Sequence[float], splits: str = "random"
) -> list[str]:
    """Return lines on groups at several sites, and on splits far from their shares.

    Splits are drawn at each client by itself, because a site does not know the groups of others. A group that is at two
    sites may therefore be in training at one and in the test of the other.

    Args:
        samples: The samples.
        clients: Splits of all clients.
        fractions: Requested fractions of training, validation and test.
        splits: `random` or `given`; the shares of given splits are not compared.
    """
    if samples.group is None:
        return []
    lines = []
    apart = _groups_apart(samples, clients)
    if len(apart):
        group = samples.group.numpy()
        sites = sum(bool(np.isin(group[np.concatenate(_parts(client))], apart).any()) for client in clients)
        lines.append(
            f"data.group_column: {len(apart)} of {len(np.unique(group))} groups are in different splits at {sites}"
            f" sites, such as {_name(samples, apart[0])}, so that scores may be too high. Give a split column and"
            " --data.splits given"
        )
    far = [] if splits == "given" else [client for client in clients if _is_far(client, fractions)]
    if far:
        sizes = listed(
            f"{client.title!r} ({len(client.train)}/{len(client.validation)}/{len(client.test)})" for client in far
        )
        lines.append(
            "data.group_column: groups are too few or too unequal for --data.fractions; samples in"
            f" training/validation/test: {sizes}"
        )
    return lines


def _groups_apart(samples: Samples, clients: Sequence[ClientSplits]) -> npt.NDArray[np.int64]:
    """Return the groups that are in several splits of all clients together."""
    if samples.group is None:
        return np.empty(0, np.int64)
    group = samples.group.numpy()
    splits = [np.concatenate(parts) for parts in zip(*map(_parts, clients), strict=True)]
    groups, counts = np.unique(np.concatenate([np.unique(group[split]) for split in splits]), return_counts=True)
    return np.asarray(groups[counts > 1])


def _parts(client: ClientSplits) -> tuple[npt.NDArray[np.int64], ...]:
    return client.train.numpy(), client.validation.numpy(), client.test.numpy()


def _is_far(client: ClientSplits, fractions: Sequence[float]) -> bool:
    """Return True for an empty validation, or training below half of its share."""
    has_no_validation = fractions[1] > 0 and not len(client.validation)
    return has_no_validation or len(client.train) < fractions[0] * len(client) / 2


def _name(samples: Samples, group: int) -> str:
    return shorten(repr(samples.group_names[group] if samples.group_names else str(group)))
