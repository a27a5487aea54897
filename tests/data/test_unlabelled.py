from __future__ import annotations

import numpy as np
import pytest
import torch

from fedekd.data.unlabelled import read_images
from fedekd.errors import UserError

RNG = np.random.default_rng(0)


def pixels(*shape: int) -> np.ndarray:
    return RNG.integers(0, 256, shape, dtype=np.uint8)


def written(path, **arrays):
    np.savez(path, **arrays)
    return path


@pytest.mark.parametrize("shape", [(5, 8, 9), (5, 8, 9, 1), (5, 8, 9, 3), (1, 8, 8, 4)])
def test_images_come_channels_first_and_else_as_they_are(tmp_path, shape):
    array = pixels(*shape)
    found = read_images(written(tmp_path / "x.npz", images=array))
    channels = shape[3] if len(shape) == 4 else 1
    assert found.shape == (shape[0], channels, *shape[1:3])
    assert found.dtype == torch.uint8
    assert found.is_contiguous()
    np.testing.assert_array_equal(found.permute(0, 2, 3, 1).numpy().reshape(shape), array)


def test_splits_are_joined_in_their_order_and_labels_left_alone(tmp_path):
    train, val, test = pixels(3, 8, 8), pixels(0, 8, 8), pixels(2, 8, 8)
    path = written(
        tmp_path / "x.npz",
        test_images=test,
        val_images=val,
        train_images=train,
        train_labels=np.array(["any", "thing", "goes"]),
    )
    np.testing.assert_array_equal(read_images(path)[:, 0].numpy(), np.concatenate([train, test]))
    alone = written(tmp_path / "y.npz", test_images=test)
    np.testing.assert_array_equal(read_images(alone)[:, 0].numpy(), test)


def test_an_array_images_goes_before_the_splits(tmp_path):
    own = pixels(2, 8, 8)
    path = written(tmp_path / "x.npz", images=own, train_images=pixels(3, 8, 8))
    np.testing.assert_array_equal(read_images(path)[:, 0].numpy(), own)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        (
            {"pictures": pixels(2, 8, 8)},
            r"x\.npz' has no array images, nor any of train_images, val_images, test_images",
        ),
        ({}, "has no array images"),
        ({"images": pixels(2, 8, 8).astype(np.float32)}, "float32; allowed: uint8"),
        ({"images": pixels(2, 8, 8, 2)}, r"shape \(2, 8, 8, 2\)"),
        ({"images": pixels(8, 8)}, r"shape \(8, 8\)"),
        ({"images": pixels(2, 7, 8)}, "7x8"),
        ({"images": pixels(0, 8, 8)}, "holds no images"),
        ({"train_images": pixels(2, 8, 8), "test_images": pixels(2, 9, 9)}, "differ in shape"),
        ({"train_images": pixels(2, 8, 8), "test_images": pixels(2, 8, 8, 3)}, "differ in shape"),
        ({"images": np.array([{}])}, "cannot be read"),
        ({"train_images": pixels(0, 8, 8), "test_images": pixels(0, 8, 8)}, "holds no images"),
    ],
)
def test_what_are_no_images_is_told_in_one_line(tmp_path, arrays, words):
    with pytest.raises(UserError, match=words) as told:
        read_images(written(tmp_path / "x.npz", **arrays))
    assert "\n" not in str(told.value)


def test_files_that_are_no_archives_are_told(tmp_path):
    path = written(tmp_path / "x.npz", images=pixels(30, 8, 8))
    whole = path.read_bytes()
    path.write_bytes(whole[:600])
    with pytest.raises(UserError, match="cannot be read"):
        read_images(path)
    path.write_bytes(whole[:200] + bytes(64) + whole[264:])
    with pytest.raises(UserError, match="cannot be read"):
        read_images(path)
    path.write_bytes(b"")
    with pytest.raises(UserError, match="cannot be read"):
        read_images(path)
    np.save(tmp_path / "x.npy", pixels(2, 8, 8))
    with pytest.raises(UserError, match="cannot be read"):
        read_images(tmp_path / "x.npy")
    for missing in (tmp_path / "none.npz", tmp_path):
        with pytest.raises(UserError, match="no such file"):
            read_images(missing)
