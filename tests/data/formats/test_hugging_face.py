from __future__ import annotations

import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fedekd.data import load_samples
from fedekd.data.formats import read_path
from fedekd.data.raw import ReadOptions
from fedekd.errors import UserError

Written = Any


def test_package_missing_raises_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"'hf:mnist' needs the package datasets .*pip install 'fedekd\[hf\]'"):
        load_samples("hf:mnist")


@pytest.fixture
def saved(written: Written, monkeypatch: pytest.MonkeyPatch) -> str:
    """A copy in a folder; nothing is downloaded."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets.disable_progress_bars()
    features = datasets.Features(
        image=datasets.Image(), label=datasets.ClassLabel(names=["ant", "bee", "cat"]), patient=datasets.Value("string")
    )
    parts = {}
    for number, split in enumerate(("train", "validation", "test", "extra")):
        chosen = np.flatnonzero(written.split == number % 3)
        parts[split] = datasets.Dataset.from_dict(
            {
                "image": [Image.fromarray(image) for image in written.images[chosen]],
                "label": written.labels[chosen].tolist(),
                "patient": written.patient[chosen].tolist(),
            },
            features=features,
        )
    datasets.DatasetDict(parts).save_to_disk(str(written.folder / "hf"))
    return f"hf:{written.folder / 'hf'}"


@pytest.mark.hf
def test_saved_dataset_has_images_classes_splits_and_groups(written: Written, saved: str) -> None:
    data = load_samples(saved, group_column="patient")
    same = load_samples(written.source("npz"), group_column="patient")
    assert data.digest() == same.digest()
    assert data.class_names == ("ant", "bee", "cat")
    assert data.split is not None
    assert data.group is not None
    assert same.split is not None
    assert data.split.tolist() == same.split.tolist()
    assert data.group.tolist() == [i // 2 for i in range(24)]
    [line] = data.warnings
    assert "the splits extra are left out" in line


@pytest.mark.hf
def test_dataset_above_the_limit_is_read_lazily_with_the_same_values(written: Written, saved: str) -> None:
    lazy = read_path(Path(saved), ReadOptions(memory_limit=0)).inputs
    lazy = pickle.loads(pickle.dumps(lazy))
    assert not isinstance(lazy.files, list)
    np.testing.assert_array_equal(np.stack([lazy[i] for i in range(len(lazy))])[..., 0], written.images)


@pytest.mark.hf
def test_folder_is_read_by_load_dataset(written: Written, saved: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(written.folder / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(written.folder / "cache"))
    data = load_samples(f"hf:{written.folder / 'folder'}")
    assert data.digest() == load_samples(written.source("folder")).digest()


@pytest.mark.hf
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"target_column": "lable"}, r"data.target_column: .*columns: image, label, patient.*Did you mean 'label'\?"),
        ({"site_column": "hospital"}, r"data.site_column: expected a column of .*got 'hospital'"),
    ],
)
def test_missing_column_raises(saved: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        load_samples(saved, **options)


@pytest.mark.hf
def test_unknown_dataset_raises_one_line(saved: str) -> None:
    with pytest.raises(UserError, match=r"cannot load 'hf:.*nowhere'") as caught:
        load_samples(f"{saved}/nowhere")
    assert "\n" not in str(caught.value)
