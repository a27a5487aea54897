"""Published cells: complete, consistent, and the faulty ones marked."""

from __future__ import annotations

import pandas as pd
import pytest

from experiments.fedekd_paper.published import ALPHAS, CELL, DATASETS, published

PRINTED = published()[~published()["derived"]]
BY_CELL = published().set_index(["table", *CELL])


def test_published_has_every_printed_cell_once() -> None:
    assert len(PRINTED) == 456
    assert not PRINTED.duplicated(["table", *CELL]).any()
    counts = PRINTED["table"].value_counts().to_dict()
    assert counts == {1: 72, 2: 24, 4: 72, 5: 24, 6: 72, 7: 24, 8: 72, 9: 24, 10: 72}
    assert set(PRINTED["dataset"]) == set(DATASETS)
    assert set(PRINTED["alpha"]) == set(ALPHAS)


def test_published_some_cells_equal_the_paper() -> None:
    cell = BY_CELL.loc[1, "fashionmnist", 0.1, "FedeKD"]
    assert (cell["mean"], cell["std"], cell["fault"]) == (-0.0065, 0.0066, "")
    assert BY_CELL.loc[9, "retinamnist", 0.1, "FedeKD"]["mean"] == 1.2428
    assert BY_CELL.loc[10, "octmnist", 0.3, "LogSumExp"]["mean"] == -0.004


def test_published_local_means_agree_with_every_method() -> None:
    local = published()[published()["derived"]].set_index(["dataset", "alpha"])["mean"]
    assert len(local) == 18
    assert local["fashionmnist", 0.1] == 0.9338
    assert local["diabetic_retinopathy", 0.5] == 1.3334
    for row in PRINTED[PRINTED["table"].isin([8, 9])].itertuples():
        gain = BY_CELL.loc[row.table - 7, row.dataset, row.alpha, row.method]["mean"]
        # The sum of three values that are each rounded to 1e-4.
        assert row.mean - gain == pytest.approx(local[row.dataset, row.alpha], abs=1.5001e-4)


def faulty(reason: str) -> pd.DataFrame:
    return PRINTED[PRINTED["fault"].str.contains(reason, regex=False)]


def cells(frame: pd.DataFrame) -> set[tuple[object, ...]]:
    return set(frame[["method", "dataset", "alpha"]].itertuples(index=False, name=None))


def test_published_faults_mark_the_known_cells() -> None:
    copied = faulty("plain FedAvg's cell of Table 1")
    assert cells(copied) == {
        ("No gating", dataset, alpha)
        for dataset in ("fashionmnist", "cifar10", "octmnist", "organamnist")
        for alpha in (0.3, 0.5)
    }
    for row in copied.itertuples():
        plain = BY_CELL.loc[1, row.dataset, row.alpha, "FedAvg"]
        assert (row.mean, row.std) == (plain["mean"], plain["std"])
    assert cells(faulty("at another alpha")) == {
        (energy, "octmnist", alpha) for energy in ("Entropy", "LogSumExp", "Feature") for alpha in (0.1, 0.5)
    }
    diverging = faulty("FedDyn's server state")
    assert len(diverging) == 4 * 12 + 4 * 6
    assert set(diverging["method"]) == {"FedDyn"}
    weak = faulty("shared initial weights")
    assert len(weak) == 2 * 2 * 4 * 3
    assert set(zip(weak["method"], weak["dataset"], strict=True)) == {
        (method, dataset) for method in ("FedAvg", "FedProx") for dataset in ("fashionmnist", "retinamnist")
    }
    assert cells(faulty("was not observed")) == {("No gating", "fashionmnist", 0.1)}
    assert not (PRINTED.loc[PRINTED["method"] == "FedeKD", "fault"] != "").any()
