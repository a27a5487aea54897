"""Sections on further grids, from the committed results: early exits, do-no-harm, and coverage of the guarantee."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from scipy.stats import binomtest

from experiments.fedekd_paper import coverage
from experiments.fedekd_paper.do_no_harm_results import harm_table, harm_tables
from experiments.fedekd_paper.exits import exit_comparisons, exit_table
from experiments.fedekd_paper.load import arrange
from fedekd.benchmark import numeric, read_results

RESULTS = Path(__file__).resolve().parents[2] / "results"


def grid(name: str) -> pd.DataFrame:
    return arrange(numeric(read_results(RESULTS / name)))


def test_exit_table_of_committed_results() -> None:
    [comparison] = exit_comparisons(grid("cafedistill"))
    assert comparison.name == "CIFAR-10, alpha 0.1, 20 clients, 40 rounds"
    assert comparison.plain == ("FedPer, static", pytest.approx(0.8061, abs=5e-5))
    assert comparison.finding.startswith(
        "Best method without exits: FedPer, static, 0.8061. FLOPs saved at that accuracy: none. Not reached by: FedRep;"
    )
    table = exit_table(comparison).set_index("method")
    assert list(table.index[:3]) == ["FedRep", "FedPer", "CAFEDistill, no distillation"]
    assert table.loc["FedRep"].tolist() == [
        *("0.7997 ± 0.0095", "0.7581 (6%)", "0.7725 (67%)", "0.7997 (100%)"),
        *("0.7838 (25%)", "0.7960 (50%)", "0.7972 (75%)", "not reached", 2),
    ]


def test_exit_comparison_saves_flops_at_the_accuracy_of_the_best_without_exits() -> None:
    results = grid("cafedistill")
    worse = results["method"].eq("FedPer, static")
    results.loc[worse, ["mean", "local_mean"]] = 0.78
    [comparison] = exit_comparisons(results)
    saved = comparison.points.groupby("method")["saved"].first()
    budget = comparison.points.query("method == 'FedRep' and kind == 'budget' and accuracy >= 0.78")
    assert 1 - budget["cost"].min() <= saved["FedRep"] < 1
    assert math.isnan(saved["FedAvg"])
    assert "FedRep 7" in comparison.finding
    [alone] = exit_comparisons(results[~worse])
    assert alone.plain is None
    assert alone.finding == "There is no run without exits to compare with."


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
