from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

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
