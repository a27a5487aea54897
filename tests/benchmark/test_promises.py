"""Calibrated exits in a benchmark: their column, the cells that fill it, and what is told of them."""

from __future__ import annotations

import csv
import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from jsonargparse import Namespace
from scipy.stats import binomtest

from fedekd.benchmark import Block, Cell, cells, read_results, worker, write_results
from fedekd.benchmark.fill import fill
from fedekd.benchmark.measured import Measured
from fedekd.benchmark.promises import (
    PromiseLine,
    PromiseTable,
    keeping_lines,
    promise_finding,
    promise_tables,
    saving_lines,
)
from fedekd.benchmark.report import make_report
from fedekd.benchmark.report_files import write_report
from fedekd.benchmark.results import COLUMNS, COVERAGE, Row, to_row
from fedekd.benchmark.worker import run_cell
from fedekd.cli.benchmark import benchmark_parser
from fedekd.configuration.options import parse
from fedekd.early_exit.client_report import ClientExitReport
from fedekd.early_exit.guarantee_coverage import ClientCoverage, CoverageOptions, CoverageResult
from fedekd.errors import UserError
from fedekd.federation import Orchestrator, RunFolder

METHOD = {"FedeKD": {"class_path": "FedeKD"}}
OPTIONS = CoverageOptions(target_risks=[0.1, 0.3], confidence=0.8, modes=["ltt", "empirical"], draws=5)
SMALL = {
    **{"client.exits": 3, "client.local_epochs": 3, "data.num_clients": 3, "data.batch_size": 32, "rounds": 1},
    "client.private_model": {"class_path": "fedekd.models.PrivateCNN", "init_args": {"width": 0.25}},
}
TRAINER = {"accelerator": "cpu", "precision": "32-true", "threads": 1}


def client(
    open_: int,
    saved: float,
    full: float,
    own: int = 0,
    pooled: int = 0,
    leaving: float = 0.0,
    accuracy: float | None = None,
    number: int = 0,
) -> ClientCoverage:
    right = full if accuracy is None else accuracy
    return ClientCoverage(
        ClientExitReport(number, "private", 3, open_, leaving, saved, 0.05 if open_ else None, None, right, full),
        own,
        pooled,
    )


def ltt(*clients: ClientCoverage, together: int = 0, **values: Any) -> CoverageResult:
    rule = {"target_risk": 0.05, "confidence": 0.9, "mode": "ltt", "draws": 20, **values}
    return CoverageResult(**rule, union_violations=together, clients=clients)


def empirical(*clients: ClientCoverage, **values: Any) -> CoverageResult:
    return ltt(*clients, mode="empirical", **values)


def row(method: str, seed: int, *promises: CoverageResult, **place: Any) -> Row:
    """A finished run; without promises it has no such column."""
    summary = {
        **{"dataset": "digits", "alpha": 0.1, "seed": seed, "task": "classification", "metric": "accuracy"},
        **{"rounds": 2, "mean": 0.75, "worst": 0.5, "local_mean": 0.7, "clients": [{}, {}], "seconds": 3.14},
        **{"delta": {"avg": 0.05, "worst": -0.1, "p10": -0.05}, "bytes_up": 10, "bytes_down": 20},
        **{"versions": {"fedekd": "0.1.0", "torch": "2"}, **place},
    }
    key = f"{method}-{seed}-{summary['dataset']}-{summary['alpha']}"
    provenance = {"commit": "abc", "device": "cpu", "precision": "32-true", "threads": 1}
    values = [promise.as_values() for promise in promises] or None
    return to_row(key, f"of {method}", method, summary, provenance, values)


GATE_ALL_ON = [
    ltt(
        client(2, 0.4, 0.92, own=1, leaving=0.5, accuracy=0.9),
        client(1, 0.2, 0.8, own=3, pooled=16, leaving=0.3, number=1),
        together=1,
    ),
    ltt(
        client(0, -0.01, 0.7, pooled=2),
        client(2, 0.45, 0.88, own=2, pooled=10, leaving=0.6, accuracy=0.86, number=1),
        together=3,
    ),
]


def rows() -> list[Row]:
    """Four methods that differ in two things; one of them lacks a seed, and two were calibrated by empirical too."""
    return [
        row("gate, all on", 0, GATE_ALL_ON[0], empirical(client(2, 0.5, 0.9, own=12))),
        row("gate, all on", 1, GATE_ALL_ON[1]),
        row("gate, progressive", 0, ltt(client(1, 0.35, 0.88))),
        row("gate, progressive", 1, ltt(client(1, 0.10, 0.80))),
        row(
            "no gate, all on",
            0,
            ltt(client(1, 0.1, 0.9), client(1, 0.3, 0.84, own=1, pooled=20, number=1)),
            empirical(client(2, 0.3, 0.9, own=18)),
        ),
        row("no gate, progressive", 0, ltt(client(0, 0.30, 0.81, own=3))),
        row("no gate, progressive", 1, ltt(client(1, 0.20, 0.84, own=2))),
        row("FedAvg", 0),
    ]


def table() -> PromiseTable:
    [found] = promise_tables(Measured(rows()))
    return found


def test_the_column_survives_a_file_byte_for_byte(tmp_path: Path) -> None:
    promises = [ltt(client(1, 0.1 + 0.2, 1 / 3), client(0, 0.0, 1e-17, number=1)), empirical(client(2, -0.0, 1.0))]
    own = [row("gate, all on", 0, *promises), row("FedAvg", 0)]
    assert list(own[0]) == [*COLUMNS, COVERAGE]
    assert list(own[1]) == list(COLUMNS)
    assert [CoverageResult.from_values(values) for values in json.loads(own[0][COVERAGE])] == promises
    write_results(tmp_path, own)
    content = (tmp_path / "digits.csv").read_bytes()
    assert content.decode().splitlines()[0].split(",") == [*COLUMNS, COVERAGE]
    back = read_results(tmp_path)
    assert back[own[0]["key"]] == own[0]
    assert back[own[1]["key"]] == {**own[1], COVERAGE: ""}
    write_results(tmp_path, back.values())
    assert (tmp_path / "digits.csv").read_bytes() == content


def test_the_column_is_not_there_where_no_row_has_it(tmp_path: Path) -> None:
    own = [row("FedAvg", 0), row("FedAvg", 0, GATE_ALL_ON[0], dataset="retinamnist")]
    write_results(tmp_path, own)
    assert COVERAGE not in (tmp_path / "digits.csv").read_text()
    assert COVERAGE in (tmp_path / "retinamnist.csv").read_text().splitlines()[0]


def cell_of(promises: Any = None, **more: Any) -> Cell:
    [found] = cells([Block(["digits"], [0.5], [0], METHOD, **more, coverage=promises)])
    return found


def test_promises_decide_the_key_of_a_cell_that_has_them() -> None:
    plain = cell_of()
    assert plain.key == plain.configuration == "dfb176aa3bfda35e"  # as it stands in results/digits.csv
    assert plain.coverage is None
    changes: list[dict[str, Any]] = [{}, {"target_risks": [0.1]}, {"confidence": 0.7}, {"modes": ["ltt"]}, {"draws": 6}]
    found = [cell_of(replace(OPTIONS, **change)) for change in changes]
    assert len({plain.key, *(cell.key for cell in found)}) == 1 + len(changes)
    assert len({plain.configuration, *(cell.configuration for cell in found)}) == 1 + len(changes)
    assert found[0].coverage == OPTIONS
    assert found[0].key == cell_of(CoverageOptions([0.1, 0.3], 0.8, ["ltt", "empirical"], 5)).key
    assert found[0].values == plain.values
    seeds = cells([Block(["digits"], [0.5], [0, 1], METHOD, coverage=OPTIONS)])
    assert [cell.configuration for cell in seeds] == [found[0].configuration] * 2
    assert seeds[0].key != seeds[1].key


def test_a_block_of_a_file_is_one_of_promise_options(tmp_path: Path) -> None:
    values = {"target_risks": [0.1, 0.3], "confidence": 0.8, "modes": ["ltt", "empirical"], "draws": 5}
    wanted = cell_of(OPTIONS)
    assert cell_of(Namespace(**values)) == wanted  # type: ignore[no-untyped-call]
    grid = "blocks:\n- {datasets: [digits], alphas: [0.5], seeds: [0], methods: {FedeKD: {class_path: FedeKD}}"
    (tmp_path / "grid.yaml").write_text(f"{grid}, coverage: {json.dumps(values)}}}\n")
    [read] = cells(parse(benchmark_parser(), ["--config", str(tmp_path / "grid.yaml")]).blocks)
    assert (read.key, read.coverage) == (wanted.key, OPTIONS)
    (tmp_path / "grid.yaml").write_text(f"{grid}, coverage: {{draws: 5}}}}\n")
    [read] = cells(parse(benchmark_parser(), ["--config", str(tmp_path / "grid.yaml")]).blocks)
    assert read.coverage == CoverageOptions(draws=5)
    for bad, words in (("{draws: 0}", "draws"), ("{modes: [plug-in]}", "empirical"), ("{rules: [ltt]}", "rules")):
        (tmp_path / "grid.yaml").write_text(f"{grid}, coverage: {bad}}}\n")
        with pytest.raises(UserError, match=words) as told:
            cells(parse(benchmark_parser(), ["--config", str(tmp_path / "grid.yaml")]).blocks)
        assert "\n" not in str(told.value)


def small_cell() -> Cell:
    [found] = cells([Block(["digits"], [2.0], [1], METHOD, SMALL, coverage=OPTIONS)])
    return found


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Row, list[Any]]:
    """The folder of a finished cell, its row, and with what its clients were calibrated."""
    folder = tmp_path_factory.mktemp("once")
    asked = []
    real = worker.federation_coverage

    def spy(*arguments: Any) -> Any:
        asked.append(arguments)
        return real(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFolder, "draw", lambda *arguments: None)
        patch.setattr(worker, "federation_coverage", spy)
        found = run_cell(small_cell(), folder / "run", TRAINER, folder / "local", "abc")
    return folder, found, asked


def never(*arguments: Any) -> Any:
    raise AssertionError("this was done before")


def test_a_cell_with_promises_keeps_them_and_no_checkpoints(once: tuple[Path, Row, list[Any]]) -> None:
    folder, found, [(clients, options, seed)] = once
    assert (len(clients), options, seed) == (3, OPTIONS, 1)
    kept = json.loads((folder / "run/coverage.json").read_text())
    assert json.loads(found[COVERAGE]) == kept
    assert [(each["target_risk"], each["mode"], each["draws"]) for each in kept] == [
        *((0.1, "ltt", 5), (0.1, "empirical", 5), (0.3, "ltt", 5), (0.3, "empirical", 5)),
    ]
    accuracies = [each["report"]["full_accuracy"] for each in kept[0]["clients"]]
    # In float32 too, of the same images: these are the clients as they were after the last round.
    summary = json.loads((folder / "run/summary.json").read_text())
    assert accuracies == pytest.approx([each["score"] for each in summary["clients"]], abs=1e-6)
    assert sum(each["violations"] for promise in kept for each in promise["clients"]) > 0
    assert (folder / "run/summary.json").is_file()
    assert not (folder / "run/checkpoints").exists()
    assert found["key"] == small_cell().key


def test_a_finished_cell_is_not_run_again(once: tuple[Path, Row, list[Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, found, _ = once
    for name in ("run", "load_clients"):
        monkeypatch.setattr(Orchestrator, name, never)
    monkeypatch.setattr(worker, "federation_coverage", never)
    again = run_cell(small_cell(), folder / "run", TRAINER, folder / "local", "abc")
    assert {**again, "seconds": ""} == {**found, "seconds": ""}
    # A cell that does not ask for promises gets none, whatever lies there.
    plain = run_cell(replace(small_cell(), coverage=None), folder / "run", TRAINER, folder / "local", "abc")
    assert {**plain, "seconds": "", COVERAGE: found[COVERAGE]} == {**found, "seconds": ""}
    assert COVERAGE not in plain


def test_a_cell_that_was_killed_before_its_promises_ends_with_the_same_column(
    once: tuple[Path, Row, list[Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, found, _ = once
    monkeypatch.setattr(RunFolder, "draw", lambda *arguments: None)
    real = worker.federation_coverage

    def killed(*arguments: Any) -> Any:
        real(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(worker, "federation_coverage", killed)
    with pytest.raises(KeyboardInterrupt):
        run_cell(small_cell(), tmp_path / "run", TRAINER, folder / "local", "abc")
    assert (tmp_path / "run/summary.json").is_file()
    assert (tmp_path / "run/checkpoints").is_dir()
    assert not (tmp_path / "run/coverage.json").exists()
    monkeypatch.setattr(worker, "federation_coverage", real)
    monkeypatch.setattr(Orchestrator, "run", never)
    late = run_cell(small_cell(), tmp_path / "run", TRAINER, folder / "local", "abc")
    assert late[COVERAGE] == found[COVERAGE]
    assert {**late, "seconds": ""} == {**found, "seconds": ""}
    assert not (tmp_path / "run/checkpoints").exists()


def test_there_is_a_table_for_every_place() -> None:
    own = [
        row("gate", 3, GATE_ALL_ON[0], dataset="retinamnist"),
        row(
            "gate",
            1,
            empirical(client(0, 0.0, 0.5)),
            ltt(client(0, 0.0, 0.5)),
            ltt(client(0, 0.0, 0.5), target_risk=0.02),
        ),
        row("gate", 0, ltt(client(1, 0.2, 0.7))),
        row("gate", 0, GATE_ALL_ON[0], alpha=0.05),
        row("FedAvg", 0, alpha=0.9),
        {**row("FedAvg", 0, dataset="cifar10"), COVERAGE: ""},
    ]
    found = promise_tables(Measured(own))
    assert [each.name for each in found] == ["digits, alpha 0.05", "digits, alpha 0.1", "RetinaMNIST, alpha 0.1"]
    lines = [(each.promise.target_risk, each.promise.mode, each.method, list(each.by_seed)) for each in found[1].lines]
    assert lines == [
        (0.02, "ltt", "gate", [1]),
        (0.05, "ltt", "gate", [0, 1]),
        (0.05, "empirical", "gate", [1]),
    ]
    assert found[1].lines[1].by_seed[0] == ltt(client(1, 0.2, 0.7))
    assert promise_tables(Measured([row("FedAvg", 0)])) == []


def test_lines_tell_what_is_saved() -> None:
    heads, *lines = saving_lines(table())
    assert {len(heads)} == {len(line) for line in lines}
    assert [(line[0], line[2]) for line in lines] == [
        *(("gate, all on", "ltt"), ("gate, progressive", "ltt"), ("no gate, all on", "ltt")),
        *(("no gate, progressive", "ltt"), ("gate, all on", "empirical"), ("no gate, all on", "empirical")),
    ]
    # Means over two clients and two seeds: (2 + 1 + 0 + 2) / 4, (0.5 + 0.3 + 0 + 0.6) / 4, ...
    assert dict(zip(heads, lines[0], strict=True)) == {
        **{"method": "gate, all on", "error rate": "0.05", "rule": "ltt", "exits open": "1.25 of 2"},
        **{"leave early": "35.0%", "FLOPs saved": "26.0%", "accuracy (change)": "0.8150 (\N{MINUS SIGN}0.0100)"},
        "seeds": "2",
    }
    assert lines[2][3:] == ["1.00 of 2", "0.0%", "20.0%", "0.8700 (+0.0000)", "1"]


def test_lines_tell_how_often_promises_are_broken() -> None:
    heads, *lines = keeping_lines(table())
    assert {len(heads)} == {len(line) for line in lines}
    ends = binomtest(6, 80).proportion_ci(0.95, "exact")
    assert dict(zip(heads, lines[0], strict=True)) == {
        **{"method": "gate, all on", "error rate": "0.05", "rule": "ltt"},
        "own policy": f"0.075 ({ends.low:.3f} to {ends.high:.3f})",  # 1 + 3 + 0 + 2 of 4 times 20
        **{"pooled policy": "0.350", "its worst client": "0.800", "all together": "0.100", "draws": "80"},
    }
    assert lines[2][4] == "0.500"  # the half of its clients, and always
    assert lines[2][5] == "1.000"
    many = PromiseLine("gate", {0: ltt(client(0, 0.0, 0.9, own=30, pooled=150), draws=1500, together=75)})
    [_, [*_, own, pooled, worst, together, draws]] = keeping_lines(PromiseTable("digits", 0.1, (many,)))
    assert own.startswith("0.020 (")
    assert (pooled, worst, together, draws) == ("0.100", "0.100", "0.050", "1,500")


BY_LTT = (
    "At an error rate of 0.05 by ltt: "
    # On seed 0 of gate: 0.86 - 0.88, 1.5 - 1 exits, 0.30 - 0.35; on its seed 1: 0.79 - 0.80, 1 - 1, 0.22 - 0.10;
    # on seed 0 of no gate: 0.87 - 0.81, 1 - 0, 0.2 - 0.3. It has no seed 1.
    "all on against progressive (3 pairs of runs), accuracy of the last exit +0.0100, exits open +0.50,"
    " FLOPs saved \N{MINUS SIGN}1.0 points (more in 1 of 3); "
    # With all on: 0.86 - 0.87, 1.5 - 1, 0.3 - 0.2; progressive: 0.88 - 0.81, 1 - 0, 0.35 - 0.30, and
    # 0.80 - 0.84, 1 - 1, 0.1 - 0.2.
    "gate against no gate (3 pairs of runs), accuracy of the last exit +0.0067, exits open +0.50,"
    " FLOPs saved +1.7 points (more in 2 of 3)."
)


def test_factors_are_told_by_pairs_of_runs() -> None:
    told = promise_finding(table())
    assert told == [
        BY_LTT,  # nothing by empirical, which promises nothing
        # ltt: (0.26 + 0.225 + 0.2 + 0.25) / 4, and 6 + 1 + 3 + 2 of 80 + 40 + 40 + 40.
        "At an error rate of 0.05, over all methods, ltt saves 23.4% of the FLOPs and breaks 6.0% of its promises,"
        " empirical saves 40.0% of the FLOPs and breaks 75.0% of its promises.",
    ]


def test_the_order_of_the_lines_does_not_turn_a_pair_around() -> None:
    own = table()
    one, two, three, four = own.lines[:4]
    for order in ((one, two, four, three), (three, four, one, two), (three, one, four, two)):
        [told] = promise_finding(replace(own, lines=order))
        for sentence in BY_LTT.split(": ")[1].rstrip(".").split("; "):
            assert sentence in told


def pairs(*methods: str, **values: Any) -> list[str]:
    """What is told of methods that save 10%, 20%, ... by one rule, in the order of a table."""
    own = [row(method, 0, ltt(client(1, (n + 1) / 10, 0.9), **values)) for n, method in enumerate(methods)]
    [found] = promise_tables(Measured(own))
    return promise_finding(found)


def test_only_what_differs_in_one_part_is_a_pair() -> None:
    assert pairs("gate, all on", "no gate, progressive") == []
    assert pairs("gate", "no gate, progressive") == []
    assert pairs("gate, all on, wide", "no gate, all on, narrow") == []
    assert pairs("gate") == []
    assert pairs("gate, all on", "no gate, all on", mode="empirical") == []
    [told] = pairs("no gate", "gate")
    assert told.startswith("At an error rate of 0.05 by ltt: gate against no gate (1 pair of runs), accuracy of")
    assert "FLOPs saved +10.0 points (more in 1 of 1)" in told
    # `no zeta` comes before `zeta` in a table, and still stands second.
    [told] = pairs("no zeta, all on", "zeta, all on")
    assert ": zeta against no zeta (1 pair of runs)" in told
    assert "FLOPs saved +10.0 points" in told
    [told] = pairs("a, one, x", "a, two, x")
    assert ": one against two (1 pair of runs), accuracy of the last exit +0.0000, exits open +0.00," in told
    assert "FLOPs saved \N{MINUS SIGN}10.0 points (more in 0 of 1)" in told


def test_runs_of_no_common_seed_are_no_pair() -> None:
    own = [row("gate", 0, ltt(client(1, 0.2, 0.9))), row("no gate", 1, ltt(client(1, 0.1, 0.9)))]
    [found] = promise_tables(Measured(own))
    assert promise_finding(found) == []


def test_as_much_is_not_more() -> None:
    own = [row(method, 0, ltt(client(1, 0.2, 0.9))) for method in ("gate", "no gate")]
    [found] = promise_tables(Measured(own))
    [told] = promise_finding(found)
    assert told.endswith("FLOPs saved +0.0 points (more in 0 of 1).")


def test_rules_are_held_against_each_other_at_every_error_rate() -> None:
    own = row(
        "gate",
        0,
        ltt(client(1, 0.1, 0.9, own=1), target_risk=0.02),
        empirical(client(1, 0.4, 0.9, own=7), target_risk=0.02),
        ltt(client(1, 0.2, 0.9, own=2)),
        empirical(client(1, 0.5, 0.9, own=9)),
        ltt(client(1, 0.3, 0.9), target_risk=0.1),
    )
    [found] = promise_tables(Measured([own]))
    told = "of the FLOPs and breaks"
    assert promise_finding(found) == [
        f"At an error rate of 0.02, over all methods, ltt saves 10.0% {told} 5.0% of its promises,"
        f" empirical saves 40.0% {told} 35.0% of its promises.",
        f"At an error rate of 0.05, over all methods, ltt saves 20.0% {told} 10.0% of its promises,"
        f" empirical saves 50.0% {told} 45.0% of its promises.",
    ]


def read_csv(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_a_report_has_a_section_and_a_file(tmp_path: Path) -> None:
    write_report(make_report(Measured(rows()), str(tmp_path / "none"), ["here"]), tmp_path)
    lines = read_csv((tmp_path / "tables/promises.csv").read_text())
    assert len(lines) == 2 + 2 + 1 + 1 + 2 + 1 + 1 + 1 + 1  # a line for every rule, method, seed and client
    [line] = [
        each
        for each in lines
        if (each["method"], each["seed"], each["client"], each["rule"]) == ("gate, all on", "0", "1", "ltt")
    ]
    assert line == {
        **{"dataset": "digits", "alpha": "0.1", "method": "gate, all on", "seed": "0", "rule": "ltt"},
        **{
            "target_risk": "0.05",
            "confidence": "0.9",
            "client": "1",
            "model": "private",
            "exits": "3",
            "open_exits": "1",
        },
        **{"early_share": "0.3", "saved": "0.2", "certified_risk": "0.05", "test_risk": "", "accuracy": "0.8"},
        **{
            "full_accuracy": "0.8",
            "draws": "20",
            "violations": "3",
            "pooled_violations": "16",
            "union_violations": "1",
        },
    }
    closed = next(each for each in lines if each["seed"] == "1" and each["open_exits"] == "0")
    assert (closed["certified_risk"], closed["saved"]) == ("", "-0.01")

    markdown, page = ((tmp_path / name).read_text() for name in ("report.md", "index.html"))
    section = markdown.split("\n## Exits that a client can trust\n")[1].split("\n## ")[0]
    assert "\n### digits, alpha 0.1\n" in section
    assert BY_LTT in section
    tables = re.findall(r"(?:^\|.*\n)+", section, re.MULTILINE)
    assert [text.count("\n") for text in tables] == [8, 8]
    for text in tables:
        assert len({each.count("|") for each in text.splitlines()}) == 1, text
    assert "| gate, all on | 0.05 | ltt | 1.25 of 2 | 35.0% | 26.0% |" in tables[0]
    assert '<a href="#promises">' in page
    assert '<section id="promises">' in page
    assert BY_LTT in page

    write_report(make_report(Measured([row("FedAvg", 0)]), str(tmp_path / "none"), ["here"]), tmp_path)
    assert not (tmp_path / "tables/promises.csv").exists()
    assert "Exits that a client can trust" not in (tmp_path / "report.md").read_text()
    assert "promises" not in (tmp_path / "index.html").read_text()


PLACE = "A\n<!-- fill: promises certified -->\nold\n<!-- /fill -->\nB\n"


def test_a_place_of_a_file_is_filled(tmp_path: Path) -> None:
    write_results(tmp_path / "results/certified", rows())
    (tmp_path / "other").mkdir()
    filled = fill(PLACE, Measured([]), [tmp_path / "other", tmp_path / "results"])
    assert "old" not in filled
    assert filled.startswith("A\n<!-- fill: promises certified -->\n\n| digits, alpha 0.1 | error rate |")
    assert filled.endswith("\n\n<!-- /fill -->\nB\n")
    assert "| gate, all on | 0.05 | ltt | 1.25 of 2 | 35.0% | 26.0% | 0.8150 (\N{MINUS SIGN}0.0100) | 2 |" in filled
    low, high = binomtest(6, 80).proportion_ci(0.95, "exact")
    told = f"0.075 ({low:.3f} to {high:.3f})"
    assert f"| gate, all on | 0.05 | ltt | {told} | 0.350 | 0.800 | 0.100 | 80 |" in filled
    for sentence in promise_finding(table()):
        assert f"\n\n{sentence}\n\n" in filled
    assert fill(filled, Measured([]), [tmp_path / "results"]) == filled


def test_a_place_without_results_is_told(tmp_path: Path) -> None:
    write_results(tmp_path / "certified", [row("FedAvg", 0)])
    words = "<!-- fill: promises certified -->: no results of calibrated clients in certified/"
    for folders in ([tmp_path], [tmp_path / "nowhere"], []):
        with pytest.raises(UserError, match=words):
            fill(PLACE, Measured([]), folders)


def test_many_clients_and_empty_columns_go_through_a_file(tmp_path: Path) -> None:
    long = {**row("many", 0), COVERAGE: json.dumps(["x" * 200_000])}
    write_results(tmp_path, [long])
    assert read_results(tmp_path)[long["key"]][COVERAGE] == long[COVERAGE]
    write_results(tmp_path, [{**row("none", 0), COVERAGE: ""}])
    [back] = read_results(tmp_path).values()
    assert COVERAGE not in back
