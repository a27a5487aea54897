"""How samples are dealt to clients, and how a client's samples are split.

Every function here is a pure function of its arguments: the same seed gives the same indices again.
All index arrays are int64 and sorted ascending.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fedekd.data.images import ImageData
from fedekd.errors import UserError
from fedekd.seeding import derive_seed

Indices = npt.NDArray[np.int64]
PartitionFunction = Callable[[ImageData, int, float, int, int], list[Indices]]
"""(images, num_clients, alpha, seed, min_samples) -> one index array a client."""

MAX_DRAWS = 10_000
_DRAWS_AT_ONCE = 100


def dirichlet_label_partition(
    labels: npt.ArrayLike, num_clients: int, alpha: float, seed: int, min_samples: int = 10
) -> list[Indices]:
    """Label skew: every class is dealt to the clients in proportions drawn from Dir(alpha, ..., alpha).

    Proportions are drawn anew for all classes, up to 10,000 times, until every client has `min_samples`
    samples; so this is the Dirichlet partition given that no client is smaller.

    Args:
        labels: Class of each sample, shape (N,).
        num_clients: Number of clients K.
        alpha: Concentration, over 0. Small: a class lies with few clients; large: all clients are alike.
        seed: Seed of proportions and shuffling.
        min_samples: Fewest samples a client may have.

    Returns:
        K index arrays, a partition of range(N).

    Raises:
        UserError: If an argument is out of range, or no draw gave every client enough samples.

    Source: FedeKD (arXiv 2605.05553), Appendix G; the scheme of Hsu et al. (arXiv 1909.06335).

    Example:
        >>> labels = [0] * 50 + [1] * 50
        >>> parts = dirichlet_label_partition(labels, num_clients=3, alpha=0.5, seed=0)
        >>> sorted(int(i) for part in parts for i in part) == list(range(100))
        True
    """
    classes = np.asarray(labels)
    if classes.ndim != 1:
        raise ValueError(f"labels have the shape {classes.shape}; they need one dimension")
    _check_clients(len(classes), num_clients, min_samples)
    if not (alpha > 0 and np.isfinite(alpha)):
        raise UserError(f"data.alpha={alpha}: the Dirichlet concentration must be a finite number over 0")
    values, sizes = np.unique(classes, return_counts=True)
    cuts = _draw_cuts(sizes, num_clients, alpha, seed, min_samples)
    rng = np.random.default_rng(derive_seed(seed, "partition", "shuffle"))
    dealt: list[list[Indices]] = [[] for _ in range(num_clients)]
    for value, cut in zip(values, cuts, strict=True):
        members = rng.permutation(np.flatnonzero(classes == value))
        for client, part in enumerate(np.split(members, cut)):
            dealt[client].append(part)
    return [np.sort(np.concatenate(parts)) for parts in dealt]


def dirichlet_cluster_partition(
    features: npt.ArrayLike,
    num_clients: int,
    alpha: float,
    seed: int,
    num_clusters: int = 5,
    min_samples: int = 10,
) -> list[Indices]:
    """Covariate shift: k-means clusters of the features are dealt as classes are in label skew.

    Args:
        features: Features of each sample, shape (N, ...); flattened, compared by Euclidean distance.
        num_clients: Number of clients K.
        alpha: Concentration, over 0.
        seed: Seed of the clustering (k-means++, one start), proportions and shuffling.
        num_clusters: Number of clusters B.
        min_samples: Fewest samples a client may have.

    Returns:
        K index arrays, a partition of range(N).

    Raises:
        UserError: As `dirichlet_label_partition`, or if there are fewer samples than clusters.

    Source: FedeKD (arXiv 2605.05553), Appendix G.
    """
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]  # comes with scikit-learn

    rows = np.asarray(features)
    rows = rows.reshape(len(rows), -1).astype(np.float32)
    _check_clients(len(rows), num_clients, min_samples)
    if len(rows) < num_clusters:
        raise UserError(f"data.partition: {len(rows)} samples cannot form {num_clusters} clusters")
    random_state = derive_seed(seed, "partition", "kmeans") % 2**32
    # Threads add up a cluster's centre in the order in which they finish; one thread has one order.
    with threadpool_limits(limits=1):
        clusters = KMeans(num_clusters, n_init=1, random_state=random_state, copy_x=False).fit_predict(rows)
    return dirichlet_label_partition(clusters, num_clients, alpha, seed, min_samples)


def iid_partition(num_samples: int, num_clients: int, seed: int, min_samples: int = 10) -> list[Indices]:
    """No skew: samples are permuted and cut into parts that differ in size by at most one.

    Args:
        num_samples: Number of samples N.
        num_clients: Number of clients K.
        seed: Seed of the permutation.
        min_samples: Fewest samples a client may have.

    Returns:
        K index arrays, a partition of range(N).

    Raises:
        UserError: If there are too few samples for the clients.
    """
    _check_clients(num_samples, num_clients, min_samples)
    rng = np.random.default_rng(derive_seed(seed, "partition", "iid"))
    return [np.sort(part) for part in np.array_split(rng.permutation(num_samples), num_clients)]


def split_indices(
    indices: npt.ArrayLike, fractions: Sequence[float] = (0.6, 0.2, 0.2), seed: int = 0
) -> tuple[Indices, Indices, Indices]:
    """Permute a client's samples and cut them into training, validation and test.

    The cuts lie at the rounded cumulative fractions, moved where needed so that training and test have at
    least one sample each.

    Args:
        indices: The client's samples, shape (n,), n at least 2.
        fractions: Shares of training, validation and test; they sum to 1, only validation may be 0.
        seed: Seed of the permutation.

    Returns:
        Three disjoint index arrays that together hold all of `indices`.

    Raises:
        UserError: If the fractions are not as described, or there are fewer than 2 samples.

    Example:
        >>> [len(part) for part in split_indices(range(10))]
        [6, 2, 2]
    """
    check_fractions(fractions)
    samples = np.asarray(indices, dtype=np.int64)
    n = len(samples)
    if n < 2:
        raise UserError(f"data.min_samples: a client with {n} samples cannot train and test; at least 2 are needed")
    first, second = (_rounded(n * share) for share in np.cumsum(fractions)[:2])
    first = min(max(first, 1), n - 1)
    second = min(max(second, first), n - 1)
    return _cut(samples, [first, second], seed, "split")


def cut_validation(validation: npt.ArrayLike, seed: int) -> tuple[Indices, Indices, Indices]:
    """Cut a client's validation samples into selection, calibration and certificate: thirds, by seed.

    Thresholds and choices are tuned on selection, exits and conformal sets calibrated on calibration, and
    do-no-harm is decided on certificate. Of fewer than 3 samples some of the parts are empty.

    Args:
        validation: The client's validation samples, shape (n,).
        seed: Seed of the permutation.

    Returns:
        Three disjoint index arrays that together hold all of `validation`; sizes differ by at most one.

    Example:
        >>> [len(part) for part in cut_validation(range(11), seed=0)]
        [4, 3, 4]
    """
    samples = np.asarray(validation, dtype=np.int64)
    n = len(samples)
    return _cut(samples, [_rounded(n / 3), _rounded(n * 2 / 3)], seed, "validation")


def check_fractions(fractions: Sequence[float]) -> None:
    """Raise a UserError unless these are shares of training, validation and test.

    Raises:
        UserError: If they are not three finite numbers that sum to 1, training and test over 0, validation 0
            or more.
    """
    shares = list(fractions)
    fits = len(shares) == 3 and bool(np.isfinite(shares).all()) and abs(sum(shares) - 1) < 1e-6
    if not (fits and shares[0] > 0 and shares[1] >= 0 and shares[2] > 0):
        raise UserError(
            f"data.fractions={shares}: give three shares, training, validation and test, that sum to 1, "
            "such as [0.6, 0.2, 0.2]; only validation may be 0"
        )


def _check_clients(num_samples: int, num_clients: int, min_samples: int) -> None:
    if num_clients < 1:
        raise UserError(f"data.num_clients={num_clients}: at least 1 client is needed")
    if num_clients > num_samples:
        raise UserError(f"data.num_clients={num_clients}: more clients than samples; the data set has {num_samples}")
    if num_clients * min_samples > num_samples:
        raise UserError(
            f"data.min_samples={min_samples}: {num_samples} samples cannot give {num_clients} clients "
            f"(data.num_clients) as many each; at most {num_samples // num_clients}"
        )


def _draw_cuts(
    sizes: npt.NDArray[Any], num_clients: int, alpha: float, seed: int, min_samples: int
) -> npt.NDArray[np.int64]:
    """Where each class is cut, shape (classes, K - 1): the first draw that leaves no client too small.

    A draw touches counts only, no samples, so ten thousand of them take a fraction of a second.
    """
    rng = np.random.default_rng(derive_seed(seed, "partition", "proportions"))
    concentration = np.full(num_clients, alpha)
    best = 0
    for _ in range(MAX_DRAWS // _DRAWS_AT_ONCE):
        proportions = rng.dirichlet(concentration, size=(_DRAWS_AT_ONCE, len(sizes)))
        edges = np.rint(np.cumsum(proportions, axis=-1) * sizes[:, None]).astype(np.int64)
        fewest = np.diff(edges, axis=-1, prepend=0).sum(axis=1).min(axis=-1)
        enough = np.flatnonzero(fewest >= min_samples)
        if len(enough):
            return np.asarray(edges[enough[0], :, :-1])
        best = max(best, int(fewest.max()))
    raise UserError(
        f"data.min_samples={min_samples}: none of {MAX_DRAWS} draws with data.alpha={alpha} gave each of "
        f"{num_clients} clients (data.num_clients) as many samples (best: {best}); lower data.min_samples "
        "or data.num_clients, raise data.alpha, or take another seed"
    )


def _cut(samples: Indices, cuts: list[int], seed: int, purpose: str) -> tuple[Indices, Indices, Indices]:
    shuffled = np.random.default_rng(derive_seed(seed, purpose)).permutation(samples)
    first, second, third = (np.sort(part) for part in np.split(shuffled, cuts))
    return first, second, third


def _rounded(share: float) -> int:
    # Halves go up. The small term takes up the rounding error of sums such as 0.7 + 0.1.
    return int(np.floor(share + 0.5 + 1e-9))


def _by_label(images: ImageData, num_clients: int, alpha: float, seed: int, min_samples: int) -> list[Indices]:
    return dirichlet_label_partition(images.labels.numpy(), num_clients, alpha, seed, min_samples)


def _by_cluster(images: ImageData, num_clients: int, alpha: float, seed: int, min_samples: int) -> list[Indices]:
    # Pixels unscaled, which spares a copy: mapping them to [-1, 1] changes no cluster.
    pixels = images.pixels.numpy()
    return dirichlet_cluster_partition(pixels, num_clients, alpha, seed, min_samples=min_samples)


def _iid(images: ImageData, num_clients: int, alpha: float, seed: int, min_samples: int) -> list[Indices]:
    return iid_partition(len(images), num_clients, seed, min_samples)


PARTITIONS: dict[str, PartitionFunction] = {"label": _by_label, "cluster": _by_cluster, "iid": _iid}
"""Partitions by name. Any other function of the same signature is given by its dotted import path."""
