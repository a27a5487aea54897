"""Paired comparisons, rankings, the effect of the gate, and sweeps."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest

from experiments.fedekd_paper.comparisons import (
    gate_comparisons,
    gate_finding,
    method_comparisons,
    standings,
    sweep_values,
)


def test_method_comparisons_and_standings_use_common_seeds(helpers: Any) -> None:
    rows = [*helpers.example_rows(), *(helpers.make_row("FedType", seed, -0.0001 * seed) for seed in range(10))]
    rows += [*helpers.retina_rows("FedeKD", 7, -0.1), *helpers.retina_rows("FedProx", 7, -0.2)]
    results = helpers.to_results(rows)
    compared = method_comparisons(results)
    assert not compared["second"].isin(["Shuffled gate", "No gating"]).any()
    by_method = compared.set_index(["dataset", "second", "measure"])
    fedavg = by_method.loc[("fashionmnist", "FedAvg", "delta_avg")]
    assert (fedavg["pairs"], pd.isna(fedavg["p"])) == (2, True)
    better = by_method.loc[("retinamnist", "FedProx", "delta_avg")]
    assert (better["favours"], better["p"], better["p_holm"]) == ("FedProx", 2 / 2**7, 2 / 2**7)
    assert better["gain"] == pytest.approx(-0.1)
    ranked = {(standing.dataset, standing.measure): standing for standing in standings(results)}
    assert list(ranked["retinamnist", "delta_worst"].ranking.mean_ranks) == ["FedProx", "FedeKD", "Local"]
    fashion = ranked["fashionmnist", "delta_avg"]
    assert set(fashion.ranking.mean_ranks) == {"FedeKD", "Shuffled gate", "No gating", "FedType", "Local"}
    assert (fashion.ranking.repetitions, fashion.omitted, fashion.alphas) == (10, ["FedAvg"], [0.1])


def test_method_comparisons_adjust_within_a_family(helpers: Any) -> None:
    row = helpers.make_row
    rows = [row(m, s, d + 0.01 * s) for m, d in (("FedeKD", 0.1), ("FedAvg", 0.0), ("FedProx", 0.05)) for s in range(7)]
    compared = method_comparisons(helpers.to_results(rows))
    assert compared["p_holm"].tolist() == pytest.approx([2 * p for p in compared["p"]])


def finding(helpers: Any, rows: list[dict[str, str]]) -> str:
    return " ".join(gate_finding(gate_comparisons(helpers.to_results(rows))))


def test_gate_finding_follows_the_comparisons(helpers: Any) -> None:
    rows = helpers.example_rows()
    compared = gate_comparisons(helpers.to_results(rows)).set_index(["first", "second", "measure"])
    gain = compared.loc[("FedeKD", "Shuffled gate", "delta_avg")]
    assert gain["gain"] == pytest.approx(0.0035, abs=1e-4)
    assert gain["p"] == gain["p_holm"] == 2 / 2**10
    assert "Average Delta: significant in 1 of 1 setting (Holm, 0.05), better in 1 of them (Fashion" in finding(
        helpers, rows
    )
    swapped = {"FedeKD": "Shuffled gate", "Shuffled gate": "FedeKD"}
    harmful = [{**row, "method": swapped.get(row["method"], row["method"])} for row in rows]
    assert "significant in 1 of 1 setting (Holm, 0.05), better in 0 of them" in finding(helpers, harmful)
    equal = [{**row, "method": "Shuffled gate"} for row in rows if row["method"] == "FedeKD"]
    equal += [row for row in rows if row["method"] != "Shuffled gate"]
    assert "Average Delta: no significant difference in 1 setting" in finding(helpers, equal)
    assert "No test: at least 6 seeds" in finding(helpers, rows[:3])
    # Six seeds in two settings, each better: p is 2 / 2^6, and twice that exceeds 5%.
    six = [
        helpers.make_row(method, seed, delta + 0.01 * seed, alpha=alpha)
        for method, delta in (("FedeKD", 0.1), ("Shuffled gate", 0.0))
        for seed in range(6)
        for alpha in (0.1, 0.3)
    ]
    assert "Average Delta: too few seeds for a significant result in 2 settings" in finding(helpers, six)


def test_sweep_values_keep_the_common_seeds(helpers: Any) -> None:
    def row(method: str, seed: int, delta: float) -> dict[str, str]:
        return helpers.make_row(method, seed, delta, dataset="digits", alpha=0.5)

    rows = [row("FedeKD", s, 0.01 * s) for s in range(5)]
    rows += [row("beta 4.0", s, 0.1) for s in (1, 2, 9)] + [row("beta 0.5", s, 0.2) for s in (2, 1, 3)]
    rows += [row("beta high", 1, 0.2), helpers.make_row("lambda_kd 2", 1, 0.0, dataset="digits")]
    results = helpers.to_results(rows)
    values = sweep_values(results, "beta")["digits"]
    assert values.to_dict() == {0.5: {1: 0.2, 2: 0.2}, 1.0: {1: 0.01, 2: 0.02}, 4.0: {1: 0.1, 2: 0.1}}
    assert sweep_values(results, "lambda_kd") == {}
