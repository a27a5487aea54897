from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedekd.data import load_samples
from fedekd.data.formats import read_unlabelled
from fedekd.data.raw import ReadOptions
from fedekd.errors import UserError

Written = Any


def rows(written: Written) -> list[list[str]]:
    return [line.split(",") for line in (written.folder / "list.csv").read_text().splitlines()]


def rewrite(written: Written, lines: list[list[str]]) -> str:
    path = written.folder / "list.csv"
    path.write_text("\n".join(",".join(line) for line in lines) + "\n")
    return str(path)


def test_manifest_has_images_classes_splits_and_groups(written: Written) -> None:
    data = load_samples(written.source("manifest"), group_column="patient", site_column="patient")
    np.testing.assert_array_equal(data.inputs[:, 0], written.images)
    assert data.class_names == ("ant", "bee", "cat")
    assert data.split is not None
    assert data.group is not None
    assert data.split.tolist() == written.split.tolist()
    assert data.group.tolist() == [i // 2 for i in range(24)]
    assert data.site_names[:2] == ("p000", "p001")


def test_manifest_takes_absolute_paths_and_other_columns(written: Written) -> None:
    lines = rows(written)
    lines = [["diagnosis", "path"], *([str(i % 2), str(written.folder / line[0])] for i, line in enumerate(lines[1:]))]
    data = load_samples(rewrite(written, lines), target_column="diagnosis")
    assert (data.targets.tolist(), data.num_classes, data.split) == ([0, 1] * 12, 2, None)


def test_manifest_real_targets_need_regression(written: Written) -> None:
    lines = rows(written)
    lines = [["path", "label"], *([line[0], str(i + 0.4)] for i, line in enumerate(lines[1:]))]
    data = load_samples(rewrite(written, lines), task="regression")
    assert data.num_classes == 0
    np.testing.assert_allclose(data.targets, np.arange(24) + 0.4, rtol=1e-6)
    with pytest.raises(
        UserError, match=r"whole numbers, got 0\.4\. For real-valued targets set --data.task regression"
    ):
        load_samples(written.source("manifest"))


def test_manifest_site_column_split_makes_splits_sites(written: Written) -> None:
    for kind in ("folder", "manifest", "npz"):
        data = load_samples(written.source(kind), site_column="split")
        assert data.site_names == ("train", "val", "test")
        assert data.site is not None
        assert data.site.tolist() == written.split.tolist()
        assert data.split is None


@pytest.mark.parametrize(
    ("column", "value", "options", "words"),
    [
        (0, "gone.png", {}, "'list.csv': expected existing files in the column path, got 'gone.png' in row 3"),
        (0, "", {}, "'list.csv': expected a path in each row of the column 'path', got none in row 3"),
        (
            1,
            "",
            {},
            "data.target_column: 'list.csv': expected a label in each row of the column 'label', got none in row 3",
        ),
        (2, "training set", {}, "expected train, val or test in the column split, got 'training set' in row 3"),
        (
            3,
            " ",
            {"group_column": "patient"},
            "expected a group in each row of the column 'patient', got none in row 3",
        ),
        (3, "", {"site_column": "patient"}, "data.site_column: 'list.csv': expected a site in each row"),
        (1, "?", {}, "expected a label in each row of the column 'label', got none in row 3"),
        (1, " NA ", {}, "expected a label in each row of the column 'label', got none in row 3"),
        (
            3,
            "n/a",
            {"group_column": "patient"},
            "expected a group in each row of the column 'patient', got none in row 3",
        ),
    ],
)
def test_manifest_invalid_row_raises_with_its_number(
    written: Written, column: int, value: str, options: dict[str, Any], words: str
) -> None:
    lines = rows(written)
    lines[3][column] = value
    with pytest.raises(UserError) as caught:
        load_samples(rewrite(written, lines), **options)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"target_column": "lable"}, r"\(columns: path, label, split, patient\), got 'lable'. Did you mean 'label'\?"),
        ({"group_column": "x"}, r"data.group_column: .*got 'x'. Choose from: label, path, patient, split"),
        ({"site_column": "zone"}, r"data.site_column: .*got 'zone'. Choose from"),
    ],
)
def test_manifest_missing_column_names_those_present(written: Written, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        load_samples(written.source("manifest"), **options)


def test_manifest_numbers_with_nan_raise(written: Written) -> None:
    lines = [[line[0], str(i % 3)] for i, line in enumerate(rows(written)[1:])]
    lines[4][1] = "NaN"
    with pytest.raises(UserError, match=r"got none in row 5 \(1 in all\)"):
        load_samples(rewrite(written, [["path", "label"], *lines]))
    lines = [[line[0], "none" if i % 2 else "mass"] for i, line in enumerate(lines)]
    assert load_samples(rewrite(written, [["path", "label"], *lines])).class_names == ("mass", "none")


def test_manifest_skips_unreadable_and_missing_images(written: Written) -> None:
    lines = rows(written)
    lines[1][0] = "gone.png"
    (written.folder / lines[4][0]).write_text("no image")
    data = load_samples(rewrite(written, lines), skip_unreadable=True, group_column="patient")
    kept = [i for i in range(24) if i not in (0, 3)]
    np.testing.assert_array_equal(data.inputs[:, 0], written.images[kept])
    assert data.targets.tolist() == written.labels[kept].tolist()
    assert data.group is not None
    assert data.group.tolist() == [i // 2 for i in kept]
    [line] = data.warnings
    assert "2 of 24 images cannot be read and are left out: 'gone.png'" in line


@pytest.mark.parametrize("text", ["path,label\n", "path,label\na.png,b\nb.png,c,d\n", 'path,label\n"a'])
def test_manifest_invalid_file_raises(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.csv").write_text(text)
    with pytest.raises(UserError, match=r"x\.csv"):
        load_samples(str(tmp_path / "x.csv"))


def test_read_unlabelled_manifest_has_names_and_ignores_labels(written: Written) -> None:
    lines = [[line[0]] for line in rows(written)]
    found = read_unlabelled(Path(rewrite(written, lines)), ReadOptions())
    assert found.names == [line[0] for line in lines[1:]]
    np.testing.assert_array_equal(found.inputs[..., 0], written.images)
