from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fedekd.data import load_samples
from fedekd.data.tiny_imagenet import read_tiny_imagenet
from fedekd.errors import UserError

#: In the order of wnids.txt, which is not that of the names.
WNIDS = ("n02124075", "n01443537", "n04067472")


def write_image(path: Path, level: int, mode: str = "RGB", size: tuple[int, int] = (64, 64)) -> None:
    """A JPEG of one level, red in colour: that is what it decodes to, give or take a little."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, (level, 0, 0) if mode == "RGB" else level).save(path, "JPEG", quality=95)


def write_folder(folder: Path, wnids: tuple[str, ...] = WNIDS, train: int = 6) -> Path:
    """The official structure. Levels tell the images apart; the last of each class is grey, and so is val_0."""
    for number, wnid in enumerate(wnids):
        for index in (*range(1, train), 0):  # listed as they came, or backwards: not sorted
            mode = "L" if index == train - 1 else "RGB"
            write_image(folder / f"train/{wnid}/images/{wnid}_{index}.JPEG", (60 * number + 10 * index) % 256, mode)
        boxes = "".join(f"{wnid}_{index}.JPEG\t0\t10\t63\t58\n" for index in range(train))
        (folder / f"train/{wnid}/{wnid}_boxes.txt").write_text(boxes)
    lines = []
    for index, wnid in enumerate(reversed(wnids)):
        write_image(folder / f"val/images/val_{index}.JPEG", (200 + 10 * index) % 256, "RGB" if index else "L")
        lines.append(f"val_{index}.JPEG\t{wnid}\t0\t32\t44\t62\n")
    (folder / "val/val_annotations.txt").write_text("".join(lines))
    write_image(folder / "test/images/test_0.JPEG", 0)
    (folder / "wnids.txt").write_text("\n".join(wnids))
    (folder / "words.txt").write_text("".join(f"{wnid}\ta word\n" for wnid in sorted(wnids)))
    return folder


def levels(images: Any) -> list[int]:
    """The red level of each image."""
    return [round(float(level)) for level in images[..., 0].mean(axis=(1, 2))]


def test_read_official_folder(tmp_path: Path) -> None:
    splits = read_tiny_imagenet(write_folder(tmp_path), num_classes=3)
    assert list(splits) == ["train", "test"]
    train, train_labels = splits["train"]
    test, test_labels = splits["test"]
    assert (train.shape, train.dtype) == ((18, 64, 64, 3), np.uint8)
    assert np.abs(np.subtract(levels(train), range(0, 180, 10))).max() <= 1
    assert train_labels.tolist() == [0] * 6 + [1] * 6 + [2] * 6
    assert test.shape == (3, 64, 64, 3)
    assert np.abs(np.subtract(levels(test), [200, 210, 220])).max() <= 1
    assert test_labels.tolist() == [2, 1, 0]


def test_read_pixels_equal_file_and_grey_becomes_rgb(tmp_path: Path) -> None:
    write_folder(tmp_path)
    path = tmp_path / f"train/{WNIDS[1]}/images/{WNIDS[1]}_0.JPEG"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path, "JPEG")
    train, _ = read_tiny_imagenet(tmp_path, num_classes=3)["train"]
    with Image.open(path) as image:
        assert np.array_equal(train[6], np.asarray(image))
    assert np.array_equal(train[11], np.repeat(train[11][..., :1], 3, axis=-1))
    assert not np.array_equal(train[1][..., 0], train[1][..., 1])


def test_load_by_name(tmp_path: Path) -> None:
    wnids = tuple(f"n{(7 * number) % 200:08d}" for number in range(200))
    write_folder(tmp_path / "tiny-imagenet-200", wnids, train=1)
    data = load_samples("tinyimagenet", tmp_path, download=False)
    assert (data.name, data.task, data.num_classes) == ("tinyimagenet", "classification", 200)
    assert data.inputs.shape == (400, 3, 64, 64)
    assert data.split_sizes == {"train": 200, "val": 0, "test": 200}
    assert data.targets.tolist() == [*range(200), *reversed(range(200))]


def test_load_needs_at_most_twice_the_memory_of_the_images(tmp_path: Path) -> None:
    wnids = tuple(f"n{number:08d}" for number in range(200))
    write_folder(tmp_path / "tiny-imagenet-200", wnids, train=2)
    load_samples("tinyimagenet", tmp_path)  # what is imported meanwhile is not to be counted
    tracemalloc.start()
    data = load_samples("tinyimagenet", tmp_path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2.3 * data.inputs.nbytes


@pytest.mark.parametrize("download", [True, False])
def test_missing_folder_raises(tmp_path: Path, download: bool) -> None:
    with pytest.raises(UserError) as caught:
        load_samples("tinyimagenet", tmp_path, download=download)
    line = str(caught.value)
    assert "\n" not in line
    assert "by hand from http://cs231n.stanford.edu/tiny-imagenet-200.zip" in line
    assert line.endswith("tinyimagenet.npz' in MedMNIST's layout or as 'tiny-imagenet-200/*' in this folder.")


WNIDS_FILE = "wnids.txt"
ANNOTATIONS = "val/val_annotations.txt"
TRAIN_0 = f"train/{WNIDS[0]}/images/{WNIDS[0]}_0.JPEG"
VAL_2 = "val/images/val_2.JPEG"
LAST_CLASS = f"train/{WNIDS[2]}/images"

Damage = Callable[[Path], object]


def removed(file: str) -> Damage:
    return lambda folder: (folder / file).unlink()


def replaced(file: str, content: bytes) -> Damage:
    return lambda folder: (folder / file).write_bytes(content)


def annotated(line: str) -> Damage:
    return lambda folder: (folder / ANNOTATIONS).write_text((folder / ANNOTATIONS).read_text() + line)


def cut_short(folder: Path) -> None:
    (folder / VAL_2).write_bytes((folder / VAL_2).read_bytes()[:-200])


def empty_class(folder: Path) -> None:
    for path in (folder / LAST_CLASS).iterdir():
        path.unlink()


def missing_class(folder: Path) -> None:
    (folder / f"train/{WNIDS[2]}").rename(folder / "train/n00000000")


def wrong_size(folder: Path) -> None:
    write_image(folder / TRAIN_0, 9, size=(64, 32))


DAMAGES: dict[str, tuple[Damage, str, str]] = {
    "no_wnids": (removed(WNIDS_FILE), WNIDS_FILE, "cannot be read (FileNotFoundError"),
    "binary_wnids": (replaced(WNIDS_FILE, b"\xff\xfe"), WNIDS_FILE, "cannot be read (UnicodeDecodeError"),
    "no_classes": (replaced(WNIDS_FILE, b""), WNIDS_FILE, "expected 3 classes, got 0"),
    "same_class": (replaced(WNIDS_FILE, f"{WNIDS[0]}\n".encode() * 3), WNIDS_FILE, "expected 3 classes, got 1"),
    "missing_class": (missing_class, LAST_CLASS, "expected .JPEG files, got none"),
    "empty_class": (empty_class, LAST_CLASS, "expected .JPEG files, got none"),
    "no_annotations": (removed(ANNOTATIONS), ANNOTATIONS, "cannot be read (FileNotFoundError"),
    "empty_annotations": (replaced(ANNOTATIONS, b""), "val/images/val_0.JPEG", "expected a line in '"),
    "unlabelled": (
        replaced(ANNOTATIONS, f"val_0.JPEG\t{WNIDS[0]}\n".encode()),
        "val/images/val_1.JPEG",
        "expected a line in '",
    ),
    "unknown_wnid": (
        annotated("val_0.JPEG\tn9\t0\t0\t9\t9"),
        ANNOTATIONS,
        "'val_0.JPEG' has the class 'n9', which is not in wnids.txt",
    ),
    "no_wnid": (annotated("val_0.JPEG"), ANNOTATIONS, "'val_0.JPEG' has the class '', which"),
    "annotated_twice": (annotated(f"val_0.JPEG\t{WNIDS[0]}"), ANNOTATIONS, "lists 'val_0.JPEG' twice"),
    "absent": (removed(VAL_2), ANNOTATIONS, "lists 'val_2.JPEG', but the file '"),
    "no_jpeg": (replaced(TRAIN_0, b"<html>"), TRAIN_0, "cannot be read (UnidentifiedImageError"),
    "cut_short": (cut_short, VAL_2, "cannot be read (OSError"),
    "wrong_size": (wrong_size, TRAIN_0, "expected 64x64 pixels, got 32x64"),
}


@pytest.mark.parametrize(("damage", "file", "words"), DAMAGES.values(), ids=DAMAGES)
def test_corrupt_file_is_named(tmp_path: Path, damage: Damage, file: str, words: str) -> None:
    damage(write_folder(tmp_path))
    with pytest.raises(UserError) as caught:
        read_tiny_imagenet(tmp_path, num_classes=3)
    line = str(caught.value)
    assert line.startswith(f"data.dataset: '{tmp_path / file}': {words}")
    assert line.endswith(". Unzip tiny-imagenet-200.zip again.")
    assert "\n" not in line


def test_empty_validation_raises(tmp_path: Path) -> None:
    write_folder(tmp_path)
    for path in (tmp_path / "val/images").iterdir():
        path.unlink()
    (tmp_path / ANNOTATIONS).write_text("\n")
    with pytest.raises(UserError, match=r"val_annotations\.txt': the file is empty"):
        read_tiny_imagenet(tmp_path, num_classes=3)


def test_load_corrupt_folder_names_the_file(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "tiny-imagenet-200")
    with pytest.raises(UserError, match=r"^data\.dataset: '.*/wnids\.txt': expected 200 classes, got 3\. Unzip"):
        load_samples("tinyimagenet", folder.parent)
