"""CSV and Parquet tables: columns, values and bad input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from fedekd.data import FederatedDataModule, load_samples
from fedekd.data.columns import Column
from fedekd.data.formats import format_of
from fedekd.data.formats.table import read_features
from fedekd.errors import UserError

FRAME = pd.DataFrame(
    {
        "age": [61.5, 40.0, np.nan, 0.1 + 0.2, 55.0, 60.0],
        "visits": [1, 2, 3, 4, 5, 6],
        "sex": ["f", "m", None, "m", "f", "m"],
        "smoker": [True, False, True, True, False, False],
        "code": [3.0, 7.0, np.nan, 3.0, 7.0, 6.0],
        "hospital": ["a", "a", "a", "b", "b", "b"],
        "patient": ["p1", "p2", "p3", "p4", "p5", "p6"],
        "label": ["ill", "well", "ill", "well", "ill", "well"],
    }
)
OPTIONS: dict[str, Any] = {
    "site_column": "hospital",
    "group_column": "patient",
    "categorical_columns": ["code"],
}


def write(folder: Path, frame: pd.DataFrame = FRAME, name: str = "table.csv") -> str:
    path = folder / name
    if path.suffix == ".csv":
        frame.to_csv(path, index=False)
    else:
        frame.to_parquet(path)
    return str(path)


def test_read_table_columns_have_kinds_categories_and_roles(tmp_path: Path) -> None:
    samples = load_samples(write(tmp_path), **OPTIONS)
    assert [column.name for column in samples.columns] == ["age", "visits", "sex", "smoker", "code"]
    assert [column.categories for column in samples.columns] == [
        *((), (), ("f", "m"), ("False", "True"), ("3", "6", "7")),
    ]
    assert samples.class_names == ("ill", "well")
    assert samples.site_names == ("a", "b")
    assert samples.site is not None
    assert samples.site.tolist() == [0, 0, 0, 1, 1, 1]
    assert samples.inputs[3].tolist() == [0.1 + 0.2, 4.0, 1.0, 1.0, 0.0]
    assert samples.inputs[2].isnan().tolist() == [True, False, True, False, True]
    assert samples.feature_names == (
        *("age", "visits", "sex=f", "sex=m", "smoker=False", "smoker=True", "code=3", "code=6", "code=7"),
    )


def test_read_table_csv_and_parquet_give_identical_samples(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    csv, parquet = (load_samples(write(tmp_path, name=f"t.{kind}"), **OPTIONS) for kind in ("csv", "parquet"))
    assert csv.columns == parquet.columns
    for name in ("inputs", "targets", "site", "group"):
        assert torch.equal(torch.nan_to_num(getattr(csv, name)), torch.nan_to_num(getattr(parquet, name)))
    assert csv.digest() == parquet.digest()


def test_read_table_csv_numbers_are_exact(tmp_path: Path) -> None:
    numbers = np.random.default_rng(0).lognormal(0, 20, 1000)
    samples = load_samples(write(tmp_path, pd.DataFrame({"x": numbers, "label": [0, 1] * 500})))
    assert np.array_equal(samples.inputs[:, 0].numpy(), numbers)


def test_read_table_given_splits_are_no_feature(tmp_path: Path) -> None:
    frame = FRAME.assign(split=["train", "val", "test", "train", "validation", "test"])
    samples = load_samples(write(tmp_path, frame), splits="given", **OPTIONS)
    assert samples.split is not None
    assert samples.split.tolist() == [0, 1, 2, 0, 1, 2]
    assert "split" not in [column.name for column in samples.columns]


def test_read_table_regression_targets_are_real_also_if_whole(tmp_path: Path) -> None:
    path = write(tmp_path)
    options = {**OPTIONS, "target_column": "visits", "ignored_columns": ["label"]}
    assert load_samples(path, task="regression", **options).num_classes == 0
    assert load_samples(path, task="regression", num_classes=7, **options).num_classes == 7


def test_format_of_csv_with_a_path_column_is_no_table(tmp_path: Path) -> None:
    (tmp_path / "manifest.csv").write_text("path,label\na.png,0\n")
    row = format_of(tmp_path / "manifest.csv")
    assert row is None or "table" not in row.title


def changed(column: str, row: int, value: Any) -> pd.DataFrame:
    frame = FRAME.astype({column: object})
    frame.loc[row - 1, column] = value
    return frame


@pytest.mark.parametrize(
    ("frame", "options", "words"),
    [
        (changed("age", 4, "old"), {}, ["table.csv", "'age'", "'old'", "row 4", "categorical_columns"]),
        (changed("age", 2, "inf"), {}, ["table.csv", "'age'", "inf", "row 2"]),
        (changed("label", 3, None), {}, ["table.csv", "'label'", "target", "row 3"]),
        (changed("hospital", 5, None), {}, ["table.csv", "'hospital'", "site", "row 5"]),
        (FRAME, {"target_column": "lable"}, ["data.target_column", "table.csv", "'lable'", "'label'"]),
        (FRAME, {"group_column": "patien"}, ["data.group_column", "'patient'"]),
        (FRAME, {"ignored_columns": ["Age"]}, ["data.ignored_columns", "'age'"]),
        (FRAME, {"categories": {"sx": ["f"]}}, ["data.categories", "'sex'"]),
        (FRAME, {"categories": {"sex": ["f", "d"]}}, ["table.csv", "'sex'", "'m'", "row 2", "data.categories"]),
        (FRAME, {"categories": {"code": [3, 7]}}, ["'code'", "'6'", "row 6"]),
        (FRAME, {"task": "regression"}, ["'label'", "'ill'", "row 1"]),
        (FRAME.assign(split="fitting"), {"splits": "given"}, ["column split", "'fitting'", "row 1"]),
        (FRAME[["label", "hospital", "patient"]], {"categorical_columns": []}, ["feature", "none"]),
        (FRAME.head(0), {}, ["table.csv", "at least one row"]),
    ],
)
def test_read_table_bad_value_is_one_line_with_file_column_and_row(
    frame: pd.DataFrame, options: dict[str, Any], words: list[str], tmp_path: Path
) -> None:
    path = write(tmp_path, frame)
    with pytest.raises(UserError) as raised:
        load_samples(path, **{**OPTIONS, **options})
    assert "\n" not in str(raised.value)
    for word in words:
        assert word in str(raised.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"age,label\n1,0,9\n2,1,9\n", "table.csv' cannot be read: ValueError: the rows have more cells"),
        (b"age,label\n1,0\n2,1,9\n", "table.csv"),
        (b",age,label\n0,1,0\n", "to_csv(index=False)"),
        (b"age,age,label\n0,1,0\n", "'age' twice"),
        (b"age;label\n0;1\n", "table.csv': expected commas between columns, got 'age;label'"),
        (b"", "table.csv"),
        (b"age,label\n\xff\xfe,1\n", "table.csv"),
        (None, "no file"),
    ],
)
def test_read_table_broken_csv_is_one_line(content: bytes | None, words: str, tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as raised:
        load_samples(str(path))
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)


def test_read_table_broken_parquet_is_one_line(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    (tmp_path / "table.parquet").write_bytes(b"PAR1 is not enough")
    with pytest.raises(UserError, match=r"table\.parquet' cannot be read"):
        load_samples(str(tmp_path / "table.parquet"))


def test_read_table_parquet_without_pyarrow_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "table.parquet").touch()
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"pip install 'fedekd\[parquet\]'$"):
        load_samples(str(tmp_path / "table.parquet"))


def sites(folder: Path, **frames: pd.DataFrame) -> dict[str, str]:
    return {name: write(folder, frame, f"{name}.csv") for name, frame in frames.items()}


def test_join_tables_categories_are_the_union_of_all_sites(tmp_path: Path) -> None:
    first, second = FRAME.iloc[:3], FRAME.iloc[3:].assign(sex=["x", "x", None], code=np.nan)
    samples = load_samples(sites=sites(tmp_path, one=first, two=second), categorical_columns=["code"])
    assert samples.site_names == ("one", "two")
    assert samples.columns[2].categories == ("f", "m", "x")
    assert samples.columns[4].categories == ("3", "7")


def test_join_tables_empty_column_takes_the_kind_of_another_site(tmp_path: Path) -> None:
    samples = load_samples(sites=sites(tmp_path, one=FRAME.assign(sex=np.nan), two=FRAME, three=FRAME.assign(age="")))
    assert [column.kind for column in samples.columns[:3]] == ["numeric", "numeric", "categorical"]
    assert samples.inputs[:6, 2].isnan().all()


@pytest.mark.parametrize(
    ("second", "words"),
    [
        (FRAME.drop(columns="age"), ["'two'", "without age"]),
        (FRAME.assign(height=1), ["'two'", "with height"]),
        (FRAME[["visits", "age", *FRAME.columns[2:]]], ["'two'", "order", "'age'", "'visits'"]),
        (FRAME.assign(age=["old"] * 6), ["'two'", "'age'", "'old'", "row 1"]),
    ],
)
def test_join_tables_other_columns_name_site_and_column(second: pd.DataFrame, words: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError) as raised:
        load_samples(sites=sites(tmp_path, one=FRAME, two=second))
    for word in words:
        assert word in str(raised.value)


def test_join_tables_identifier_is_an_error_or_a_warning(tmp_path: Path) -> None:
    frame = pd.DataFrame({"x": range(1200), "name": [f"n{row}" for row in range(1200)], "label": [0, 1] * 600})
    with pytest.raises(UserError, match=r"'name': expected at most 1,000 categories, got 1,200"):
        load_samples(write(tmp_path, frame))
    assert any("'name' has 100 categories" in line for line in load_samples(write(tmp_path, frame.head(100))).warnings)


def test_datamodule_table_has_a_client_per_site(tmp_path: Path) -> None:
    frame = pd.concat([FRAME] * 4, ignore_index=True)
    data = FederatedDataModule(write(tmp_path, frame), site_column="hospital", ignored_columns=["patient"])
    assert [splits.name for splits in data.clients] == ["a", "b"]
    assert data.samples.inputs.dtype == torch.float32
    assert data.samples.inputs.isfinite().all()


@pytest.mark.parametrize("start", ["\n", "  \n\n"])
def test_read_table_blank_lines_before_the_header_are_skipped(tmp_path: Path, start: str) -> None:
    path = Path(write(tmp_path))
    path.write_text(start + path.read_text())
    samples = load_samples(str(path), **OPTIONS)
    assert len(samples) == 6
    assert [column.name for column in samples.columns] == ["age", "visits", "sex", "smoker", "code"]


def test_read_table_numbers_of_splits_are_given_splits(tmp_path: Path) -> None:
    samples = load_samples(write(tmp_path, FRAME.assign(split=[0, 1, 2, 0, 1, 2])), splits="given", **OPTIONS)
    assert samples.split is not None
    assert samples.split.tolist() == [0, 1, 2, 0, 1, 2]


def test_table_of_names_of_images_is_refused(tmp_path: Path) -> None:
    pd.DataFrame({"Image": ["a.png", "b.PNG", None], "label": [0, 1, 0]}).to_csv(tmp_path / "list.csv", index=False)
    with pytest.raises(UserError, match=r"column 'Image': expected features, got names of images\. Rename it to path"):
        load_samples(str(tmp_path / "list.csv"), target_column="label")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("age,sex\n1,x\n", "expected one of f, m, got 'x' in row 1. Correct it, or leave it empty if it is missing"),
        ("age,sex\n1,f\nold,f\n2,f\n", "expected numbers, got 'old' in row 2. Correct it, or leave it empty if it is"),
        ("age,SEX\n1,f\n", "none named sex. The columns of the file are age, SEX"),
        ("age;sex\n1;f\n", "expected commas between columns, got 'age;sex'"),
    ],
)
def test_read_features_names_no_option_of_training(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "new.csv").write_text(content)
    with pytest.raises(UserError) as raised:
        read_features(tmp_path / "new.csv", (Column("age", "numeric"), Column("sex", "categorical", ("f", "m"))))
    assert message in str(raised.value)
    assert "--data" not in str(raised.value)
