from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from fedekd.data import ImageData
from fedekd.data.images import content_digest
from fedekd.errors import UserError


def build(images: Any = None, targets: Any = None, task: Any = "classification", **kwargs: Any) -> ImageData:
    images = np.arange(6 * 8 * 9 * 3, dtype=np.uint8).reshape(6, 8, 9, 3) if images is None else images
    targets = np.array([[0], [1], [2], [0], [1], [2]], np.uint8) if targets is None else targets
    splits = kwargs.pop("splits", {"train": len(images), "val": 0, "test": 0})
    return ImageData.from_arrays("six", images, targets, task, kwargs.pop("num_classes", None), splits)


def test_from_arrays_moves_channels_first_and_flattens_labels() -> None:
    images = np.random.default_rng(0).integers(0, 256, (6, 8, 9, 3), dtype=np.uint8)
    data = build(images)
    assert data.pixels.dtype == torch.uint8
    assert data.pixels.is_contiguous()
    assert data.pixels.shape == (6, 3, 8, 9)
    assert data.pixels[4, 2, 5, 7] == images[4, 5, 7, 2]
    assert (data.in_channels, data.image_size, data.num_classes, data.num_outputs, len(data)) == (
        3,
        (8, 9),
        3,
        3,
        6,
    )
    assert data.targets.dtype == torch.int64
    assert data.targets.tolist() == data.labels.tolist() == [0, 1, 2, 0, 1, 2]


def test_from_arrays_grey_images_get_a_channel() -> None:
    assert build(np.zeros((6, 8, 9), np.uint8)).pixels.shape == (6, 1, 8, 9)


def test_regression_has_float_targets_and_one_output() -> None:
    data = build(task="regression", num_classes=5)
    assert data.targets.dtype == torch.float32
    assert data.labels.dtype == torch.int64
    assert (data.num_classes, data.num_outputs) == (5, 1)


def test_from_arrays_accepts_whole_float_labels() -> None:
    assert build(targets=np.array([0.0, 1, 2, 0, 1, 2])).targets.tolist() == [0, 1, 2, 0, 1, 2]


ZEROS = np.zeros((6, 8, 8), np.uint8)


@pytest.mark.parametrize(
    ("kwargs", "texts"),
    [
        ({"images": np.full((6, 8, 8), np.nan)}, ["float64 with NaN pixels", "uint8"]),
        ({"images": np.zeros((6, 8, 8), np.float32)}, ["got float32", "uint8"]),
        ({"images": np.zeros((6, 8, 8), np.int64)}, ["got int64", "uint8"]),
        ({"images": np.zeros((6, 8, 8, 2), np.uint8)}, ["(6, 8, 8, 2)", "1, 3 or 4 channels"]),
        ({"images": np.zeros((6, 3, 28, 28), np.uint8)}, ["(6, 3, 28, 28)", "(N, H, W, C)"]),
        ({"images": np.zeros((6, 64), np.uint8)}, ["(6, 64)", "(N, H, W)"]),
        ({"images": np.zeros((6, 7, 28), np.uint8)}, ["7x28", "at least 8x8"]),
        ({"images": np.zeros((0, 8, 8), np.uint8), "targets": np.zeros(0, int)}, ["expected at least one image"]),
        ({"images": ZEROS, "targets": np.zeros(5, int)}, ["6 images", "5 labels"]),
        ({"images": ZEROS, "targets": np.zeros((6, 14), int)}, ["(6, 14)", "one label per image"]),
        ({"images": ZEROS, "targets": np.array([0, 1, 1.5, 0, 0, 0])}, ["got 1.5", "whole numbers"]),
        ({"images": ZEROS, "targets": np.array([0, np.nan, 1, 0, 0, 0])}, ["got nan", "whole numbers"]),
        ({"images": ZEROS, "targets": np.array([0, np.inf, 1, 0, 0, 0])}, ["got inf", "whole numbers"]),
        ({"images": ZEROS, "targets": np.array(list("abcabc"))}, ["<U1", "whole numbers"]),
        ({"images": ZEROS, "targets": np.array([0, 1, 2, 3, 4, 5]), "num_classes": 5}, ["label 5", "0..4"]),
        (
            {"images": ZEROS, "targets": np.array([0, 1, -1, 3, 4, 5])},
            ["label -1", "0..5", "data.num_classes"],
        ),
        ({"images": ZEROS, "targets": np.zeros(6, int)}, ["data.num_classes", "at least 2, got 1"]),
        ({"images": ZEROS, "targets": np.array([0, 1, 0, 1, 0, 1_000_000])}, ["label 1000000", "data.num_classes"]),
        ({"images": ZEROS, "targets": np.array([0, 1, 0, 1, 0, 6])}, ["label 6", "6 samples"]),
        ({"task": "regresion"}, ["task", "'regresion'", "Did you mean 'regression'?"]),
    ],
)
def test_from_arrays_invalid_data_raise_one_line(kwargs: dict[str, Any], texts: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        build(**kwargs)
    line = str(caught.value)
    assert "\n" not in line
    if "task" not in kwargs:
        assert "'six'" in line
    for text in texts:
        assert text in line


def test_from_arrays_splits_of_other_sum_raise() -> None:
    with pytest.raises(ValueError, match="do not sum to 6"):
        build(splits={"train": 5})


def test_digest_depends_on_contents_not_name() -> None:
    data = build()
    assert data.digest() == build().digest() == replace(data, name="other").digest()
    other_pixels, other_target = data.pixels.clone(), data.targets.clone()
    other_pixels[5, 0, 0, 0] += 1
    other_target[5] = 0
    others = [
        replace(data, pixels=other_pixels),
        replace(data, targets=other_target),
        replace(data, task="regression"),
        replace(data, num_classes=4),
        replace(data, pixels=data.pixels.reshape(6, 3, 9, 8)),
    ]
    assert len({data.digest(), *(other.digest() for other in others)}) == 6


def test_content_digest_depends_on_group_sizes() -> None:
    data = build()
    one = content_digest(data, [torch.tensor([0, 1]), torch.tensor([2])])
    assert one != content_digest(data, [torch.tensor([0]), torch.tensor([1, 2])])
    assert one != content_digest(data, [torch.tensor([1, 0]), torch.tensor([2])])
    none = torch.arange(0)
    first, second = torch.tensor([0]), torch.tensor([1])
    assert content_digest(data, [first, second, none]) != content_digest(data, [first, none, second])
