"""Tables 1-10: every cell of the paper with the measured value, and a verdict."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from experiments.fedekd_paper.comparisons import method_comparisons, standings
from experiments.fedekd_paper.load import paper_runs
from experiments.fedekd_paper.tables import PLANS, counts, paper_cells, table_section, verdict_sentence


def indexed(results: pd.DataFrame) -> pd.DataFrame:
    return paper_cells(results).set_index(["table", "dataset", "alpha", "method"]).sort_index()


def test_paper_cells_every_published_cell_has_a_verdict(helpers: Any) -> None:
    results = helpers.to_results(helpers.example_rows())
    cells = indexed(results)
    assert cells["paper_mean"].notna().sum() - cells["derived"].sum() == 456
    verdicts = {
        (1, "fashionmnist", 0.1, "FedeKD"): "agrees",
        (1, "fashionmnist", 0.1, "FedAvg"): "too few seeds",
        (1, "fashionmnist", 0.5, "FedeKD"): "not run",
        (1, "fashionmnist", 0.1, "No gating"): "not in the paper",
        (1, "digits", 0.5, "FedeKD"): "not in the paper",
        (10, "fashionmnist", 0.1, "No gating"): "differs",
        (8, "fashionmnist", 0.1, "Local"): "no spread in the paper",
    }
    for cell, verdict in verdicts.items():
        assert cells.loc[cell, "verdict"] == verdict, cell
    assert cells.loc[(8, "fashionmnist", 0.1, "Local"), "mean"] == pytest.approx(0.93)
    assert cells.loc[(4, "fashionmnist", 0.1, "FedAvg"), "mean"] == pytest.approx(-0.4)
    assert cells.loc[(6, "fashionmnist", 0.1, "FedAvg"), "mean"] == pytest.approx(-0.3)
    assert counts(cells).sum() == 456
    assert verdict_sentence(cells).startswith("Of the paper's 456 cells: not run ")
    assert "beta 4.0" not in cells.index.get_level_values("method")


def test_paper_cells_best_is_among_methods_with_the_most_seeds(helpers: Any) -> None:
    retina = helpers.retina_rows
    rows = [*retina("FedeKD", 4, -0.1), *retina("FedProx", 4, -0.2), *retina("FedDyn", 3, -0.5)]
    cells = paper_cells(helpers.to_results([*helpers.example_rows()[:-1], *rows]))
    assert cells.loc[cells["best"] & (cells["table"] == 2), "method"].tolist() == ["FedProx"]
    assert cells.loc[cells["best"] & (cells["table"] == 1), "method"].tolist() == ["FedeKD"]
    few = paper_cells(helpers.to_results([*retina("FedeKD", 2, -0.1), *retina("FedProx", 2, -0.2)]))
    assert not few["best"].any()


def test_paper_cells_diverged_run_has_no_test(helpers: Any) -> None:
    row = helpers.make_row
    diverged = [row("FedDyn", 0, math.nan), *(row("FedProx", s, math.nan if s else 0.1) for s in range(10))]
    results = helpers.to_results([*helpers.example_rows(), *diverged])
    cells = indexed(results)
    assert cells.loc[(1, "fashionmnist", 0.1, "FedProx"), "verdict"] == "diverged"
    assert cells.loc[(1, "fashionmnist", 0.1, "FedeKD"), "best"]
    compared = method_comparisons(results).set_index("second")
    assert math.isnan(compared.loc["FedProx", "p"].iloc[0])
    assert "FedProx" in standings(results)[0].omitted


def test_arrange_runs_with_other_options_are_a_data_set_of_their_own(helpers: Any) -> None:
    rows = helpers.example_rows()
    known = frozenset(r["key"] for r in rows if r["dataset"] == "fashionmnist" and r["method"] == "FedeKD")
    cells = indexed(helpers.to_results(rows, lambda dataset: known))
    assert cells.loc[(1, "fashionmnist", 0.1, "FedAvg"), "verdict"] == "not run"
    assert cells.loc[(1, "fashionmnist, other options", 0.1, "FedAvg"), "verdict"] == "not in the paper"
    assert cells.loc[(1, "digits", 0.5, "FedeKD"), "values"] == {0: 0.01}


def test_arrange_two_configurations_are_two_methods(helpers: Any) -> None:
    rows = [helpers.make_row("FedAvg", 0, 0.1), helpers.make_row("FedAvg", 1, 0.2, configuration="abcdefgh")]
    assert list(helpers.to_results(rows)["method"]) == ["FedAvg (0)", "FedAvg (abcdef)"]


def test_paper_runs_use_the_shipped_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = paper_runs("retinamnist")
    (tmp_path / "configs/benchmark").mkdir(parents=True)
    (tmp_path / "configs/retinamnist.yaml").write_text("data: {dataset: retinamnist}\nrounds: 99\n")
    (tmp_path / "configs/benchmark/paper.yaml").write_text("blocks: []\n")
    monkeypatch.chdir(tmp_path)
    paper_runs.cache_clear()
    assert paper_runs("retinamnist") == expected
    assert len(expected) == 3 * 10 * 7 + 5 * 10


def test_table_section_prints_both_values_and_the_fault(helpers: Any) -> None:
    section = table_section(PLANS[0], paper_cells(helpers.to_results(helpers.example_rows())))
    panel = section.tables["FashionMNIST"].set_index("method")
    lines = panel.loc["FedeKD", "alpha 0.1"].split("\n")
    assert lines[0].startswith("-0.0065 ± 0.0053 (10) \N{BLACK STAR}")
    assert lines[1] == "paper -0.0065 ± 0.0066"
    assert lines[2].startswith("agrees, p ")
    fault = panel.loc["FedDyn", "alpha 0.1"].partition("⚑")[2][0]
    assert f"⚑{fault}" in next(text for text in section.text if "wrong sign" in text)
    assert list(section.tables)[:2] == ["FashionMNIST", "digits"]  # data sets with runs come first
