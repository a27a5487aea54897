"""Values of a column by which exits are calibrated: of the data, also a feature, and of new inputs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedekd.data import FederatedDataModule, load_samples
from fedekd.data.group_values import input_values, is_one_to_one
from fedekd.errors import UserError


@pytest.fixture
def table(tmp_path: Path) -> Path:
    rows = [f"{'fm'[row % 2]},{20 + row},{'AB'[row % 3 > 0]},{row % 2}" for row in range(40)]
    path = tmp_path / "table.csv"
    path.write_text("\n".join(["sex,age,scanner,label", *rows]) + "\n")
    return path


def test_group_values_of_a_feature_and_of_an_ignored_column_are_those_of_the_rows(table: Path) -> None:
    data = FederatedDataModule(str(table), num_clients=2, alpha=5.0, ignored_columns=["scanner"])
    assert data.group_values("sex").tolist() == ["f", "m"] * 20
    assert data.group_values("scanner").tolist() == ["AB"[row % 3 > 0] for row in range(40)]
    with pytest.raises(UserError, match="groups: expected a column"):
        data.group_values("site")


def test_group_values_of_a_table_with_many_patients(tmp_path: Path) -> None:
    rows = [f"{row},P{row // 2},{'fm'[row % 2]},{row % 2}" for row in range(2002)]  # more names than categories
    (tmp_path / "table.csv").write_text("\n".join(["age,patient,sex,label", *rows]) + "\n")
    data = FederatedDataModule(str(tmp_path / "table.csv"), num_clients=1, group_column="patient")
    assert data.group_values("sex").tolist() == ["f", "m"] * 1001


def test_group_values_missing_value_raises(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text(
        "age,scanner,label\n" + "".join(f"{row},{'A' if row != 7 else ''},{row % 2}\n" for row in range(40))
    )
    data = FederatedDataModule(str(path), num_clients=1, alpha=5.0, ignored_columns=["scanner"])
    with pytest.raises(UserError, match="column 'scanner': expected a group in every row, got none in row 8"):
        data.group_values("scanner")


def test_input_values_of_tables_manifests_and_arrays(table: Path, tmp_path: Path) -> None:
    assert input_values(table, "scanner")[:3] == ["A", "B", "B"]
    assert input_values(table, "site") is None
    for name in "ab":
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / f"{name}.png")
    manifest = tmp_path / "images.csv"
    manifest.write_text("path,scanner\na.png,A\nb.png,\n")
    assert input_values(manifest, "scanner") == ["A", None]
    assert input_values(manifest, "scanner", ["b.png"]) == [None]
    np.savez(tmp_path / "new.npz", images=np.zeros((2, 8, 8), np.uint8), scanner=np.asarray([1, 2]))
    assert input_values(tmp_path / "new.npz", "scanner") == ["1", "2"]
    assert input_values(tmp_path / "new.npz", "site") is None
    assert input_values(tmp_path, "scanner") is None


@pytest.mark.parametrize(
    "values",
    [np.asarray([1.0, 2.5, 1.0]), np.asarray(["A ", "B", "A"]), np.asarray([b"A", b"B", b"A"])],
    ids=["floats", "spaces", "bytes"],
)
def test_group_values_have_the_names_of_input_values(tmp_path: Path, values: np.ndarray) -> None:
    arrays = {"images": np.arange(192, dtype=np.uint8).reshape(3, 8, 8), "labels": np.asarray([0, 1, 1])}
    np.savez(tmp_path / "data.npz", **arrays, scanner=values)
    samples = load_samples(str(tmp_path / "data.npz"), group_column="scanner")
    names = [samples.group_names[number] for number in samples.group]
    assert names == input_values(tmp_path / "data.npz", "scanner")
    assert names[0] == names[2] in ("1", "A")
    assert samples.group.tolist() == [0, 1, 0]


def test_is_one_to_one_is_true_for_renamed_labels_only() -> None:
    labels = np.asarray([0, 1, 2, 0])
    assert is_one_to_one(np.asarray(["b", "c", "a", "b"]), labels)
    assert not is_one_to_one(np.asarray(["b", "c", "a", "c"]), labels)
    assert not is_one_to_one(np.asarray(["a", "b", "b", "a"]), labels)
    assert not is_one_to_one(np.asarray(["a", "a"]), np.asarray([0, 0]))
