"""Preprocessing of tables: fitted on training rows, the same features everywhere."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from fedekd.data import FederatedDataModule
from fedekd.data.columns import Column
from fedekd.data.tables import fit_transformer, transform

COLUMNS = (Column("age", "numeric"), Column("sex", "categorical", ("f", "m", "x")), Column("chol", "numeric"))
NAN = np.nan


def table(path: Path, rows: int = 60, **columns: object) -> str:
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(
        {
            "x": rng.normal(50, 10, rows).round(3),
            "sex": rng.choice(["f", "m"], rows),
            "site": np.repeat(["a", "b", "c"], rows // 3),
            "label": rng.integers(0, 2, rows),
            **columns,
        }
    )
    frame.to_csv(path / "table.csv", index=False)
    return str(path / "table.csv")


def test_transform_imputes_scales_and_codes() -> None:
    train = np.array([[1.0, 0, 5], [3.0, 1, 7], [NAN, 1, NAN]])
    features = transform(fit_transformer(COLUMNS, train), np.array([[2.0, NAN, 5], [NAN, 2, 6]]))
    assert features.dtype == torch.float32
    spread = np.sqrt(2 / 3)  # 1, 3 and the median 2
    assert features.tolist() == [
        pytest.approx([0.0, -1 / spread, 0, 1, 0]),
        pytest.approx([0.0, 0.0, 0, 0, 1]),
    ]


def test_transform_column_empty_or_constant_in_training_is_zero() -> None:
    train = np.array([[4.0, NAN, NAN], [4.0, NAN, NAN]])
    features = transform(fit_transformer(COLUMNS, train), np.array([[9.0, 1, 250.0], [NAN, NAN, NAN]]))
    assert features[:, :2].tolist() == [[0.0, 0.0], [0.0, 0.0]]
    assert features[:, 2:].tolist() == [[0, 1, 0], [0, 0, 0]]


def test_datamodule_table_is_fitted_on_training_rows_of_the_client(tmp_path: Path) -> None:
    path = table(tmp_path)
    data = FederatedDataModule(path, site_column="site")
    assert data.samples.feature_names == ("x", "sex=f", "sex=m")
    for splits in data.clients:
        train = data.samples.inputs[splits.train, 0].double()
        assert train.mean().item() == pytest.approx(0, abs=1e-6)
        assert train.std(correction=0).item() == pytest.approx(1, abs=1e-6)
    frame = pd.read_csv(path)
    test = data.clients[1].test.numpy()
    frame.loc[test, "x"] = 1000.0
    frame.to_csv(path, index=False)
    changed = FederatedDataModule(path, site_column="site")
    train = data.clients[1].train
    assert torch.equal(changed.samples.inputs[train], data.samples.inputs[train])


@pytest.mark.parametrize("partition", ["label", "cluster", "iid"])
def test_datamodule_table_with_missing_values_can_be_partitioned(partition: str, tmp_path: Path) -> None:
    path = table(tmp_path, rows=90, y=[None, 2.0, 3.0] * 30)
    data = FederatedDataModule(path, num_clients=2, alpha=5.0, partition=partition)
    assert sum(map(len, data.clients)) == 90
    assert data.samples.inputs.shape == (90, 7)
    assert data.samples.inputs.isfinite().all()
    assert data.warnings() == []


def test_datamodule_real_targets_have_shift_and_scale_of_training_rows(tmp_path: Path) -> None:
    data = FederatedDataModule(table(tmp_path), site_column="site", target_column="x", task="regression")
    assert data.num_classes == 0
    assert data.class_counts().shape == (3, 0)
    for splits in data.clients:
        targets = data.samples.targets[splits.train].double()
        assert splits.target_shift == pytest.approx(targets.mean().item())
        assert splits.target_scale == pytest.approx(targets.std(correction=0).item())
    grades = FederatedDataModule("digits", num_clients=2, alpha=5.0, task="regression").clients[0]
    assert (grades.target_shift, grades.target_scale) == (0.0, 1.0)
