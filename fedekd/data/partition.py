"""Partition of samples across clients, and splits of a client's samples.

Pure functions: the same arguments and seed give the same indices. Index arrays are int64 in ascending order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

from fedekd.data.samples import Samples
from fedekd.data.stored import StoredInputs
from fedekd.data.tables import standardised
from fedekd.errors import UserError
from fedekd.global_state import exclusive
from fedekd.seeding import derive_seed

Indices = npt.NDArray[np.int64]
PartitionFunction = Callable[[Samples, int, float, int, int], list[Indices]]
"""(images, num_clients, alpha, seed, min_samples) -> one index array per client."""

MAX_DRAWS = 10_000
_DRAWS_AT_ONCE = 100


def dirichlet_label_partition(
    labels: npt.ArrayLike, num_clients: int, alpha: float, seed: int, min_samples: int = 10
) -> list[Indices]:
    r"""Partition by label skew: Dirichlet proportions of each class.

    Each class c is split in proportions $p_c \sim \mathrm{Dir}(\alpha, ..., \alpha)$ over the clients. The proportions
    of all classes are redrawn, up to 10,000 times, until every client has at least `min_samples` samples.

    Args:
        labels: Class of each sample, shape (N,).
        num_clients: Number of clients K, at least 1.
        alpha: Concentration, above 0. Small values concentrate a class on few clients; large values approach iid.
        seed: Seed of proportions and shuffling.
        min_samples: Smallest number of samples per client. Default 10.

    Returns:
        K index arrays, a partition of range(N).

    Raises:
        UserError: If an argument is out of range, or no draw gives every client enough samples.

    Reference:
        FedeKD (arXiv 2605.05553), Appendix G; Hsu et al. (arXiv 1909.06335).

    Example:
        >>> labels = [0] * 50 + [1] * 50
        >>> parts = dirichlet_label_partition(labels, num_clients=3, alpha=0.5, seed=0)
        >>> sorted(int(i) for part in parts for i in part) == list(range(100))
        True
    """
    classes = np.asarray(labels)
    if classes.ndim != 1:
        raise ValueError(f"labels: expected shape (N,), got {classes.shape}")
    _check_clients(len(classes), num_clients, min_samples)
    if not (alpha > 0 and np.isfinite(alpha)):
        raise UserError(f"data.alpha: expected a finite number above 0, got {alpha}")
    values, sizes = np.unique(classes, return_counts=True)
    cuts = _draw_cuts(sizes, num_clients, alpha, seed, min_samples)
    rng = np.random.default_rng(derive_seed(seed, "partition", "shuffle"))
    client_parts: list[list[Indices]] = [[] for _ in range(num_clients)]
    for value, cut in zip(values, cuts, strict=True):
        members = rng.permutation(np.flatnonzero(classes == value))
        for client, part in enumerate(np.split(members, cut)):
            client_parts[client].append(part)
    return [np.sort(np.concatenate(parts)) for parts in client_parts]


def dirichlet_cluster_partition(
    features: npt.ArrayLike,
    num_clients: int,
    alpha: float,
    seed: int,
    num_clusters: int = 5,
    min_samples: int = 10,
) -> list[Indices]:
    """Partition by covariate shift: k-means clusters take the place of classes.

    Args:
        features: Features of each sample, shape (N, ...); flattened, compared by Euclidean distance.
        num_clients: Number of clients K, at least 1.
        alpha: Concentration, above 0.
        seed: Seed of the clustering (k-means++, one start), proportions and shuffling.
        num_clusters: Number of clusters B, at most N. Default 5.
        min_samples: Smallest number of samples per client. Default 10.

    Returns:
        K index arrays, a partition of range(N).

    Raises:
        UserError: As `dirichlet_label_partition`, or if there are fewer samples than clusters.

    Reference:
        FedeKD (arXiv 2605.05553), Appendix G.
    """
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]  # comes with scikit-learn

    rows = np.asarray(features)
    rows = rows.reshape(len(rows), -1).astype(np.float32)
    _check_clients(len(rows), num_clients, min_samples)
    if len(rows) < num_clusters:
        raise UserError(
            f"data.partition: expected at least {num_clusters} samples for {num_clusters} clusters, got {len(rows)}"
        )
    random_state = derive_seed(seed, "partition", "kmeans") % 2**32
    # Several threads sum a cluster's centre in varying order, which changes the last bits.
    with exclusive(), threadpool_limits(limits=1):
        clusters = KMeans(num_clusters, n_init=1, random_state=random_state, copy_x=False).fit_predict(rows)
    return dirichlet_label_partition(clusters, num_clients, alpha, seed, min_samples)


def iid_partition(num_samples: int, num_clients: int, seed: int, min_samples: int = 10) -> list[Indices]:
    """Partition without skew: a permutation in parts whose sizes differ by at most 1.

    Args:
        num_samples: Number of samples N.
        num_clients: Number of clients K, at least 1.
        seed: Seed of the permutation.
        min_samples: Smallest number of samples per client. Default 10.

    Returns:
        K index arrays, a partition of range(N).

    Raises:
        UserError: If there are too few samples for the clients.
    """
    _check_clients(num_samples, num_clients, min_samples)
    rng = np.random.default_rng(derive_seed(seed, "partition", "iid"))
    return [np.sort(part) for part in np.array_split(rng.permutation(num_samples), num_clients)]


def split_indices(
    indices: npt.ArrayLike,
    fractions: Sequence[float] = (0.6, 0.2, 0.2),
    seed: int = 0,
    groups: npt.ArrayLike | None = None,
) -> tuple[Indices, Indices, Indices]:
    """Split a client's samples at random into training, validation and test.

    The sizes follow the rounded cumulative fractions; training and test have at least one sample each. With groups, no
    group is in two splits, and the sizes are the nearest that whole groups in random order allow.

    Args:
        indices: Samples of the client, shape (n,), n at least 2.
        fractions: Fractions of training, validation and test; they sum to 1, only validation may be 0. Default
            (0.6, 0.2, 0.2).
        seed: Seed of the permutation. Default 0.
        groups: Group of each sample, shape (n,), at least 2 different ones. Default: each sample is a group.

    Returns:
        Training, validation and test, a partition of `indices`.

    Raises:
        UserError: If the fractions are invalid, or there are fewer than 2 samples or groups.

    Example:
        >>> [len(part) for part in split_indices(range(10))]
        [6, 2, 2]
        >>> [part.tolist() for part in split_indices(range(10), groups=[0, 0, 1, 1, 2, 2, 3, 3, 4, 4])]
        [[0, 1, 2, 3, 6, 7], [8, 9], [4, 5]]
    """
    check_fractions(fractions)
    samples = np.asarray(indices, dtype=np.int64)
    units = _units(samples, groups)
    if len(units) < 2:
        what = "samples" if groups is None else "groups"
        raise UserError(
            f"data.min_samples: expected clients with at least 2 {what}, to train and test, got a client with"
            f" {len(units)}"
        )
    return _cut(units, [float(share) for share in np.cumsum(fractions)[:2]], seed, "split", keep_ends=True)


def cut_validation(
    validation: npt.ArrayLike, seed: int, groups: npt.ArrayLike | None = None
) -> tuple[Indices, Indices, Indices]:
    """Split a client's validation samples at random into thirds.

    Tuning: thresholds and choices. Calibration: exits and conformal sets. Holdout: do-no-harm. With fewer than 3
    samples or groups some parts are empty.

    Args:
        validation: Validation samples of the client, shape (n,).
        seed: Seed of the permutation.
        groups: Group of each sample, shape (n,); no group is in two parts. Default: each sample is a group.

    Returns:
        Tuning, calibration and holdout, a partition of `validation`; without groups the sizes differ by at most 1.

    Example:
        >>> [len(part) for part in cut_validation(range(11), seed=0)]
        [4, 3, 4]
    """
    return _cut(_units(np.asarray(validation, dtype=np.int64), groups), [1 / 3, 2 / 3], seed, "validation")


def partition_groups(partition: PartitionFunction, samples: Samples, *arguments: Any) -> list[Indices]:
    """Partition whole groups across clients.

    Each group is assigned like its first sample; the smallest number of samples of a client counts groups.

    Args:
        partition: A function like those in `PARTITIONS`.
        samples: The samples, with groups.
        *arguments: Number of clients, alpha, seed and smallest number of samples.

    Returns:
        One index array per client.
    """
    groups = np.asarray(samples.group)
    _, first, number = np.unique(groups, return_index=True, return_inverse=True)
    parts = checked_parts(partition(samples.take(first), *arguments), arguments[0], len(first))
    return [np.flatnonzero(np.isin(number, part)) for part in parts]


def checked_parts(parts: Any, num_clients: int, num_samples: int) -> list[Indices]:
    """Validate the result of a partition function.

    Args:
        parts: One sequence of sample indices per client.
        num_clients: Number of clients K.
        num_samples: Number of samples N.

    Returns:
        K index arrays, int64.

    Raises:
        UserError: If the parts are not K non-empty, disjoint sequences of integers in 0..N-1.
    """
    expected = (
        "data.partition: expected a function (images, num_clients, alpha, seed, min_samples) -> "
        f"{num_clients} arrays (data.num_clients) of distinct indices in 0..{num_samples - 1}, got"
    )
    if isinstance(parts, str | bytes | Mapping | Set) or not isinstance(parts, Iterable):
        raise UserError(f"{expected} a {type(parts).__name__}")
    arrays: list[Indices] = []
    for client, part in enumerate(islice(parts, num_clients + 1)):
        try:
            array = np.asarray(part)
        except Exception as error:  # ragged lists, objects of a user
            raise UserError(f"{expected} a {type(part).__name__} for client {client}") from error
        if array.ndim != 1:
            raise UserError(f"{expected} shape {array.shape} for client {client}")
        if len(array) and array.dtype.kind not in "iu":
            raise UserError(f"{expected} values of type {array.dtype} for client {client}")
        if wrong := [int(value) for value in array[(array < 0) | (array >= num_samples)][:1]]:
            raise UserError(f"{expected} the index {wrong[0]} for client {client}")
        arrays.append(array.astype(np.int64))
    if len(arrays) != num_clients:
        raise UserError(f"{expected} {'more' if len(arrays) > num_clients else len(arrays)} arrays")
    if empty := [client for client, array in enumerate(arrays) if not len(array)]:
        raise UserError(f"{expected} no index for client {empty[0]}")
    values, counts = np.unique(np.concatenate(arrays), return_counts=True)
    if counts.max() > 1:
        repeated = values[counts.argmax()]
        owners = [client for client, array in enumerate(arrays) if (array == repeated).any()]
        raise UserError(f"{expected} the index {repeated} {counts.max()} times (clients {str(owners[:10])[1:-1]})")
    return arrays


def check_fractions(fractions: Sequence[float]) -> None:
    """Validate the fractions of training, validation and test.

    Raises:
        UserError: If they are not three finite numbers that sum to 1, training and test above 0, validation at
            least 0.
    """
    values = list(fractions)
    sum_to_one = len(values) == 3 and bool(np.isfinite(values).all()) and abs(sum(values) - 1) < 1e-6
    if not (sum_to_one and values[0] > 0 and values[1] >= 0 and values[2] > 0):
        raise UserError(
            "data.fractions: expected three numbers for training, validation and test that sum to 1, such as "
            f"[0.6, 0.2, 0.2], of which only validation may be 0, got {values}"
        )


def _check_clients(num_samples: int, num_clients: int, min_samples: int) -> None:
    if num_clients < 1:
        raise UserError(f"data.num_clients: expected at least 1, got {num_clients}")
    if num_clients > num_samples:
        raise UserError(f"data.num_clients: expected at most {num_samples} (number of samples), got {num_clients}")
    if num_clients * min_samples > num_samples:
        raise UserError(
            f"data.min_samples: expected at most {num_samples // num_clients} ({num_samples} samples, {num_clients} "
            f"clients), got {min_samples}. Lower data.min_samples or data.num_clients."
        )


def _draw_cuts(
    sizes: npt.NDArray[Any], num_clients: int, alpha: float, seed: int, min_samples: int
) -> npt.NDArray[np.int64]:
    """Return the cuts of each class, shape (classes, K - 1), of the first valid draw.

    Draws work on counts, not samples: 10,000 of them take a fraction of a second.
    """
    rng = np.random.default_rng(derive_seed(seed, "partition", "proportions"))
    concentration = np.full(num_clients, alpha)
    best = 0
    for _ in range(MAX_DRAWS // _DRAWS_AT_ONCE):
        proportions = rng.dirichlet(concentration, size=(_DRAWS_AT_ONCE, len(sizes)))
        edges = np.rint(np.cumsum(proportions, axis=-1) * sizes[:, None]).astype(np.int64)
        smallest = np.diff(edges, axis=-1, prepend=0).sum(axis=1).min(axis=-1)
        valid = np.flatnonzero(smallest >= min_samples)
        if len(valid):
            return np.asarray(edges[valid[0], :, :-1])
        best = max(best, int(smallest.max()))
    raise UserError(
        f"data.min_samples: no draw of {MAX_DRAWS} with data.alpha={alpha} gives each of {num_clients} clients "
        f"{min_samples} samples (best: {best}). Lower data.min_samples or data.num_clients, raise data.alpha, or "
        "change the seed."
    )


def _units(samples: Indices, groups: npt.ArrayLike | None) -> list[Indices]:
    """Return the samples of each group, in the order of their first samples."""
    if groups is None:
        return list(samples[:, None])
    _, first, number, sizes = np.unique(groups, return_index=True, return_inverse=True, return_counts=True)
    units = np.split(samples[np.argsort(number, kind="stable")], np.cumsum(sizes)[:-1])
    return [units[group] for group in np.argsort(first)]


def _cut(
    units: list[Indices], shares: list[float], seed: int, purpose: str, keep_ends: bool = False
) -> tuple[Indices, Indices, Indices]:
    """Cut units in random order into three parts at cumulative shares of the samples.

    Args:
        units: Samples of each unit.
        shares: Cumulative shares of the first and of the first two parts.
        seed: Seed of the order.
        purpose: Enters the seed.
        keep_ends: Give the first and the last part at least one unit.
    """
    order = np.random.default_rng(derive_seed(seed, purpose)).permutation(len(units))
    ends = np.cumsum([0, *(len(units[unit]) for unit in order)])
    first, second = (int(np.abs(ends - _rounded(share * ends[-1])).argmin()) for share in shares)
    if keep_ends:
        first = min(max(first, 1), len(units) - 1)
        second = min(max(second, first), len(units) - 1)
    parts = (order[:first], order[first:second], order[second:])
    one, two, three = (
        np.sort(np.concatenate([units[unit] for unit in part])) if len(part) else np.empty(0, np.int64)
        for part in parts
    )
    return one, two, three


def _rounded(size: float) -> int:
    # Halves are rounded up; 1e-9 absorbs the rounding error of sums such as 0.7 + 0.1.
    return int(np.floor(size + 0.5 + 1e-9))


def _by_label(images: Samples, num_clients: int, alpha: float, seed: int, min_samples: int) -> list[Indices]:
    return dirichlet_label_partition(images.labels.numpy(), num_clients, alpha, seed, min_samples)


def _by_cluster(images: Samples, num_clients: int, alpha: float, seed: int, min_samples: int) -> list[Indices]:
    # Unscaled pixels: scaling to [-1, 1] would need a copy and changes no cluster.
    if isinstance(images.inputs, StoredInputs):
        raise UserError(
            "data.partition: expected label, iid or a function for inputs that are not in memory, got cluster, which"
            " compares all of them"
        )
    inputs: Any = standardised(images).inputs
    return dirichlet_cluster_partition(inputs.numpy(), num_clients, alpha, seed, min_samples=min_samples)


def _iid(images: Samples, num_clients: int, alpha: float, seed: int, min_samples: int) -> list[Indices]:
    return iid_partition(len(images), num_clients, seed, min_samples)


PARTITIONS: dict[str, PartitionFunction] = {"label": _by_label, "cluster": _by_cluster, "iid": _iid}
"""Partitions by name. Other functions of this signature are given by their import path."""
