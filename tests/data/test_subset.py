"""Options max_samples and extra_test: a subset before the partition, and test samples from the rest."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedekd.configuration.options import parts_of
from fedekd.data import ClientSplits, FederatedDataModule, Samples
from fedekd.data.subset import draw_extra_test, draw_subset
from fedekd.errors import UserError

SPLITS = ("train", "validation", "test", "tuning", "calibration", "holdout")


def images(
    count: int = 300, classes: int = 3, task: Any = "classification", groups: Any = None, targets: Any = None
) -> Samples:
    """Images whose first two pixels are the sample's number."""
    pixels = np.random.default_rng(0).integers(0, 256, (count, 8, 8), dtype=np.uint8)
    pixels[:, 0, 0], pixels[:, 0, 1] = np.arange(count) % 256, np.arange(count) // 256
    values = np.arange(count) % classes if targets is None else targets
    samples = Samples.from_arrays("numbers", pixels, values, task, None if targets is not None else classes)
    return samples if groups is None else replace(samples, group=torch.as_tensor(groups))


def module(samples: Samples, **options: Any) -> FederatedDataModule:
    data = FederatedDataModule("numbers", **{"num_clients": 3, "alpha": 1.0, "min_samples": 4} | options)
    data.adopt(samples)
    return data


def owned(own: ClientSplits) -> list[int]:
    return torch.cat([own.train, own.validation, own.test]).tolist()


@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 300), st.integers(0, 2**40))
def test_subsets_have_the_size_and_are_nested(count: int, small: int, large: int, seed: int) -> None:
    small, large = sorted((small, large))
    few, many = (draw_subset(count, size, seed) for size in (small, large))
    assert (len(few), len(many)) == (min(small, count), min(large, count))
    assert few.dtype == many.dtype == np.int64
    assert set(few) <= set(many) <= set(range(count))
    assert (np.diff(many) > 0).all()


def test_subset_draws_each_sample_with_the_same_probability() -> None:
    counts = np.bincount(np.concatenate([draw_subset(20, 5, seed) for seed in range(2000)]), minlength=20)
    assert np.abs(counts - 500).max() < 5 * np.sqrt(2000 * 0.25 * 0.75)


@given(st.lists(st.integers(0, 9), min_size=2, max_size=80), st.integers(1, 80), st.integers(0, 2**40))
def test_subset_of_groups_has_whole_groups_and_no_more_samples(groups: list[int], size: int, seed: int) -> None:
    sizes = np.bincount(groups)
    try:
        drawn = draw_subset(len(groups), size, seed, groups)
    except UserError:
        assert size < sizes.max()
        return
    assert len(drawn) <= size
    outside = np.setdiff1d(np.arange(len(groups)), drawn)
    assert not set(np.asarray(groups)[drawn]) & set(np.asarray(groups)[outside])
    if len(outside):
        assert len(drawn) > size - sizes.max()


@settings(max_examples=60)
@given(
    labels=st.lists(st.integers(0, 4), min_size=20, max_size=200),
    clients=st.integers(1, 4),
    size=st.integers(1, 60),
    seed=st.integers(0, 2**40),
)
def test_extra_test_has_the_class_mix_of_training(labels: list[int], clients: int, size: int, seed: int) -> None:
    classes = np.asarray(labels)
    train = np.array_split(np.arange(3 * clients), clients)
    pool = np.arange(3 * clients, len(labels))
    parts = draw_extra_test(classes, pool, train, size, seed)
    everything = np.concatenate(parts)
    assert len(np.unique(everything)) == len(everything)
    assert set(everything) <= set(pool)
    counts = np.stack([np.bincount(classes[part], minlength=5) for part in parts])
    exact = np.stack([np.bincount(classes[part], minlength=5) / len(part) * size for part in train])
    assert (counts < exact + 1).all()
    assert (counts[exact == 0] == 0).all()
    available = np.bincount(classes[pool], minlength=5)
    for label in range(5):
        got = counts[:, label]
        if got.sum() < available[label]:  # nothing lacks
            assert (got > exact[:, label] - 1).all()
        elif available[label]:  # all clients have the same fraction of their need
            need = np.maximum(exact[:, label], 1e-9)
            assert np.abs(got - exact[:, label] * available[label] / need.sum()).max() <= clients + 1
    if (available >= clients * size).all():
        assert [len(part) for part in parts] == [size] * clients


def test_defaults_and_a_large_maximum_change_nothing() -> None:
    samples = images()
    plain = module(samples)
    for options in ({"max_samples": None, "extra_test": 0}, {"max_samples": 300}, {"max_samples": 10**9}):
        other = module(samples, **options)
        for one, two in zip(plain.clients, other.clients, strict=True):
            assert all(torch.equal(getattr(one, name), getattr(two, name)) for name in SPLITS)
            assert one.digest(samples) == two.digest(samples)


@pytest.mark.parametrize("partition", ["label", "cluster", "iid"])
def test_subset_is_partitioned_like_a_data_set_of_its_own(partition: str) -> None:
    samples = images()
    data = module(samples, max_samples=90, partition=partition, seed=4)
    drawn = draw_subset(300, 90, 4)
    assert sorted(index for own in data.clients for index in owned(own)) == drawn.tolist()
    small = module(samples.take(drawn), partition=partition, seed=4)
    for one, two in zip(data.clients, small.clients, strict=True):
        assert [drawn[getattr(two, name).numpy()].tolist() for name in SPLITS] == [
            getattr(one, name).tolist() for name in SPLITS
        ]
        assert one.digest(data.samples) == two.digest(small.samples)
    assert data.samples.digest() == samples.digest()


def test_subset_keeps_groups_whole_and_at_one_client() -> None:
    groups = np.arange(300) // 5
    data = module(images(groups=groups), max_samples=101, min_samples=3)
    assert sum(map(len, data.clients)) == 100
    owners = [set(groups[owned(own)]) for own in data.clients]
    assert sum(map(len, owners)) == len(set.union(*owners)) == 20


@settings(max_examples=20)
@given(
    st.integers(0, 2**31), st.integers(40, 200), st.integers(1, 80), st.sampled_from(["classification", "regression"])
)
def test_extra_test_changes_the_test_split_only(seed: int, max_samples: int, extra: int, task: str) -> None:
    samples = images(task=task)
    options = {"max_samples": max_samples, "seed": seed, "partition": "iid"}
    before, after = module(samples, **options), module(samples, extra_test=extra, **options)
    further = []
    for one, two in zip(before.clients, after.clients, strict=True):
        for name in set(SPLITS) - {"test"}:
            assert torch.equal(getattr(one, name), getattr(two, name))
        assert set(one.test.tolist()) <= set(two.test.tolist())
        assert (two.test.diff() > 0).all()
        added = set(two.test.tolist()) - set(one.test.tolist())
        assert len(added) <= extra
        further.append(added)
        assert one.validation_digest(samples) == two.validation_digest(samples)
        assert (one.digest(samples) == two.digest(samples)) == (not added)
        assert {int(samples.labels[index]) for index in added} <= set(samples.labels[two.train].tolist())
    assert sum(map(len, further)) == len(set.union(*further))
    assert not set.union(*further) & set(draw_subset(300, max_samples, seed).tolist())


def test_extra_test_of_enough_samples_is_complete_and_silent() -> None:
    data = module(images(900), max_samples=90, extra_test=40)
    before = module(images(900), max_samples=90)
    assert [len(two.test) - len(one.test) for one, two in zip(before.clients, data.clients, strict=True)] == [40] * 3
    assert not [line for line in data.warnings() if "extra_test" in line]


def test_too_few_samples_left_out_are_a_warning() -> None:
    data = module(images(), max_samples=290, extra_test=40)
    [line] = [line for line in data.warnings() if "extra_test" in line]
    assert line.startswith("data.extra_test: 3 of 3 clients get fewer than 40 further test samples, because")
    assert "client 0 (" in line


@pytest.mark.parametrize("max_samples", [300, 10**9])
def test_extra_test_of_a_maximum_that_leaves_nothing_out_raises(max_samples: int) -> None:
    with pytest.raises(UserError, match=r"^data\.max_samples: expected fewer than 300 samples with data\.extra_test"):
        module(images(), max_samples=max_samples, extra_test=40).setup()


def test_extra_test_rows_of_a_table_are_preprocessed_by_their_client() -> None:
    data = FederatedDataModule(
        "heart_disease", num_clients=2, alpha=5.0, max_samples=200, extra_test=50, download=False
    )
    try:
        data.setup()
    except UserError:
        pytest.skip("the table is not here")
    inputs = data.samples.inputs
    assert isinstance(inputs, torch.Tensor)
    assert all(bool(inputs[own.test].any(dim=1).all()) for own in data.clients)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"max_samples": 0}, r"data\.max_samples: expected at least 1, got 0"),
        ({"max_samples": 5, "extra_test": -1}, r"data\.extra_test: expected at least 0, got -1"),
        (
            {"max_samples": 5},
            r"^data\.max_samples: expected at least 6 \(data\.num_clients\), got 5\. Raise it",
        ),
        ({"extra_test": 5}, r"data\.extra_test: expected 0 without data\.max_samples, which leaves samples out, got 5"),
        (
            {"max_samples": 50, "extra_test": 5, "splits": "given"},
            r"data\.extra_test: expected 0 with data\.splits given, got 5",
        ),
        ({"sites": {"a": "a.csv"}, "max_samples": 5}, r"data\.max_samples: expected no value with data\.sites, whose"),
        (
            {"site_column": "s", "max_samples": 5, "extra_test": 5},
            r"data\.max_samples: expected no value with data\.si",
        ),
    ],
)
def test_invalid_options_raise_one_line(options: dict[str, Any], text: str) -> None:
    with pytest.raises(UserError, match=text) as caught:
        FederatedDataModule(None if "sites" in options else "gone.npz", **options)
    assert "\n" not in str(caught.value)


def test_extra_test_with_groups_or_real_targets_raises() -> None:
    with pytest.raises(UserError, match=r"^data\.extra_test: expected 0 with groups, got 5"):
        module(images(groups=np.arange(300) // 5), max_samples=100, extra_test=5).setup()
    real = images(task="regression", targets=np.linspace(0.5, 2.25, 300))
    with pytest.raises(UserError, match=r"^data\.extra_test: expected 0 with real-valued targets, got 5"):
        module(real, max_samples=100, extra_test=5, partition="iid").setup()


def test_subset_with_data_of_a_flower_site_raises() -> None:
    with pytest.raises(UserError, match=r"^data\.max_samples: expected null with data of a site, got 50"):
        module(images(), max_samples=50).assign_all(0)


def test_first_group_above_the_maximum_raises_one_line() -> None:
    with pytest.raises(
        UserError, match=r"^data\.max_samples: expected at least 5 \(samples of the first group drawn\)"
    ):
        module(images(groups=np.arange(300) // 5), max_samples=4).setup()


def test_options_of_fit_reach_the_data_module() -> None:
    for options, expected in (([], (None, 0)), (["--data.max_samples=300", "--data.extra_test=20"], (300, 20))):
        data = parts_of(["--config", "digits.yaml", *options, "--logger=null"])["data"]
        assert (data.max_samples, data.extra_test) == expected
