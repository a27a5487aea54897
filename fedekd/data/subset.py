"""Random subset of a data set, and further test samples from the rest."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from fedekd.data.partition import Indices
from fedekd.errors import UserError
from fedekd.seeding import derive_seed


def draw_subset(num_samples: int, max_samples: int, seed: int, groups: npt.ArrayLike | None = None) -> Indices:
    """Draw samples without replacement, each with the same probability.

    Subsets of one seed are nested: a smaller one is contained in a larger one.

    Args:
        num_samples: Number of samples N.
        max_samples: Largest number of samples drawn, at least 1.
        seed: Seed of the draw.
        groups: Group of each sample, shape (N,). Whole groups are drawn in random order until the next one would exceed
            `max_samples`. Default: each sample is a group.

    Returns:
        Indices in ascending order; all N if `max_samples` is at least N.

    Raises:
        UserError: If the first group drawn is larger than `max_samples`.

    Example:
        >>> len(draw_subset(10, 4, seed=0)), draw_subset(3, 4, seed=0).tolist()
        (4, [0, 1, 2])
    """
    if max_samples >= num_samples:
        return np.arange(num_samples, dtype=np.int64)
    rng = np.random.default_rng(derive_seed(seed, "max_samples"))
    if groups is None:
        return np.sort(rng.permutation(num_samples)[:max_samples])
    _, number, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    order = rng.permutation(len(sizes))
    drawn = order[np.cumsum(sizes[order]) <= max_samples]
    if not len(drawn):
        raise UserError(
            f"data.max_samples: expected at least {sizes[order[0]]} (samples of the first group drawn), got"
            f" {max_samples}"
        )
    return np.flatnonzero(np.isin(number, drawn))


def draw_extra_test(
    labels: npt.NDArray[np.int64], pool: Indices, train: Sequence[Indices], size: int, seed: int
) -> list[Indices]:
    """Draw test samples of each client, with the class mix of its training.

    Each class gets its share of `size`, rounded by largest remainders. If the pool has fewer samples of a class than
    all clients need, each client gets the same fraction of its need, up to rounding.

    Args:
        labels: Class or grade of each sample, shape (N,).
        pool: Samples that no client owns, shape (n,).
        train: Training samples of each client.
        size: Largest number of samples drawn per client.
        seed: Seed of the draw.

    Returns:
        Indices of each client in ascending order; no sample is at two clients.

    Example:
        >>> labels = np.array([0, 1] * 10)
        >>> [part.tolist() for part in draw_extra_test(labels, np.arange(4, 20), [np.array([0, 1, 2])], 3, seed=0)]
        [[7, 10, 14]]
    """
    classes = int(labels.max()) + 1
    needs = np.stack([_shares(np.bincount(labels[part], minlength=classes), size) for part in train])
    parts: list[list[Indices]] = [[] for _ in train]
    for label in range(classes):
        rng = np.random.default_rng(derive_seed(seed, "extra_test", label))
        members = rng.permutation(pool[labels[pool] == label])
        ends = np.cumsum(needs[:, label])
        if ends[-1] > len(members):
            ends = ends * len(members) // ends[-1]
        for client, part in enumerate(np.split(members, ends)[:-1]):
            parts[client].append(part)
    return [np.sort(np.concatenate(part)) for part in parts]


def _shares(counts: npt.NDArray[np.int64], size: int) -> npt.NDArray[np.int64]:
    """Return integers in proportion to `counts` that sum to `size`."""
    shares, remainders = np.divmod(counts * size, counts.sum())
    shares[np.argsort(-remainders, kind="stable")[: size - shares.sum()]] += 1
    return shares
