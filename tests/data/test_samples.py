from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from fedekd.data import Samples, scale
from fedekd.data.samples import content_digest
from fedekd.errors import UserError


def build(images: Any = None, targets: Any = None, task: Any = "classification", **kwargs: Any) -> Samples:
    images = np.arange(6 * 8 * 9 * 3, dtype=np.uint8).reshape(6, 8, 9, 3) if images is None else images
    targets = np.array([[0], [1], [2], [0], [1], [2]], np.uint8) if targets is None else targets
    num_classes = kwargs.pop("num_classes", None)
    return Samples.from_arrays("six", images, targets, task, num_classes, **kwargs)


def test_from_arrays_moves_channels_first_and_flattens_labels() -> None:
    images = np.random.default_rng(0).integers(0, 256, (6, 8, 9, 3), dtype=np.uint8)
    data = build(images)
    assert data.inputs.dtype == torch.uint8
    assert data.inputs.is_contiguous()
    assert data.inputs.shape == (6, 3, 8, 9)
    assert data.inputs[4, 2, 5, 7] == images[4, 5, 7, 2]
    assert (data.input_shape, data.num_classes, data.num_outputs, len(data)) == ((3, 8, 9), 3, 3, 6)
    assert data.targets.dtype == torch.int64
    assert data.targets.tolist() == data.labels.tolist() == [0, 1, 2, 0, 1, 2]


def test_from_arrays_grey_images_get_a_channel() -> None:
    assert build(np.arange(6 * 72, dtype=np.uint8).reshape(6, 8, 9)).inputs.shape == (6, 1, 8, 9)


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
        ({"images": np.full((6, 8, 8), np.nan)}, ["data.value_range", "float64 values in 0..1, got a NaN"]),
        (
            {"images": np.full((6, 8, 8), 1.5, np.float32)},
            ["values in 0..1, got 1.5. Set --data.value_range [LOW, HIGH]"],
        ),
        ({"images": np.full((6, 8, 8), -3, np.int16), "value_range": (0, 4095)}, ["int16 values in 0..4095, got -3"]),
        ({"images": np.zeros((6, 8, 8), np.int64)}, ["uint16 or float, got int64. Set --data.value_range"]),
        ({"images": np.zeros((6, 8, 8), complex)}, ["uint16 or float, got complex128"]),
        ({"images": np.zeros((6, 8, 8, 2), np.uint8)}, ["(6, 8, 8, 2)", "1, 3 or 4 channels"]),
        ({"images": np.zeros((6, 3, 28, 28), np.uint8)}, ["(6, 3, 28, 28)", "(N, H, W, C)"]),
        ({"images": np.zeros((6, 64), np.uint8)}, ["(6, 64)", "(N, H, W)"]),
        ({"images": np.zeros((6, 7, 28), np.uint8)}, ["7x28", "at least 8x8"]),
        ({"images": np.zeros((0, 8, 8), np.uint8), "targets": np.zeros(0, int)}, ["expected at least one image"]),
        ({"images": ZEROS, "targets": np.zeros(5, int)}, ["6 images", "5 labels"]),
        ({"images": ZEROS, "targets": np.zeros((6, 14), int)}, ["(6, 14)", "one label per image", "argmax(axis=1)"]),
        ({"images": ZEROS, "targets": np.array([0, 1, 0.4, 0, 0, 0])}, ["got 0.4", "whole", "--data.task regression"]),
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


UNIT = np.random.default_rng(0).random((6, 8, 8))


@pytest.mark.parametrize(
    ("images", "texts"),
    [
        (UNIT.round().astype(np.uint8), ["no pixel above 1", "np.rint(255.0 * images).astype(np.uint8)"]),
        (np.zeros((6, 8, 8), bool), ["different pixels, got 0 everywhere"]),
        (np.zeros((6, 8, 8), np.float32), ["different pixels, got -1.0 everywhere"]),
        (np.zeros((6, 8, 8), np.uint8), ["different pixels, got 0 everywhere"]),
        (np.full((6, 8, 8), 128, np.uint8), ["different pixels, got 128 everywhere"]),
    ],
    ids=["cast", "bool", "float", "black", "constant"],
)
def test_from_arrays_images_without_range_raise(images: Any, texts: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        build(images, np.arange(6) % 3)
    for text in ["'six'", *texts]:
        assert text in str(caught.value)
    assert len(str(caught.value)) <= 400


def test_from_arrays_small_range_is_reported_once() -> None:
    [line] = build((16 * UNIT).astype(np.uint8), np.arange(6) % 3).warnings
    assert "only the pixel values 0..15 of 0..255" in line
    assert build().warnings == ()


@pytest.mark.parametrize(
    ("images", "value_range"),
    [
        (UNIT, None),
        (UNIT.astype(np.float32) * 100 - 50, (-50, 50)),
        ((UNIT * 65535).astype(np.uint16), None),
        ((UNIT * 4095).astype(np.int16), (0, 4095)),
    ],
    ids=["float64", "float32", "uint16", "int16"],
)
def test_from_arrays_scales_wide_values_to_minus_one_and_one(images: Any, value_range: Any) -> None:
    images.flat[:2] = value_range or ((0, 1) if images.dtype.kind == "f" else (0, 65535))
    data = build(images, value_range=value_range)
    assert data.inputs.dtype == torch.float32
    assert (data.inputs.min(), data.inputs.max()) == (-1, 1)
    assert data.inputs.flatten()[:2].tolist() == [-1, 1]
    np.testing.assert_allclose(data.inputs[:, 0].flatten()[2:], 2 * UNIT.flatten()[2:] - 1, atol=1e-3)
    assert data.warnings == ()
    assert torch.equal(scale(data.inputs), data.inputs)


def test_from_arrays_bool_images_are_black_and_white() -> None:
    assert build(UNIT.round().astype(bool)).inputs.unique().tolist() == [0, 255]


def test_from_arrays_small_share_of_the_range_is_reported_once() -> None:
    [line] = build((UNIT * 4095).astype(np.uint16)).warnings
    assert "use only the values 0..40" in line
    assert "of 0..65535. Set --data.value_range [LOW, HIGH]" in line


def many(*labels: int, dtype: Any = np.int64) -> dict[str, Any]:
    """Return 300 images, of labels 0..9 and then the given ones."""
    targets = np.arange(300) % 10
    targets[len(targets) - len(labels) :] = labels
    return {
        "images": np.random.default_rng(0).integers(0, 256, (300, 8, 8), np.uint8),
        "targets": targets.astype(dtype),
    }


@pytest.mark.parametrize(
    ("label", "dtype"),
    [(255, np.uint8), (255, np.int64), (65535, np.uint16), (127, np.int8), (2**31 - 1, np.int32), (-1, np.int64)],
)
@pytest.mark.parametrize("task", ["classification", "regression"])
def test_unknown_label_raises_and_ignore_label_leaves_it_out(label: int, dtype: Any, task: Any) -> None:
    arrays = many(label, label, dtype=dtype)
    split = torch.arange(3).repeat_interleave(100)
    with pytest.raises(UserError, match=f"got label {label}.*--data.ignore_label {label}"):
        build(**arrays, task=task, split=split)
    data = build(**arrays, task=task, split=split, ignore_label=label)
    assert (data.num_classes, len(data), data.split_sizes) == (10, 298, {"train": 100, "val": 100, "test": 98})
    assert torch.equal(data.inputs[:, 0], torch.from_numpy(arrays["images"][:298]))
    assert [line for line in data.warnings if f"2 of 300 samples of 'six' have the label {label}" in line]


def test_label_255_of_256_classes_is_accepted() -> None:
    targets = np.arange(300) % 256
    assert build(many()["images"], targets).num_classes == 256
    assert build(**many(255), num_classes=256).warnings == ()


def test_label_above_num_classes_names_ignore_label() -> None:
    with pytest.raises(UserError, match=r"got label 12.*--data.ignore_label 12"):
        build(**many(12), num_classes=10)
    assert len(build(**many(12), num_classes=10, ignore_label=12)) == 299


def test_absent_classes_are_counted_in_one_line() -> None:
    arrays = many()
    arrays["targets"] = np.where(arrays["targets"] > 4, 10, 250)
    data = build(**arrays)
    assert data.num_classes == 251
    [line] = data.warnings
    assert "249 of 251 classes" in line
    assert "--data.ignore_label" in line
    assert build(**arrays, num_classes=251).warnings == ()
    assert build(**arrays, task="regression").warnings == ()


def test_ignore_label_of_all_samples_raises() -> None:
    with pytest.raises(UserError, match=r"data\.ignore_label: .*other labels than 3, got none"):
        build(many()["images"], np.full(300, 3), ignore_label=3)


def test_digest_depends_on_contents_not_name() -> None:
    data = build()
    assert data.digest() == build().digest() == replace(data, name="other").digest()
    other_pixels, other_target = data.inputs.clone(), data.targets.clone()
    other_pixels[5, 0, 0, 0] += 1
    other_target[5] = 0
    others = [
        replace(data, inputs=other_pixels),
        replace(data, targets=other_target),
        replace(data, task="regression"),
        replace(data, num_classes=4),
        replace(data, inputs=data.inputs.reshape(6, 3, 9, 8)),
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


def test_from_arrays_large_real_targets_keep_distinct_values() -> None:
    images = np.random.default_rng(0).integers(0, 256, (60, 8, 8), dtype=np.uint8)
    times = np.arange(1_600_000_000, 1_600_000_060) + 0.25
    samples = Samples.from_arrays("times", images, times, "regression", None)
    assert samples.targets.dtype == torch.float64
    assert len(samples.targets.unique()) == 60
    with pytest.raises(UserError, match=r"expected finite numbers up to 1e\+30, got 1e\+39"):
        Samples.from_arrays("times", images, np.full(60, 1e39), "regression", None)
