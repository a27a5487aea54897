from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from fedekd.data.raw import ReadOptions
from fedekd.data.unlabelled import UnlabelledImages, read_images
from fedekd.errors import UserError

RNG = np.random.default_rng(0)


def pixels(*shape: int) -> np.ndarray:
    return RNG.integers(0, 256, shape, dtype=np.uint8)


def whole(found: UnlabelledImages) -> torch.Tensor:
    return torch.cat(list(found.batches(2)))


def written(path, **arrays):
    np.savez(path, **arrays)
    return path


@pytest.mark.parametrize("shape", [(5, 8, 9), (5, 8, 9, 1), (5, 8, 9, 3), (1, 8, 8, 4)])
def test_read_images_moves_channels_first(tmp_path, shape):
    array = pixels(*shape)
    found = whole(read_images(written(tmp_path / "x.npz", images=array)))
    channels = shape[3] if len(shape) == 4 else 1
    assert found.shape == (shape[0], channels, *shape[1:3])
    assert found.dtype == torch.uint8
    assert found.is_contiguous()
    np.testing.assert_array_equal(found.permute(0, 2, 3, 1).numpy().reshape(shape), array)


def test_read_images_concatenates_splits_and_ignores_labels(tmp_path):
    train, val, test = pixels(3, 8, 8), pixels(0, 8, 8), pixels(2, 8, 8)
    path = written(
        tmp_path / "x.npz",
        test_images=test,
        val_images=val,
        train_images=train,
        train_labels=np.array(["any", "thing", "goes"]),
    )
    np.testing.assert_array_equal(whole(read_images(path))[:, 0].numpy(), np.concatenate([train, test]))
    alone = written(tmp_path / "y.npz", test_images=test)
    np.testing.assert_array_equal(whole(read_images(alone))[:, 0].numpy(), test)


def test_read_images_prefers_array_images_to_splits(tmp_path):
    own = pixels(2, 8, 8)
    path = written(tmp_path / "x.npz", images=own, train_images=pixels(3, 8, 8))
    np.testing.assert_array_equal(whole(read_images(path))[:, 0].numpy(), own)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        (
            {"pictures": pixels(2, 8, 8)},
            r"x\.npz': expected an array images or any of train_images, val_images, test_images, got none",
        ),
        ({}, "expected an array images"),
        ({"images": pixels(2, 8, 8).astype(np.float32)}, "expected float32 values in 0..1, got 25[0-9]"),
        ({"images": pixels(2, 8, 8).astype(int)}, "expected uint8, pixels 0..255, uint16 or float, got int64"),
        ({"images": pixels(2, 8, 8, 2)}, r"got \(2, 8, 8, 2\)"),
        ({"images": pixels(8, 8)}, r"got \(8, 8\)"),
        ({"images": pixels(2, 7, 8)}, "7x8"),
        ({"images": pixels(0, 8, 8)}, "at least one image"),
        ({"train_images": pixels(2, 8, 8), "test_images": pixels(2, 9, 9)}, "one image shape"),
        ({"train_images": pixels(2, 8, 8), "test_images": pixels(2, 8, 8, 3)}, "one image shape"),
        ({"images": np.array([{}])}, "cannot be read"),
        ({"train_images": pixels(0, 8, 8), "test_images": pixels(0, 8, 8)}, "at least one image"),
    ],
)
def test_read_images_invalid_arrays_raise_one_line(tmp_path, arrays, words):
    with pytest.raises(UserError, match=words) as raised:
        read_images(written(tmp_path / "x.npz", **arrays))
    assert "\n" not in str(raised.value)


def test_read_images_corrupt_or_missing_file_raises(tmp_path):
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
    for unknown in (tmp_path / "x.npy", tmp_path, tmp_path / "none"):
        with pytest.raises(UserError, match=r"expected an \.npz file; hf:NAME .*a folder"):
            read_images(unknown)
    with pytest.raises(UserError, match="not found"):
        read_images(tmp_path / "none.npz")


@pytest.mark.parametrize("memory_limit", [0, 1])
def test_read_images_of_a_folder_have_names_and_channels(tmp_path, memory_limit):
    images = pixels(5, 12, 12)
    for index, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{index}.png")
    (tmp_path / "bad.png").touch()
    options = ReadOptions(image_size=8, memory_limit=memory_limit, skip_unreadable=True)
    found = read_images(tmp_path, options, channels=3)
    assert (len(found), found.input_shape, found.names) == (5, (3, 8, 8), [f"{index}.png" for index in range(5)])
    assert len(found.warnings) == 1
    np.savez(tmp_path / "same.npz", images=images)
    expected = whole(read_images(tmp_path / "same.npz", ReadOptions(image_size=8)))
    assert torch.equal(whole(found), expected.expand(-1, 3, -1, -1))
