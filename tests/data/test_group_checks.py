"""Groups of a file that are at two sites, or of unequal sizes, end to end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from fedekd.data import FederatedDataModule
from fedekd.errors import UserError

Write = Any


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a table of patients with the columns `hospital`, `patient` and optionally `split`."""

    def write(patients: npt.ArrayLike, hospitals: npt.ArrayLike, splits: npt.ArrayLike | None = None) -> str:
        lines = ["age,label,hospital,patient" + ("" if splits is None else ",split")]
        columns = [np.asarray(patients), np.asarray(hospitals), *([] if splits is None else [np.asarray(splits)])]
        for row, values in enumerate(zip(*columns, strict=True)):
            hospital, patient = values[1], values[0]
            lines.append(",".join([str(row), str(row % 2), str(hospital), f"p{patient}", *map(str, values[2:])]))
        path = tmp_path / "patients.csv"
        path.write_text("\n".join(lines) + "\n")
        return str(path)

    return write


def read(path: str, **options: Any) -> FederatedDataModule:
    options = {"site_column": "hospital", "group_column": "patient", **options}
    return FederatedDataModule(path, **options)


def of_groups(data: FederatedDataModule) -> list[str]:
    return [line for line in data.warnings() if line.startswith("data.group_column")]


def test_group_column_of_a_file_keeps_groups_in_one_split_of_a_site(write: Write) -> None:
    patients = np.arange(120) // 4
    data = read(write(patients, np.where(np.arange(120) < 60, "a", "b")))
    for splits in data.clients:
        parts = [set(patients[part.numpy()]) for part in (splits.train, splits.validation, splits.test)]
        assert sum(map(len, parts)) == len(set.union(*parts)) == 15
    assert of_groups(data) == []


def test_groups_at_two_sites_in_different_splits_are_reported(write: Write) -> None:
    data = read(write(np.arange(120) // 4, np.where(np.arange(120) % 2 == 0, "a", "b")))
    patients, where = np.arange(120) // 4, np.zeros(120, np.int64)
    for splits in data.clients:
        where[splits.validation.numpy()], where[splits.test.numpy()] = 1, 2
    apart = sum(len(set(where[patients == patient])) > 1 for patient in range(30))
    assert 0 < apart < 30
    [line] = of_groups(data)
    assert f"{apart} of 30 groups are in different splits at 2 sites, such as 'p" in line


def test_given_splits_with_a_group_apart_at_two_sites_raise(write: Write) -> None:
    hospitals = np.repeat(["a", "b"], 6)
    splits = ["train", "train", "val", "val", "test", "test"] * 2
    apart = [0, 1, 2, 3, 4, 5, 5, 6, 7, 8, 9, 9]
    with pytest.raises(UserError, match=r"data.splits: expected each group in one split at all sites, got 1 .* 'p5'"):
        read(write(apart, hospitals, splits), splits="given").setup()
    same = [0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5]
    assert of_groups(read(write(same, hospitals, splits), splits="given")) == []


def test_groups_of_unequal_size_that_spoil_the_shares_are_reported(write: Write) -> None:
    data = read(write([0] * 97 + [1, 2, 3], ["a"] * 100), seed=0)
    [splits] = data.clients
    assert len(splits.train) < 30 or not len(splits.validation)
    [line] = of_groups(data)
    sizes = f"{len(splits.train)}/{len(splits.validation)}/{len(splits.test)}"
    assert f"'a' ({sizes})" in line
    assert of_groups(read(write(np.arange(100) // 4, ["a"] * 100))) == []
