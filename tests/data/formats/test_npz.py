from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fedekd.data import load_samples
from fedekd.data.formats.npz import pool, read_npz
from fedekd.errors import UserError

WriteNpz = Any


def test_pool_keeps_order_of_splits(write_npz: WriteNpz) -> None:
    path = write_npz(sizes=(3, 2, 4))
    raw = pool("tiny", read_npz(path))
    with np.load(path) as file:
        assert np.array_equal(
            raw.inputs, np.concatenate([file[f"{split}_images"] for split in ("train", "val", "test")])
        )
    assert raw.targets[:, 0].tolist() == [0, 1, 2, 0, 1, 0, 1, 2, 0]
    assert np.bincount(raw.split, minlength=3).tolist() == [3, 2, 4]


@pytest.mark.parametrize(
    "replaced",
    [
        {},
        {"val_images": None, "val_labels": None},
        {"val_images": np.empty(0), "val_labels": np.empty(0)},
        {"test_images": np.empty((0, 5, 5, 3)), "test_labels": np.empty((0, 7))},
    ],
    ids=["empty", "missing", "bare", "other-shape"],
)
def test_pool_accepts_empty_and_missing_splits(write_npz: WriteNpz, replaced: dict[str, Any]) -> None:
    raw = pool("tiny", read_npz(write_npz(**replaced)))
    assert raw.inputs.dtype == np.uint8
    assert len(raw.inputs) == len(raw.targets) == len(raw.split)
    assert 1 not in raw.split


@pytest.mark.parametrize(
    ("replaced", "texts"),
    [
        ({"test_labels": None}, ["got 'test_images' without 'test_labels'"]),
        ({"val_images": None}, ["got 'val_labels' without 'val_images'"]),
        ({"test_labels": np.zeros(3, int)}, ["12 test images", "3 test labels"]),
        ({"test_images": np.zeros((12, 9, 9), np.uint8)}, ["(9, 9)", "(8, 8)", "one shape"]),
        ({"train_images": np.array([[1], [1, 2]], object)}, ["cannot be read", "ValueError", "plain arrays"]),
        (
            {f"{split}_{part}": None for split in ("train", "val", "test") for part in ("images", "labels")},
            ["no samples", "train_images"],
        ),
        (
            {f"{split}_{part}": np.empty(0) for split in ("train", "test") for part in ("images", "labels")},
            ["no samples"],
        ),
    ],
)
def test_invalid_layout_raises_one_line(write_npz: WriteNpz, replaced: dict[str, Any], texts: list[str]) -> None:
    path = write_npz(**replaced)
    with pytest.raises(UserError) as caught:
        pool("tiny", read_npz(path))
    assert "\n" not in str(caught.value)
    for text in ("data.dataset", "tiny", *texts):
        assert text in str(caught.value)


def test_missing_file_names_the_path(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"file '.*gone\.npz' not found"):
        read_npz(tmp_path / "gone.npz")


@pytest.mark.parametrize("keep", [0, 1, 100, 0.5, 0.99])
def test_truncated_file_raises(write_npz: WriteNpz, keep: float) -> None:
    path = write_npz()
    content = path.read_bytes()
    path.write_bytes(content[: int(keep if keep >= 1 else keep * len(content))])
    with pytest.raises(UserError, match=r"tiny\.npz' cannot be read"):
        read_npz(path)


def test_altered_pixel_fails_the_checksum(write_npz: WriteNpz) -> None:
    path = write_npz()
    with zipfile.ZipFile(path) as archive:
        start = archive.getinfo("train_images.npy").header_offset
    content = bytearray(path.read_bytes())
    content[start + 1000] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"cannot be read \(BadZipFile: Bad CRC-32"):
        read_npz(path)


def test_altered_byte_raises_or_reads_the_same(write_npz: WriteNpz) -> None:
    path = write_npz(sizes=(2, 0, 1))
    whole = pool("tiny", read_npz(path))
    content = path.read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for position in rng.choice(len(content), 300, replace=False):
        altered = bytearray(content)
        altered[position] ^= int(rng.integers(1, 256))
        path.write_bytes(altered)
        try:
            raw = pool("tiny", read_npz(path))
        except UserError:
            refused += 1
        else:  # a field that tells nothing, such as a date, or the name of a split that may be missing
            assert any(np.array_equal(raw.inputs, part) for part in (whole.inputs[: len(raw)], whole.inputs[2:]))
            assert len(raw.inputs) == len(raw.targets)
    assert refused > 100


def test_other_file_format_raises(tmp_path: Path) -> None:
    path = tmp_path / "table.npz"
    with path.open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(UserError, match="cannot be read"):
        read_npz(path)
    path.write_text("no archive")
    with pytest.raises(UserError, match="cannot be read"):
        read_npz(path)


def flat(tmp_path: Path, **replaced: Any) -> str:
    rng = np.random.default_rng(0)
    arrays = {
        "images": rng.integers(0, 256, (12, 9, 8), np.uint8),
        "labels": np.arange(12) % 3,
        "split": np.array(["train", "val", "test"]).repeat(4),
        "hospital": np.array(["b", "a"] * 6),
        "patient": np.arange(12) // 2 + 100,
        **replaced,
    }
    np.savez(tmp_path / "flat.npz", **{key: value for key, value in arrays.items() if value is not None})
    return str(tmp_path / "flat.npz")


def test_flat_arrays_have_sites_groups_splits_and_class_names(tmp_path: Path) -> None:
    names = np.array(["zebra", "ant", "bee"])
    path = flat(tmp_path, class_names=names, targets=np.arange(12)[:, None] % 3, labels=None)
    data = load_samples(path, site_column="hospital", group_column="patient")
    assert (data.inputs.shape, data.class_names, data.site_names) == ((12, 1, 9, 8), tuple(names), ("a", "b"))
    assert data.targets.tolist() == [0, 1, 2] * 4
    assert data.site is not None
    assert data.group is not None
    assert data.split is not None
    assert data.site.tolist() == [1, 0] * 6
    assert data.group.tolist() == [i // 2 for i in range(12)]
    assert data.split.tolist() == [0] * 4 + [1] * 4 + [2] * 4


def test_medmnist_layout_has_sites_and_groups_per_split(write_npz: WriteNpz) -> None:
    extra = {f"{split}_ward": np.arange(size) % 2 for split, size in (("train", 30), ("test", 12))}
    data = load_samples(str(write_npz(**extra)), site_column="ward", group_column="ward")
    assert data.site_names == ("0", "1")
    assert data.site is not None
    assert data.site.tolist() == [0, 1] * 21


@pytest.mark.parametrize(
    ("replaced", "options", "words"),
    [
        ({}, {"site_column": "ward"}, r"data\.site_column: expected an array of 'flat\.npz'.*got 'ward'"),
        ({}, {"group_column": "patients"}, r"Did you mean 'patient'"),
        (
            {"labels": None},
            {},
            r"data\.target_column: 'flat\.npz': expected an array labels or targets, got images, split",
        ),
        ({"labels": np.arange(11)}, {}, r"array 'labels', shape \(12,\), got \(11,\)"),
        ({"labels": np.eye(12, 3)}, {}, r"got \(12, 3\)\. Convert one-hot labels with labels\.argmax"),
        ({"labels": np.eye(12, 3), "class_names": np.array(["a", "b", "c"])}, {}, r"got \(12, 3\)\. Convert one-hot"),
        ({"labels": np.arange(12) % 3 + 0.4}, {}, r"whole numbers, got 0\.4"),
        (
            {"labels": np.arange(12) % 3 + 0.4, "class_names": np.array(["a", "b", "c"])},
            {},
            r"expected 0\.\.2 .*got 0\.4",
        ),
        ({"class_names": np.array(["a", "b"])}, {}, r"expected 0\.\.1 for 2 class names, got 2"),
        ({"hospital": np.array(["a"])}, {"site_column": "hospital"}, r"'hospital', shape \(12,\), got \(1,\)"),
        ({"split": np.array(["train", "x"]).repeat(6)}, {}, r"expected train, val or test .*got 'x' in row 7"),
        ({"images": np.random.default_rng(0).random((12, 9, 8)) * 9}, {}, r"data\.value_range: .*in 0\.\.1, got 8\.9"),
    ],
)
def test_flat_arrays_invalid_raise_one_line(
    tmp_path: Path, replaced: dict[str, Any], options: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError, match=words) as caught:
        load_samples(flat(tmp_path, **replaced), **options)
    assert "\n" not in str(caught.value)


def test_unknown_label_of_named_classes_is_left_out(tmp_path: Path) -> None:
    labels = np.array([0, 1, 2, 255] * 3)
    path = flat(tmp_path, labels=labels, class_names=np.array(["a", "b", "c"]))
    with pytest.raises(UserError, match=r"got 255\. Leave out .*--data\.ignore_label"):
        load_samples(path)
    assert load_samples(path, ignore_label=255).targets.tolist() == [0, 1, 2] * 3


def test_real_targets_are_read_for_regression(tmp_path: Path) -> None:
    data = load_samples(flat(tmp_path, labels=np.arange(12) + 0.25), task="regression")
    assert (data.num_classes, data.targets.tolist()) == (0, [i + 0.25 for i in range(12)])


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32, np.float64, bool])
def test_images_are_resized_like_files(tmp_path: Path, dtype: Any) -> None:
    rng = np.random.default_rng(0)
    images = rng.random((12, 18, 16)) if dtype in (np.float32, np.float64) else rng.integers(0, 256, (12, 18, 16))
    images = images > 99 if dtype is bool else images.astype(dtype)
    data = load_samples(flat(tmp_path, images=images), image_size=[9, 8])
    assert data.inputs.shape == (12, 1, 9, 8)
    for index in range(12):
        value = images[index]
        image = Image.fromarray(value.astype(np.uint8) * 255 if dtype is bool else value.astype(np.float32))
        if dtype is np.uint8:
            image = Image.fromarray(value)
        expected = np.asarray(image.resize((8, 9), Image.Resampling.BILINEAR))
        if dtype == np.uint16:
            expected = np.rint(expected) / np.float32(65535) * 2 - 1
        if dtype in (np.float32, np.float64):
            expected = expected * 2 - 1
        np.testing.assert_allclose(data.inputs[index, 0], expected, atol=1e-6)


def test_splits_of_two_sizes_are_resized_to_one(write_npz: WriteNpz) -> None:
    large = np.random.default_rng(0).integers(0, 256, (12, 20, 20), np.uint8)
    data = load_samples(str(write_npz(test_images=large)), image_size=10)
    assert data.inputs.shape == (42, 1, 10, 10)


def test_known_data_set_is_resized() -> None:
    assert load_samples("digits", image_size=12).inputs.shape == (1797, 1, 12, 12)


@pytest.mark.parametrize("values", [["p1", "", "p2"], [1.0, float("nan"), 2.0], ["p1", "?", "p2"]])
@pytest.mark.parametrize(("option", "what"), [("group_column", "a group"), ("site_column", "a site")])
def test_read_arrays_missing_group_or_site_raises(tmp_path: Path, values: list[Any], option: str, what: str) -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "x.npz", images=images, labels=[0, 1, 0], patient=np.array(values))
    with pytest.raises(UserError, match=f"data.{option}: 'x.npz': expected {what} .* 'patient', got none in row 2"):
        load_samples(str(tmp_path / "x.npz"), **{option: "patient"})


def test_read_arrays_missing_label_raises(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "x.npz", images=images, labels=np.array(["a", "?", "b"]))
    with pytest.raises(UserError, match="expected a label in each row of the column 'labels', got none in row 2"):
        load_samples(str(tmp_path / "x.npz"))


def test_target_column_names_the_labels_of_splits(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (6, 8, 8), dtype=np.uint8)
    arrays = {"train_images": images, "train_labels": [0, 1] * 3, "train_grade": [0, 1, 2] * 2}
    np.savez(tmp_path / "two.npz", **arrays)
    path = str(tmp_path / "two.npz")
    assert load_samples(path).targets.tolist() == [0, 1] * 3
    assert load_samples(path, target_column="grade").targets.tolist() == [0, 1, 2] * 2
    with pytest.raises(UserError, match="got 'train_images' without 'train_stage'"):
        load_samples(path, target_column="stage")
