"""Runs that cells of the paper lack."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest

from experiments.fedekd_paper.missing import missing_runs, missing_table
from experiments.fedekd_paper.tables import PLANS, paper_cells, table_section


@pytest.fixture
def results(helpers: Any) -> pd.DataFrame:
    """Ten seeds of FedeKD on a CPU, two of FedAvg on both devices, and RetinaMNIST on a GPU."""
    row = helpers.make_row
    rows = [row("FedeKD", seed, 0.01 * seed, seconds=1800) for seed in range(10)]
    rows += [row("FedAvg", 0, -0.2, seconds=360), row("FedAvg", 1, -0.2, seconds=9, device="NVIDIA H200")]
    return helpers.to_results([*rows, helpers.retina_rows("FedeKD", 1, -0.1)[0] | {"seconds": "36", "device": "GPU"}])


def test_missing_runs_are_those_up_to_the_seeds_of_the_paper(results: pd.DataFrame) -> None:
    missing = missing_runs(paper_cells(results), results).set_index(["dataset", "alpha", "method"])
    assert ("fashionmnist", 0.1, "FedeKD") not in missing.index  # tested
    assert not {"Local", "Shuffled gate"} & set(missing.index.get_level_values("method"))  # not printed in the paper
    expected = {
        ("fashionmnist", 0.1, "FedAvg"): [4, 8, "CPU core", 0.8],
        ("fashionmnist", 0.3, "FedAvg"): [4, 10, "CPU core", 1.0],
        ("fashionmnist", 0.1, "FedDyn"): [4, 10, "CPU core", 5.0],  # as the median row of the data set
        ("fashionmnist", 0.3, "Entropy"): [1, 10, "CPU core", 5.0],
        ("retinamnist", 0.1, "FedeKD"): [4, 9, "GPU", 0.09],
    }
    for cell, values in expected.items():
        assert missing.loc[cell].tolist() == pytest.approx(values), cell
    unknown = missing.loc[("octmnist", 0.1, "FedAvg")]
    assert (unknown["runs"], unknown["device"], unknown["hours"] == unknown["hours"]) == (10, "", False)


def test_missing_runs_of_a_cell_are_printed_below_its_verdict(results: pd.DataFrame) -> None:
    panel = table_section(PLANS[0], paper_cells(results)).tables["FashionMNIST"].set_index("method")["alpha 0.1"]
    assert panel["FedAvg"].split("\n")[2:] == ["too few seeds", "takes 8 runs, 48 min on one CPU core"]
    assert panel["FedeKD"].split("\n")[2].startswith("differs, p ")
    assert len(panel["FedeKD"].split("\n")) == 3


def test_missing_table_adds_the_runs_of_a_data_set(results: pd.DataFrame) -> None:
    table = missing_table(missing_runs(paper_cells(results), results)).set_index("data set")
    # Of 3 alphas: five baselines in 4 tables; four energies and no gating in one. Of 2 alphas: FedeKD in 5 tables.
    assert table.loc["FashionMNIST"].tolist()[:2] == [5 * 12 + 5 * 3 + 2 * 5, 5 * 30 - 2 + 5 * 30 + 2 * 10]
    assert table.loc["RetinaMNIST"].tolist()[1:] == [119, "1.2 h on one GPU"]
