from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedekd.data import TensorBatches, scale

IMAGES = torch.arange(20, dtype=torch.uint8)[:, None, None, None].expand(20, 3, 8, 8).contiguous()
TARGETS = torch.arange(20)


def test_scale_pixels_are_in_minus_one_to_one() -> None:
    scaled = scale(torch.arange(256, dtype=torch.uint8))
    assert scaled.dtype == torch.float32
    torch.testing.assert_close(scaled, torch.linspace(-1, 1, 256))
    assert scaled[[0, -1]].tolist() == [-1, 1]


@given(n=st.integers(0, 20), batch_size=st.integers(1, 24), min_batch=st.integers(1, 5))
def test_batches_have_expected_sizes(n: int, batch_size: int, min_batch: int) -> None:
    batches = TensorBatches(IMAGES, TARGETS, torch.arange(n), batch_size, min_batch=min_batch)
    sizes = [len(y) for _, y in batches]
    assert len(batches) == len(sizes)
    assert 0 not in sizes
    assert all(size == batch_size for size in sizes[:-1])
    left_out = n - sum(sizes)
    assert left_out == (n % batch_size if n > batch_size and n % batch_size < min_batch else 0)


def test_batches_without_generator_follow_indices() -> None:
    batches = TensorBatches(IMAGES, TARGETS, torch.tensor([5, 3, 9]), 2)
    first, second = list(batches)
    assert first[1].tolist() == [5, 3]
    assert second[1].tolist() == [9]
    torch.testing.assert_close(first[0][1], scale(IMAGES[3]))


def test_batches_passes_differ_and_repeat_with_seed() -> None:
    def passes() -> list[list[int]]:
        batches = TensorBatches(IMAGES, TARGETS, TARGETS, 8, generator=torch.Generator().manual_seed(3))
        return [torch.cat([y for _, y in batches]).tolist() for _ in range(2)]

    one, two = passes()
    assert passes() == [one, two]
    assert one != two
    assert sorted(one) == sorted(two) == list(range(20))


def test_batches_extras_stay_with_their_samples() -> None:
    indices = torch.tensor([4, 8, 15, 16])
    extra = indices * 10.0
    batches = TensorBatches(IMAGES, TARGETS, indices, 3, generator=torch.Generator(), extras=(extra,))
    for _, y, e in batches:
        assert torch.equal(e, y * 10.0)


@pytest.mark.parametrize("channels_last", [False, True])
def test_batches_have_requested_memory_format(channels_last: bool) -> None:
    x, _ = next(iter(TensorBatches(IMAGES, TARGETS, TARGETS, 4, channels_last=channels_last)))
    assert x.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
