from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import count
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedekd.data import (
    PARTITIONS,
    Samples,
    cut_validation,
    dirichlet_cluster_partition,
    dirichlet_label_partition,
    iid_partition,
    split_indices,
)
from fedekd.data.partition import checked_parts, partition_groups
from fedekd.errors import UserError

LABELS = np.repeat(np.arange(10), 60)
FEATURES = np.random.default_rng(0).normal(size=(120, 2, 3)) + 20 * (np.arange(120) % 5)[:, None, None]


def assert_partition(parts: list[npt.NDArray[np.int64]], num_samples: int, num_clients: int) -> None:
    assert len(parts) == num_clients
    assert sorted(np.concatenate(parts).tolist()) == list(range(num_samples))
    for part in parts:
        assert part.dtype == np.int64
        assert (np.diff(part) > 0).all()


@settings(max_examples=30)
@given(
    classes=st.lists(st.integers(0, 6), min_size=1, max_size=200),
    num_clients=st.integers(1, 8),
    alpha=st.floats(0.05, 100),
    seed=st.integers(-(2**63), 2**63),
    min_samples=st.integers(0, 3),
)
def test_label_partition_assigns_every_sample_once(
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
def test_iid_partition_sizes_differ_by_at_most_one(num_samples: int, num_clients: int, seed: int) -> None:
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
def test_partition_repeats_with_seed(name: str) -> None:
    one, again, other = (PARTITIONERS[name](seed) for seed in (0, 0, 1))
    assert all(np.array_equal(a, b) for a, b in zip(one, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(("num_clients", "alpha"), [(6, 0.1), (20, 0.1), (2, 0.05)])
def test_label_partition_respects_min_samples(num_clients: int, alpha: float) -> None:
    for seed in range(20):
        parts = dirichlet_label_partition(LABELS, num_clients, alpha, seed, min_samples=10)
        assert min(map(len, parts)) >= 10


def test_label_partition_shuffles_a_class() -> None:
    parts = dirichlet_label_partition(np.zeros(1000, int), 2, 10.0, seed=0)
    assert any(np.diff(part).max() > 1 for part in parts)
    assert parts[0].max() > parts[1].min()


def test_label_partition_fractions_are_dirichlet() -> None:
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


def test_label_partition_classes_are_independent() -> None:
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


def test_label_partition_smaller_alpha_is_more_skewed() -> None:
    skews = [_skew(alpha) for alpha in (0.1, 0.5, 5.0, 1000.0)]
    assert skews == sorted(skews, reverse=True)
    assert skews[0] > 0.4
    assert skews[-1] < 0.15


def test_cluster_partition_equals_label_partition_of_clusters() -> None:
    cluster_of = np.arange(120) % 5
    by_cluster = dirichlet_cluster_partition(FEATURES, 3, 0.05, seed=0, min_samples=10)
    assert_partition(by_cluster, 120, 3)
    skewed = np.mean([np.bincount(cluster_of[part]).max() / len(part) for part in by_cluster])
    even = np.mean([np.bincount(cluster_of[part]).max() / len(part) for part in iid_partition(120, 3, 0)])
    assert skewed > even + 0.15


def test_cluster_partition_finds_separate_clusters() -> None:
    """With alpha near 0 a cluster goes to one client whole, so no two clients share one."""
    for seed in range(10):
        parts = dirichlet_cluster_partition(FEATURES, 2, 1e-6, seed)
        assert set(parts[0] % 5).isdisjoint(parts[1] % 5)


def test_cluster_partition_ignores_scale_and_shape() -> None:
    flat = dirichlet_cluster_partition(FEATURES.reshape(120, 6) * 4, 3, 0.5, seed=0)
    parts = dirichlet_cluster_partition(FEATURES, 3, 0.5, seed=0)
    assert all(np.array_equal(a, b) for a, b in zip(parts, flat, strict=True))


def test_cluster_partition_does_not_modify_features() -> None:
    features = FEATURES.astype(np.float32)
    before = features.copy()
    dirichlet_cluster_partition(features, 3, 0.5, seed=0)
    assert np.array_equal(features, before)


def test_partitions_by_name_equal_functions(blobs: Samples) -> None:
    for function in PARTITIONS.values():
        assert_partition(function(blobs, 3, 1.0, 0, 10), 120, 3)
    by_label = PARTITIONS["label"](blobs, 3, 0.3, 0, 10)
    by_hand = dirichlet_label_partition(blobs.labels, 3, 0.3, 0, 10)
    assert all(np.array_equal(a, b) for a, b in zip(by_label, by_hand, strict=True))
    scaled = blobs.inputs.numpy() / 127.5 - 1
    by_cluster = PARTITIONS["cluster"](blobs, 3, 0.3, 0, 10)
    by_hand = dirichlet_cluster_partition(scaled, 3, 0.3, 0)
    assert all(np.array_equal(a, b) for a, b in zip(by_cluster, by_hand, strict=True))


@pytest.mark.parametrize(
    ("call", "texts"),
    [
        (lambda: dirichlet_label_partition(LABELS, 6, 0.0, 0), ["data.alpha: expected", "above 0, got 0.0"]),
        (lambda: dirichlet_label_partition(LABELS, 6, -1, 0), ["data.alpha: expected", "got -1"]),
        (lambda: dirichlet_label_partition(LABELS, 6, float("nan"), 0), ["got nan"]),
        (lambda: dirichlet_label_partition(LABELS, 6, float("inf"), 0), ["got inf"]),
        (lambda: dirichlet_label_partition(LABELS, 0, 0.1, 0), ["data.num_clients: expected at least 1, got 0"]),
        (
            lambda: dirichlet_label_partition(LABELS, 601, 0.1, 0, 0),
            ["data.num_clients: expected at most 600", "got 601"],
        ),
        (
            lambda: dirichlet_label_partition(LABELS, 61, 9.0, 0),
            ["data.min_samples: expected at most 9", "data.num_clients", "got 10"],
        ),
        (
            lambda: dirichlet_label_partition([0] * 60, 6, 0.01, 0),
            [
                "data.min_samples",
                "data.alpha=0.01",
                "6 clients",
                "data.num_clients",
                "draw of 10000",
                "10 samples",
            ],
        ),
        (lambda: dirichlet_cluster_partition(FEATURES, 3, 0.0, 0), ["data.alpha: expected"]),
        (
            lambda: dirichlet_cluster_partition(FEATURES[:4], 2, 1.0, 0, min_samples=1),
            ["5 clusters", "got 4"],
        ),
        (lambda: iid_partition(5, 6, 0), ["data.num_clients: expected at most 5", "got 6"]),
        (lambda: iid_partition(50, 6, 0), ["data.min_samples: expected at most 8", "got 10"]),
        (lambda: split_indices([7]), ["data.min_samples", "at least 2 samples", "with 1"]),
        (lambda: split_indices(range(9), (0.5, 0.5)), ["data.fractions: expected", "got [0.5, 0.5]", "sum to 1"]),
        (lambda: split_indices(range(9), (0.5, 0.2, 0.2)), ["data.fractions", "sum to 1"]),
        (lambda: split_indices(range(9), (0.0, 0.5, 0.5)), ["data.fractions", "only validation may be 0"]),
        (lambda: split_indices(range(9), (0.8, 0.2, 0.0)), ["data.fractions", "only validation may be 0"]),
        (lambda: split_indices(range(9), (0.9, -0.2, 0.3)), ["data.fractions"]),
        (lambda: split_indices(range(9), (float("nan"), 0.2, 0.2)), ["data.fractions"]),
    ],
)
def test_invalid_arguments_raise_one_line(call: Callable[[], Any], texts: list[str]) -> None:
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
def test_split_indices_is_a_partition(n: int, first: float, second: float, seed: int) -> None:
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
def test_split_indices_has_expected_sizes(n: int, sizes: tuple[int, int, int]) -> None:
    assert tuple(map(len, split_indices(range(n)))) == sizes


def test_split_indices_is_random_and_repeats_with_seed() -> None:
    one, again, other = (split_indices(range(100), seed=seed)[0] for seed in (0, 0, 1))
    assert np.array_equal(one, again)
    assert not np.array_equal(one, other)
    assert not np.array_equal(one, np.arange(60))


def test_split_indices_without_validation() -> None:
    assert [len(part) for part in split_indices(range(10), (0.8, 0.0, 0.2))] == [8, 0, 2]


@given(n=st.integers(0, 100), seed=st.integers(0, 9))
def test_cut_validation_gives_thirds(n: int, seed: int) -> None:
    validation = np.arange(n) + 50
    parts = cut_validation(validation, seed)
    assert sorted(np.concatenate(parts).tolist()) == validation.tolist()
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1
    assert n < 3 or min(sizes) >= 1


def test_cut_validation_is_random() -> None:
    one, other = (cut_validation(range(60), seed)[1] for seed in (0, 1))
    assert not np.array_equal(one, other)
    assert not np.array_equal(one, np.arange(20, 40))


THIRDS = [np.arange(0, 4), np.arange(4, 8), np.arange(8, 12)]


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({0: THIRDS[0], 1: THIRDS[1], 2: THIRDS[2]}, "got a dict"),
        (None, "got a NoneType"),
        (3, "got a int"),
        ("012", "got a str"),
        ([0, 1, 2], r"got shape \(\) for client 0"),
        ([*THIRDS[:2], THIRDS[2].astype(float)], "got values of type float64 for client 2"),
        ([*THIRDS[:2], np.ones(12, bool)], "got values of type bool for client 2"),
        ([*THIRDS[:2], [[8, 9], [10, 11]]], r"got shape \(2, 2\) for client 2"),
        ([*THIRDS[:2], [[8, 9], [10]]], "got a list for client 2"),
        ([*THIRDS[:2], ["8"]], "got values of type <U1 for client 2"),
        ([*THIRDS[:2], [8, 3, 4]], r"got the index 3 2 times \(clients 0, 2\)"),
        ([*THIRDS[:2], [8, 9, 9]], r"got the index 9 2 times \(clients 2\)"),
        ([*THIRDS[:2], []], "got no index for client 2"),
        ([*THIRDS[:2], [8, 12]], "got the index 12 for client 2"),
        ([*THIRDS[:2], [8, -1]], "got the index -1 for client 2"),
        (THIRDS[:2], "got 2 arrays"),
        ([*THIRDS, [11]], "got more arrays"),
        ((np.array([number]) for number in count()), "got more arrays"),
    ],
)
def test_checked_parts_other_results_raise_one_line(parts: Any, message: str) -> None:
    with pytest.raises(UserError, match=rf"^data\.partition: expected .* -> 3 arrays .* in 0\.\.11, {message}$"):
        checked_parts(parts, 3, 12)


@pytest.mark.parametrize(
    "parts",
    [
        THIRDS,
        tuple(part.tolist() for part in THIRDS),
        (part for part in THIRDS),
        np.arange(12).reshape(3, 4),
        [torch.from_numpy(part) for part in THIRDS],
        [part.astype(np.uint8) for part in THIRDS],
    ],
    ids=["arrays", "lists", "generator", "matrix", "tensors", "uint8"],
)
def test_checked_parts_accepts_sequences_of_integers(parts: Any) -> None:
    checked = checked_parts(parts, 3, 12)
    assert all(part.dtype == np.int64 for part in checked)
    assert [part.tolist() for part in checked] == [part.tolist() for part in THIRDS]


@given(sizes=st.lists(st.integers(1, 9), min_size=2, max_size=40), seed=st.integers(0, 99))
def test_split_indices_keeps_groups_together(sizes: list[int], seed: int) -> None:
    groups = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(sizes)), sizes))
    indices = np.arange(len(groups)) * 3 + 5
    parts = split_indices(indices, seed=seed, groups=groups)
    assert sorted(np.concatenate(parts).tolist()) == indices.tolist()
    owners = [set(groups[(part - 5) // 3].tolist()) for part in parts]
    assert sum(map(len, owners)) == len(sizes)
    assert owners[0]
    assert owners[2]
    ends = np.cumsum([len(part) for part in parts])
    for end, share in zip(ends, (0.6, 0.8), strict=False):
        assert abs(end - share * len(groups)) <= max(sizes) + 1


def test_groups_of_one_sample_give_the_split_without_groups() -> None:
    for n in (2, 7, 100):
        plain, grouped = split_indices(range(n), seed=3), split_indices(range(n), seed=3, groups=np.arange(n) + 9)
        assert [part.tolist() for part in plain] == [part.tolist() for part in grouped]


def test_cut_validation_keeps_groups_together() -> None:
    groups = np.arange(60) // 4
    parts = cut_validation(np.arange(60), seed=0, groups=groups)
    assert [len(part) for part in parts] == [20, 20, 20]
    assert sum(len(set(groups[part].tolist())) for part in parts) == 15


def test_split_indices_of_one_group_raises() -> None:
    with pytest.raises(UserError, match="at least 2 groups, to train and test, got a client with 1"):
        split_indices(range(10), groups=[7] * 10)


@pytest.mark.parametrize("partition", PARTITIONS)
def test_partition_groups_assigns_whole_groups(blobs: Samples, partition: str) -> None:
    group = torch.arange(120) // 3
    parts = partition_groups(PARTITIONS[partition], replace(blobs, group=group), 3, 5.0, 0, 5)
    assert sorted(np.concatenate(parts).tolist()) == list(range(120))
    owners = [set(group[torch.from_numpy(part)].tolist()) for part in parts]
    assert sum(map(len, owners)) == 40
    assert min(map(len, owners)) >= 5
