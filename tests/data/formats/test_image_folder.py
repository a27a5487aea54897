from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fedekd.data import StoredInputs, load_samples
from fedekd.data.formats import read_unlabelled
from fedekd.data.formats.image_files import find_images
from fedekd.data.formats.image_folder import read_image_folder
from fedekd.data.join_images import join_images
from fedekd.data.raw import ReadOptions
from fedekd.errors import UserError

Written = Any


def test_folder_with_splits_has_images_classes_and_splits(written: Written) -> None:
    data = load_samples(written.source("folder"))
    np.testing.assert_array_equal(data.inputs[:, 0], written.images)
    assert data.targets.tolist() == written.labels.tolist()
    assert data.class_names == ("ant", "bee", "cat")
    assert data.split is not None
    assert data.split.tolist() == written.split.tolist()
    assert (data.name, data.warnings) == ("folder", ())


def test_folder_without_splits_reads_nested_and_no_hidden_files(written: Written) -> None:
    folder = written.folder / "folder" / "train"
    (folder / "ant" / "deep").mkdir()
    shutil.copy(folder / "bee" / "0003.png", folder / "ant" / "deep" / "x.PNG")
    for hidden in ("ant/.x.png", ".cache/ant/x.png"):
        (folder / hidden).parent.mkdir(parents=True, exist_ok=True)
        (folder / hidden).write_text("no image")
    (folder / "ant" / "notes.txt").touch()
    data = load_samples(str(folder))
    expected = [*written.images[:3], written.images[3], *written.images[3:9]]
    np.testing.assert_array_equal(data.inputs[:, 0], expected)
    assert data.split is None
    [line] = data.warnings
    assert "1 files that are no images are ignored, such as 'notes.txt'" in line


def test_folders_called_like_splits_are_classes_without_train(tmp_path: Path) -> None:
    for name in ("test", "control"):
        (tmp_path / name).mkdir()
        Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(tmp_path / name / "0.png")
    data = load_samples(str(tmp_path))
    assert (data.class_names, data.split) == (("control", "test"), None)


@pytest.mark.parametrize("place", ["x.png", "train/x.png"])
def test_image_outside_a_class_folder_raises(written: Written, place: str) -> None:
    shutil.copy(written.folder / "folder/train/ant/0000.png", written.folder / "folder" / place)
    with pytest.raises(UserError, match=rf"expected images in a subfolder per class, .*got '{place}'"):
        load_samples(written.source("folder"))
    found = read_unlabelled(written.folder / "folder", ReadOptions())
    assert len(found.inputs) == 25
    assert place in (found.names or [])


def test_one_image_is_read_without_a_label_only(written: Written) -> None:
    path = written.folder / "folder/train/ant/0000.png"
    found = read_unlabelled(shutil.copy(path, path.with_name("1.PNG")), ReadOptions())
    assert found.names == ["1.PNG"]
    np.testing.assert_array_equal(found.inputs, read_unlabelled(path.parent, ReadOptions()).inputs[:1])
    with pytest.raises(UserError, match=r"a folder with images in a subfolder per class; .*got '.*0000.png'"):
        load_samples(str(path))


def test_folder_of_no_known_format_raises(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.txt").touch()
    with pytest.raises(UserError, match=r"expected an \.npz file; .*; a folder with images .*got '.*a'"):
        load_samples(str(tmp_path / "a"))


@pytest.mark.parametrize("name", ["a.nii.gz", "a.nii", "a.DCM", "a.mha", "a.nrrd"])
def test_volumes_are_refused_with_what_is_supported(tmp_path: Path, name: str) -> None:
    (tmp_path / "scans" / "ill").mkdir(parents=True)
    (tmp_path / "scans" / "ill" / name).touch()
    for source in (tmp_path / "scans", tmp_path / "scans" / "ill" / name):
        with pytest.raises(UserError, match=rf"{name}'; volumes .* not supported\. Write 2D slices as PNG"):
            load_samples(str(source))
    with pytest.raises(UserError, match=r"site 'scans': .*volumes"):
        load_samples(sites=str(tmp_path))


def test_grey_and_colour_sites_are_joined_in_three_channels(tmp_path: Path) -> None:
    grey, colour = np.arange(64, dtype=np.uint8).reshape(8, 8), np.arange(192, dtype=np.uint8).reshape(8, 8, 3)
    for site, image in (("a", colour), ("b", grey)):
        for label in "01":
            (tmp_path / site / label).mkdir(parents=True)
            Image.fromarray(image).save(tmp_path / site / label / "0.png")
    deep = np.stack([grey, grey]).astype(np.uint16) * 1040
    np.savez(tmp_path / "c.npz", images=deep, labels=[0, 1])
    data = load_samples(sites={name: str(tmp_path / name) for name in ("a", "b")})
    assert data.inputs.shape == (4, 3, 8, 8)
    np.testing.assert_array_equal(data.inputs[2], np.repeat(grey[None], 3, 0))
    mixed = load_samples(sites={name: str(tmp_path / name) for name in ("b", "c.npz")})
    np.testing.assert_array_equal(mixed.inputs[0, 0], grey.astype(np.float32) / np.float32(127.5) - 1)
    np.testing.assert_allclose(mixed.inputs[2, 0], deep[0] / 65535 * 2 - 1, atol=1e-6)


def test_sites_of_two_sizes_raise_with_both_names(tmp_path: Path) -> None:
    for site, size in (("a", 8), ("b", 9)):
        for label in "01":
            (tmp_path / site / label).mkdir(parents=True)
            Image.fromarray(np.arange(size * 8, dtype=np.uint8).reshape(size, 8)).save(
                tmp_path / site / label / "0.png"
            )
    with pytest.raises(UserError, match=r"\(8, 8\) as in 'a', got \(9, 8\) in 'b'. Set --data.image_size"):
        load_samples(sites=str(tmp_path))
    assert load_samples(sites=str(tmp_path), image_size=8).inputs.shape == (4, 1, 8, 8)


def test_memory_limit_is_that_of_all_sites(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for site in ("a", "b"):
        for index in range(4):
            path = tmp_path / site / f"class{index % 2}" / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.random.default_rng(index).integers(0, 256, (16, 16), np.uint8)).save(path)
    one, both = 4 * 16**2 / 2**30, 8 * 16**2 / 2**30
    stored = load_samples(sites=str(tmp_path), memory_limit=one).inputs
    assert isinstance(stored, StoredInputs)
    monkeypatch.setattr(np, "concatenate", None)  # would hold all images twice
    resident = join_images({site: read_site(tmp_path / site) for site in "ab"}, ReadOptions(memory_limit=both)).inputs
    assert np.moveaxis(resident, -1, 1).flags.c_contiguous  # and so would the order of channels
    monkeypatch.undo()
    resident = load_samples(sites=str(tmp_path), memory_limit=both).inputs
    assert torch.equal(stored[torch.arange(8)], resident)


def read_site(folder: Path) -> Any:
    return read_image_folder(folder, ReadOptions(memory_limit=0)).inputs


@pytest.mark.parametrize("memory_limit", [0, 1])
def test_unreadable_image_of_a_site_is_named_or_left_out(tmp_path: Path, memory_limit: float) -> None:
    for index in range(8):
        path = tmp_path / f"site{index % 2}" / f"class{index % 4 // 2}" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(index).integers(0, 256, (16, 16), np.uint8)).save(path)
    path = tmp_path / "site1/class0/5.png"
    path.write_bytes(path.read_bytes()[:100])
    if memory_limit:
        with pytest.raises(UserError, match=r"^site 'site1': .*image 'class0/5\.png' cannot be read"):
            load_samples(sites=str(tmp_path), memory_limit=memory_limit)
    samples = load_samples(sites=str(tmp_path), memory_limit=memory_limit, skip_unreadable=True)
    assert samples.site is not None
    assert samples.site.tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert samples.targets.tolist() == [0, 0, 1, 1, 0, 1, 1]


def test_folder_with_links_to_folders_above_or_twice_has_each_image_once(tmp_path: Path) -> None:
    store = tmp_path / "store"
    for index in range(6):
        path = store / f"class{index % 2}" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(index).integers(0, 256, (8, 8), np.uint8)).save(path)
    folder = tmp_path / "site"
    folder.mkdir()
    for name in ("class0", "class1"):
        (folder / name).symlink_to(store / name)  # followed
    (store / "class0" / "up").symlink_to(tmp_path)
    (store / "class1" / "again").symlink_to(store / "class1")
    for path in (folder, store):
        samples = load_samples(str(path))
        assert (len(samples), samples.targets.tolist()) == (6, [0, 0, 0, 1, 1, 1])
    assert len(list(find_images(folder))) == 6


def test_folder_next_to_those_of_splits_is_refused(written: Written) -> None:
    folder = written.folder / "folder"
    shutil.copytree(folder / "train", folder / "external")
    with pytest.raises(UserError, match=r"expected no other folder next to those of the splits, got 'external'"):
        load_samples(str(folder))
