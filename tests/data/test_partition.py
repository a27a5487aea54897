from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedekd.data import (
    PARTITIONS,
    ImageData,
    cut_validation,
    dirichlet_cluster_partition,
    dirichlet_label_partition,
    iid_partition,
    split_indices,
)
from fedekd.errors import UserError

LABELS = np.repeat(np.arange(10), 60)
FEATURES = np.random.default_rng(0).normal(size=(120, 2, 3)) + 20 * (np.arange(120) % 5)[:, None, None]


def assert_partition(parts: list[npt.NDArray[np.int64]], num_samples: int, num_clients: int) -> None:
    assert len(parts) == num_clients
    assert sorted(np.concatenate(parts).tolist()) == list(range(num_samples))
    for part in parts:
        assert part.dtype == np.int64
        assert (np.diff(part) > 0).all()


@settings(deadline=None, max_examples=30)
@given(
    classes=st.lists(st.integers(0, 6), min_size=1, max_size=200),
    num_clients=st.integers(1, 8),
    alpha=st.floats(0.05, 100),
    seed=st.integers(-(2**63), 2**63),
    min_samples=st.integers(0, 3),
)
def test_label_partition_deals_every_sample_once(
    classes: list[int], num_clients: int, alpha: float, seed: int, min_samples: int
) -> None:
    try:
        parts = dirichlet_label_partition(classes, num_clients, alpha, seed, min_samples)
    except UserError:  # one client takes everything
        possible = num_clients == 1 and len(classes) >= min_samples
        if possible:
            raise
        return
    assert_partition(parts, len(classes), num_clients)
    assert min(map(len, parts)) >= min_samples


@given(num_samples=st.integers(1, 200), num_clients=st.integers(1, 20), seed=st.integers(0, 9))
def test_iid_partition_is_even(num_samples: int, num_clients: int, seed: int) -> None:
    if num_clients > num_samples:
        return
    parts = iid_partition(num_samples, num_clients, seed, min_samples=0)
    assert_partition(parts, num_samples, num_clients)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


PARTITIONERS: dict[str, Callable[[int], list[npt.NDArray[np.int64]]]] = {
    "label": lambda seed: dirichlet_label_partition(LABELS, 6, 0.3, seed),
    "cluster": lambda seed: dirichlet_cluster_partition(FEATURES, 3, 0.5, seed),
    "iid": lambda seed: iid_partition(600, 6, seed),
}


@pytest.mark.parametrize("name", PARTITIONERS)
def test_the_seed_decides(name: str) -> None:
    one, again, other = (PARTITIONERS[name](seed) for seed in (0, 0, 1))
    assert all(np.array_equal(a, b) for a, b in zip(one, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(("num_clients", "alpha"), [(6, 0.1), (20, 0.1), (2, 0.05)])
def test_every_client_has_min_samples(num_clients: int, alpha: float) -> None:
    for seed in range(20):
        parts = dirichlet_label_partition(LABELS, num_clients, alpha, seed, min_samples=10)
        assert min(map(len, parts)) >= 10


def test_members_of_a_class_are_shuffled() -> None:
    parts = dirichlet_label_partition(np.zeros(1000, int), 2, 10.0, seed=0)
    assert any(np.diff(part).max() > 1 for part in parts)
    assert parts[0].max() > parts[1].min()


def test_shares_of_a_class_are_dirichlet() -> None:
    """Mean 1/K and variance (1/K)(1 - 1/K) / (K alpha + 1) of the share of one client, over seeds."""
    num_clients, alpha = 4, 0.5
    shares = np.array(
        [
            [len(part) / 1000 for part in dirichlet_label_partition(np.zeros(1000, int), num_clients, alpha, seed, 0)]
            for seed in range(400)
        ]
    )
    np.testing.assert_allclose(shares.mean(0), 1 / num_clients, atol=0.06)
    expected = (1 / num_clients) * (1 - 1 / num_clients) / (num_clients * alpha + 1)
    np.testing.assert_allclose(shares.var(0).mean(), expected, rtol=0.15)


def test_classes_are_drawn_independently() -> None:
    labels = np.repeat([0, 1], 1000)
    shares = np.array(
        [
            [np.mean(labels[part] == c) * len(part) for c in (0, 1)]
            for seed in range(300)
            for part in dirichlet_label_partition(labels, 4, 0.5, seed, 0)[:1]
            if len(part)
        ]
    )
    assert abs(np.corrcoef(shares.T)[0, 1]) < 0.2


def _skew(alpha: float) -> float:
    """Mean over seeds and clients of the share of the largest class."""
    return float(
        np.mean(
            [
                np.bincount(LABELS[part]).max() / len(part)
                for seed in range(10)
                for part in dirichlet_label_partition(LABELS, 6, alpha, seed)
            ]
        )
    )


def test_small_alpha_is_more_skewed() -> None:
    skews = [_skew(alpha) for alpha in (0.1, 0.5, 5.0, 1000.0)]
    assert skews == sorted(skews, reverse=True)
    assert skews[0] > 0.4
    assert skews[-1] < 0.15


def test_clusters_are_dealt_like_classes() -> None:
    cluster_of = np.arange(120) % 5
    by_cluster = dirichlet_cluster_partition(FEATURES, 3, 0.05, seed=0, min_samples=10)
    assert_partition(by_cluster, 120, 3)
    skewed = np.mean([np.bincount(cluster_of[part]).max() / len(part) for part in by_cluster])
    even = np.mean([np.bincount(cluster_of[part]).max() / len(part) for part in iid_partition(120, 3, 0)])
    assert skewed > even + 0.15


def test_clusters_are_found() -> None:
    """With alpha near 0 a cluster goes to one client whole, so no two clients share one."""
    for seed in range(10):
        parts = dirichlet_cluster_partition(FEATURES, 2, 1e-6, seed)
        assert set(parts[0] % 5).isdisjoint(parts[1] % 5)


def test_clusters_ignore_scale_and_shape() -> None:
    flat = dirichlet_cluster_partition(FEATURES.reshape(120, 6) * 4, 3, 0.5, seed=0)
    parts = dirichlet_cluster_partition(FEATURES, 3, 0.5, seed=0)
    assert all(np.array_equal(a, b) for a, b in zip(parts, flat, strict=True))


def test_features_are_left_as_they_are() -> None:
    features = FEATURES.astype(np.float32)
    before = features.copy()
    dirichlet_cluster_partition(features, 3, 0.5, seed=0)
    assert np.array_equal(features, before)


def test_table_of_partitions(blobs: ImageData) -> None:
    for function in PARTITIONS.values():
        assert_partition(function(blobs, 3, 1.0, 0, 10), 120, 3)
    by_label = PARTITIONS["label"](blobs, 3, 0.3, 0, 10)
    by_hand = dirichlet_label_partition(blobs.labels, 3, 0.3, 0, 10)
    assert all(np.array_equal(a, b) for a, b in zip(by_label, by_hand, strict=True))
    scaled = blobs.pixels.numpy() / 127.5 - 1
    by_cluster = PARTITIONS["cluster"](blobs, 3, 0.3, 0, 10)
    by_hand = dirichlet_cluster_partition(scaled, 3, 0.3, 0)
    assert all(np.array_equal(a, b) for a, b in zip(by_cluster, by_hand, strict=True))


@pytest.mark.parametrize(
    ("call", "texts"),
    [
        (lambda: dirichlet_label_partition(LABELS, 6, 0.0, 0), ["data.alpha=0.0", "over 0"]),
        (lambda: dirichlet_label_partition(LABELS, 6, -1, 0), ["data.alpha=-1"]),
        (lambda: dirichlet_label_partition(LABELS, 6, float("nan"), 0), ["data.alpha=nan"]),
        (lambda: dirichlet_label_partition(LABELS, 6, float("inf"), 0), ["data.alpha=inf"]),
        (lambda: dirichlet_label_partition(LABELS, 0, 0.1, 0), ["data.num_clients=0", "at least 1"]),
        (lambda: dirichlet_label_partition(LABELS, 601, 0.1, 0, 0), ["data.num_clients=601", "600"]),
        (
            lambda: dirichlet_label_partition(LABELS, 61, 9.0, 0),
            ["data.min_samples=10", "data.num_clients", "at most 9"],
        ),
        (
            lambda: dirichlet_label_partition([0] * 60, 6, 0.01, 0),
            [
                "data.min_samples=10",
                "data.alpha=0.01",
                "6 clients",
                "data.num_clients",
                "10000 draws",
                "another seed",
            ],
        ),
        (lambda: dirichlet_cluster_partition(FEATURES, 3, 0.0, 0), ["data.alpha=0.0"]),
        (
            lambda: dirichlet_cluster_partition(FEATURES[:4], 2, 1.0, 0, min_samples=1),
            ["4 samples", "5 clusters"],
        ),
        (lambda: iid_partition(5, 6, 0), ["data.num_clients=6", "5"]),
        (lambda: iid_partition(50, 6, 0), ["data.min_samples=10", "at most 8"]),
        (lambda: split_indices([7]), ["data.min_samples", "1 samples", "at least 2"]),
        (lambda: split_indices(range(9), (0.5, 0.5)), ["data.fractions=[0.5, 0.5]", "sum to 1"]),
        (lambda: split_indices(range(9), (0.5, 0.2, 0.2)), ["data.fractions", "sum to 1"]),
        (lambda: split_indices(range(9), (0.0, 0.5, 0.5)), ["data.fractions", "only validation may be 0"]),
        (lambda: split_indices(range(9), (0.8, 0.2, 0.0)), ["data.fractions", "only validation may be 0"]),
        (lambda: split_indices(range(9), (0.9, -0.2, 0.3)), ["data.fractions"]),
        (lambda: split_indices(range(9), (float("nan"), 0.2, 0.2)), ["data.fractions"]),
    ],
)
def test_wrong_arguments_are_one_line(call: Callable[[], Any], texts: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    for text in texts:
        assert text in str(caught.value)


@given(
    n=st.integers(2, 300),
    first=st.floats(0.01, 0.9),
    second=st.floats(0, 0.5),
    seed=st.integers(0, 99),
)
def test_split_is_disjoint_and_covers(n: int, first: float, second: float, seed: int) -> None:
    third = 1 - first - second
    if third <= 0.01:
        return
    indices = np.arange(n) * 3 + 5
    parts = split_indices(indices, (first, second, third), seed)
    assert sorted(np.concatenate(parts).tolist()) == indices.tolist()
    assert len(parts[0]) >= 1
    assert len(parts[2]) >= 1
    for part, share in zip(parts, (first, second, third), strict=True):
        assert part.dtype == np.int64
        assert (np.diff(part) > 0).all()
        assert abs(len(part) - share * n) <= 2


@pytest.mark.parametrize(
    ("n", "sizes"),
    [
        (10, (6, 2, 2)),
        (11, (7, 2, 2)),
        (12, (7, 3, 2)),
        (13, (8, 2, 3)),
        (2, (1, 0, 1)),
        (1000, (600, 200, 200)),
    ],
)
def test_split_sizes(n: int, sizes: tuple[int, int, int]) -> None:
    assert tuple(map(len, split_indices(range(n)))) == sizes


def test_split_is_random_and_repeatable() -> None:
    one, again, other = (split_indices(range(100), seed=seed)[0] for seed in (0, 0, 1))
    assert np.array_equal(one, again)
    assert not np.array_equal(one, other)
    assert not np.array_equal(one, np.arange(60))


def test_no_validation_is_allowed() -> None:
    assert [len(part) for part in split_indices(range(10), (0.8, 0.0, 0.2))] == [8, 0, 2]


@given(n=st.integers(0, 100), seed=st.integers(0, 9))
def test_validation_is_cut_in_thirds(n: int, seed: int) -> None:
    validation = np.arange(n) + 50
    parts = cut_validation(validation, seed)
    assert sorted(np.concatenate(parts).tolist()) == validation.tolist()
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1
    assert n < 3 or min(sizes) >= 1


def test_validation_cut_is_random() -> None:
    one, other = (cut_validation(range(60), seed)[1] for seed in (0, 1))
    assert not np.array_equal(one, other)
    assert not np.array_equal(one, np.arange(20, 40))
