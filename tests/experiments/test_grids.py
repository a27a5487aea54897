"""Sections on further grids, from the committed results: early exits, do-no-harm, and coverage of the guarantee."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from scipy.stats import binomtest

from experiments.fedekd_paper import coverage
from experiments.fedekd_paper.do_no_harm_results import harm_table, harm_tables
from experiments.fedekd_paper.exits import exit_comparisons, exit_table
from experiments.fedekd_paper.load import arrange
from experiments.result_pages import early_exits
from experiments.result_pages.common import minus
from fedekd.benchmark import numeric, read_results

RESULTS = Path(__file__).resolve().parents[2] / "results"


def grid(name: str) -> pd.DataFrame:
    return arrange(numeric(read_results(RESULTS / name)))


def exit_rows(helpers: Any) -> pd.DataFrame:
    """Two seeds of a method without exits and of two with two exits; costs equal the budgets."""
    setting = {"dataset": "cifar10", "clients": 20, "rounds": 40, "local_mean": 0.7}
    rows = [helpers.make_row("Plain", seed, 0, mean=mean, **setting) for seed, mean in ((0, 0.80), (1, 0.82))]
    curves = {
        "Exits": ({25: 0.78, 50: 0.80, 70: 0.81, 100: 0.83}, {25: 0.80, 50: 0.84, 70: 0.85, 100: 0.85}),
        "Worse": ({25: 0.60, 50: 0.61, 70: 0.62, 100: 0.62}, {25: 0.60, 50: 0.61, 70: 0.62, 100: 0.62}),
    }
    for method, seeds in curves.items():
        for seed, curve in enumerate(seeds):
            columns = {"exit_1": curve[25], "exit_1_flops": 0.1, "exit_2": curve[100], "exit_2_flops": 1.0}
            for budget, accuracy in curve.items():
                columns |= {f"budget_{budget}": accuracy, f"budget_{budget}_flops": budget / 100}
            rows.append(helpers.make_row(method, seed, 0, mean=curve[100], **setting, **columns))
    return helpers.to_results(rows)


def test_exit_comparison_saves_flops_at_the_accuracy_of_the_best_without_exits(helpers: Any) -> None:
    [comparison] = exit_comparisons(exit_rows(helpers))
    assert comparison.name == "CIFAR-10, alpha 0.1, 20 clients, 40 rounds"
    assert comparison.plain == ("Plain", pytest.approx(0.81))
    saved = comparison.points.groupby("method")["saved"].first()
    # Of the means 0.79 at 25% and 0.82 at 50%, 0.81 is at two thirds of the way.
    assert saved["Exits"] == pytest.approx(1 - (0.25 + 0.25 * 2 / 3))
    assert math.isnan(saved["Worse"])
    assert comparison.finding.endswith("FLOPs saved at that accuracy: Exits 58%. Not reached by: Worse.")
    assert comparison.differences["Exits"] == pytest.approx([0.01, 0.03])


def test_exit_table_prints_accuracies_and_paired_interval(helpers: Any) -> None:
    [comparison] = exit_comparisons(exit_rows(helpers))
    table = exit_table(comparison).set_index("method")
    assert list(table.index) == ["Exits", "Worse"]
    assert table.loc["Exits"].tolist() == [
        *("0.8400 ± 0.0141", "0.7900 (10%)", "0.8400 (100%)", "0.7900 (25%)", "0.8200 (50%)", "58.3%"),
        *("+0.0200 (-0.1071 to +0.1471)", 2),  # t of one degree of freedom: 12.706
    ]


def test_exit_comparison_without_a_plain_method_has_no_saving(helpers: Any) -> None:
    rows = exit_rows(helpers)
    [comparison] = exit_comparisons(rows[rows["method"] != "Plain"])
    assert comparison.plain is None
    assert comparison.finding == "There is no run without exits to compare with."
    assert set(exit_table(comparison)["FLOPs saved"]) == {""}


def test_exit_parts_compares_with_the_method_before_the_comma(helpers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = exit_rows(helpers).astype(str)
    rows["method"] = rows["method"].replace("Worse", "Exits, worse")
    monkeypatch.setattr(early_exits, "read_results", lambda folder: rows)
    cells = [line.strip("| ").split(" | ") for line in early_exits.exit_parts("a", "b").splitlines()]
    found = {cell[1]: cell for cell in cells if cell[0] == "Exits" and len(cell) == 7}
    assert found["worse"][2] == "0.6200"
    assert found["worse"][3:5] == list(map(minus, ["-0.2200 (-0.3471 to -0.0929)", "-0.1900 (-0.3171 to -0.0629)"]))


def test_harm_table_of_committed_results() -> None:
    [table] = harm_tables(grid("do_no_harm"))
    assert (table.name, round(table.samples), round(table.differing, 3)) == ("FashionMNIST, alpha 0.1", 778, 0.011)
    printed = harm_table(table)
    assert printed["share"].tolist() == ["100%", "0%", "39%", "67%", "89%"]
    assert printed["Delta avg"].tolist() == [
        *("+0.0019 ± 0.0009", "+0.0000 ± 0.0000", "+0.0015 ± 0.0007", "+0.0021 ± 0.0003", "+0.0020 ± 0.0011"),
    ]
    assert printed["Delta worst"].iloc[-1] == "-0.0025 ± 0.0050"


def test_coverage_tables_of_committed_results() -> None:
    rows = coverage.coverage_rows(grid("certified"))
    assert len(rows) == 4 * 2 * 2 * 2 * 6  # methods, seeds, target risks, modes, clients
    [(name, group)] = coverage.settings(rows).items()
    assert name == "FashionMNIST, alpha 0.1"
    assert coverage.saving_table(group).iloc[0].tolist() == [
        *("gate, all on", "0.02", "ltt", "0.58 of 2", "39.4%", "15.6%", "0.9659 (-0.0012)", 2),
    ]
    assert coverage.violation_table(group).iloc[0].tolist() == [
        *("gate, all on", "0.02", "ltt", "0.051 (0.042 to 0.060)", "0.311", "1.000", "0.060", "2,400"),
    ]
    findings = coverage.findings(group)
    assert findings[0] == (
        "At target risk 0.02 with ltt: all on against progressive (4 pairs of runs), accuracy of the last exit"
        " \N{MINUS SIGN}0.0002, open exits +0.25, FLOPs saved +6.6 points (more in 4 of 4); gate against no gate (4"
        " pairs of runs), accuracy of the last exit +0.0016, open exits +0.00, FLOPs saved \N{MINUS SIGN}0.1 points"
        " (more in 2 of 4)."
    )
    assert findings[2] == (
        "At target risk 0.02, over all methods, ltt saves 13.6% of the FLOPs and violates 3.8% of its targets,"
        " empirical saves 38.5% of the FLOPs and violates 82.3% of its targets."
    )


def coverage_row(method: str, seed: int, saved: float, **changes: object) -> dict[str, object]:
    values = {"dataset": "digits", "alpha": 0.1, "method": method, "seed": seed, "target_risk": 0.05, "mode": "ltt"}
    values |= {"confidence": 0.9, "draws": 20, "client": 0, "open_exits": 1, "exits": 3, "early_share": 0.3}
    values |= {"accuracy": 0.8, "full_accuracy": 0.9, "saved": saved, "own": 1, "pooled": 2, "marginal": 3}
    return values | changes


def test_coverage_findings_compare_labels_that_differ_in_one_part() -> None:
    def findings(*methods: str, **changes: object) -> list[str]:
        rows = [coverage_row(method, 0, (i + 1) / 10, **changes) for i, method in enumerate(methods)]
        return coverage.findings(pd.DataFrame(rows))

    for methods in (["gate, a", "no gate, b"], ["gate", "no gate, b"], ["gate, a, x", "no gate, a, y"], ["gate"]):
        assert findings(*methods) == []
    assert findings("gate, a", "no gate, a", mode="empirical") == []
    # `no X` is second, whatever the order of the names.
    [sentence] = findings("no gate", "gate")
    assert sentence.startswith("At target risk 0.05 with ltt: gate against no gate (1 pair of runs), accuracy of")
    assert sentence.endswith("FLOPs saved +10.0 points (more in 1 of 1).")
    [sentence] = findings("no zeta, a", "zeta, a")
    assert ": zeta against no zeta (1 pair of runs)" in sentence
    # Runs without a common seed are no pair.
    frame = pd.DataFrame([coverage_row("gate", 0, 0.2), coverage_row("no gate", 1, 0.1)])
    assert coverage.findings(frame) == []


def test_violation_table_counts_clients_and_draws() -> None:
    frame = pd.DataFrame([coverage_row("gate", s, 0.1, client=c, pooled=10 * c) for s in (0, 1) for c in (0, 1)])
    interval = binomtest(4, 80).proportion_ci(method="exact")
    assert coverage.violation_table(frame).iloc[0].tolist() == [
        *("gate", "0.05", "ltt", f"0.050 ({interval.low:.3f} to {interval.high:.3f})"),
        *("0.250", "0.500", "0.150", "80"),
    ]


def test_harm_tables_client_without_comparison_is_left_out() -> None:
    results = grid("do_no_harm")
    [before] = harm_tables(results)
    text = results["evidence"].str.replace('{"client": 0,', '{"client": 9}, {"client": 0,')
    [after] = harm_tables(results.assign(evidence=text))
    pd.testing.assert_frame_equal(before.lines, after.lines)
    assert replace(before, lines=after.lines) == replace(after, lines=after.lines)
