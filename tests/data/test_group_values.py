"""Values of a column by which exits are calibrated: of the data, also a feature, and of new inputs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedekd.data import FederatedDataModule
from fedekd.data.group_values import input_values
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
