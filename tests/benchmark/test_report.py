"""What is read, what is said of it, and what is written."""

from __future__ import annotations

import csv
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from fedekd.benchmark.comparisons import against, rankings
from fedekd.benchmark.fill import fill
from fedekd.benchmark.gate import gate_finding
from fedekd.benchmark.measured import Measured
from fedekd.benchmark.results import COLUMNS, Row, write_results
from fedekd.benchmark.tables import Entry, Table, build_tables
from fedekd.cli import main
from fedekd.errors import UserError


def row(method: str, seed: int, delta: float, **more: Any) -> Row:
    values = {
        **dict.fromkeys(COLUMNS, ""),
        **{"dataset": "fashionmnist", "alpha": 0.1, "method": method, "seed": seed, "metric": "accuracy"},
        **{"mean": 0.93 + delta, "local_mean": 0.93, "delta_avg": delta, "delta_worst": 2 * delta},
        **{"delta_tail": 1.5 * delta, "key": f"{method}-{seed}", "commit": "abc", "device": "cpu"},
        **more,
    }
    if "key" not in more:
        values["key"] = f"{values['dataset']}-{values['alpha']}-{method}-{seed}"
    return {name: str(value) for name, value in values.items()}


def rows() -> list[Row]:
    """Ten seeds of a gate that helps a little, of shuffled weights and of none; two of FedAvg; two other data sets."""
    found = []
    for seed in range(10):
        found.append(row("FedeKD", seed, -0.0065 + 0.006 * (seed % 3 - 0.9)))
        found.append(row("Shuffled gate", seed, -0.010 + 0.006 * (seed % 3 - 0.9) - 1e-5 * seed))
        found.append(row("No gating", seed, -0.0066 + 0.0059 * (seed % 3 - 0.9) + 1e-4 * (-1) ** seed))
    found += [row("FedAvg", seed, -0.2) for seed in range(2)]
    found += [
        row("FedeKD", 0, 0.01, dataset="digits", alpha=0.5),
        row("beta 4.0", 0, 0.02, dataset="digits", alpha=0.5),
    ]
    found += [row("FedeKD", 0, -0.1, dataset="retinamnist", metric="rmse", local_mean=1.2, mean=1.1)]
    return found


def entry(tables: list[Table], number: int, dataset: str, method: str, alpha: float) -> Entry:
    return next(
        found
        for table in tables
        if table.number == number
        for panel, name, at, found in table.entries()
        if (panel.dataset, name, at) == (dataset, method, alpha)
    )


def test_every_cell_of_the_paper_has_its_place_and_a_verdict() -> None:
    tables = build_tables(Measured(rows()))
    assert [table.number for table in tables] == [1, 2, 4, 5, 6, 7, 8, 9, 10]
    cells = [found.paper for table in tables for *_, found in table.entries() if found.paper]
    assert sum(not cell.derived for cell in cells) == 456
    verdicts = {
        ("fashionmnist", "FedeKD", 0.1): "agrees",
        ("fashionmnist", "FedAvg", 0.1): "too few seeds",
        ("fashionmnist", "FedeKD", 0.5): "not run",
        ("fashionmnist", "No gating", 0.1): "not in the paper",
        ("digits", "FedeKD", 0.5): "not in the paper",
    }
    for place, verdict in verdicts.items():
        assert entry(tables, 1, *place).verdict == verdict, place
    assert entry(tables, 10, "fashionmnist", "No gating", 0.1).verdict == "differs"
    assert entry(tables, 8, "fashionmnist", "Local", 0.1).verdict == "no spread in the paper"
    assert entry(tables, 8, "fashionmnist", "Local", 0.1).mean == pytest.approx(0.93)
    assert entry(tables, 4, "fashionmnist", "FedAvg", 0.1).mean == pytest.approx(-0.4)
    assert entry(tables, 6, "fashionmnist", "FedAvg", 0.1).mean == pytest.approx(-0.3)


def test_the_best_is_the_highest_or_the_lowest() -> None:
    tables = build_tables(Measured([*rows(), row("FedAvg", 0, -0.3, dataset="retinamnist", metric="rmse")]))
    assert entry(tables, 2, "retinamnist", "FedAvg", 0.1).best
    assert not entry(tables, 2, "retinamnist", "FedeKD", 0.1).best
    best = [name for _, name, _, found in tables[0].entries() if found.best]
    assert best == ["FedeKD"]


def test_runs_of_other_options_stand_apart() -> None:
    own = rows()
    known = {r["key"] for r in own if r["dataset"] == "fashionmnist" and r["method"] == "FedeKD"}
    tables = build_tables(Measured(own, known))
    assert entry(tables, 1, "fashionmnist", "FedAvg", 0.1).verdict == "not run"
    assert entry(tables, 1, "fashionmnist, other options", "FedAvg", 0.1).verdict == "not in the paper"
    assert entry(tables, 1, "digits", "FedeKD", 0.5).values == {0: 0.01}


def test_two_configurations_are_not_averaged() -> None:
    with pytest.raises(UserError, match="FedAvg was run with two configurations"):
        Measured([row("FedAvg", 0, 0.1), row("FedAvg", 0, 0.2, key="other")])


def test_pairs_and_ranks() -> None:
    measured = Measured(rows())
    by_method = {(c.second, c.measure): c for c in against(measured) if c.dataset == "fashionmnist"}
    shuffled = by_method["Shuffled gate", "delta_avg"]
    assert shuffled.test.pairs == 10
    assert shuffled.test.p == pytest.approx(2 / 2**10)
    assert shuffled.adjusted == pytest.approx(2 * 2 / 2**10)  # two tested others: FedAvg has too few seeds
    assert by_method["FedAvg", "delta_avg"].test.p is None
    ranked = {(dataset, measure): ranking for dataset, measure, ranking in rankings(measured)}
    assert set(ranked) == {("fashionmnist", "delta_avg"), ("fashionmnist", "delta_worst")}
    ranking = ranked["fashionmnist", "delta_avg"]
    assert set(ranking.mean_ranks) == {"FedeKD", "Shuffled gate", "No gating", "Local"}
    assert ranking.repetitions == 10


def test_the_finding_about_the_gate_follows_the_figures() -> None:
    helps = gate_finding(Measured(rows()))
    assert "clear difference in 2 of 2 comparisons with shuffled weights, all of them for the better" in helps.summary
    assert "FashionMNIST at alpha 0.1, 10 seeds: the gate gains +0.0035 on average (p = 0.002*)" in helps.paragraph
    swapped = {"FedeKD": "Shuffled gate", "Shuffled gate": "FedeKD"}
    harms = gate_finding(Measured([{**r, "method": swapped.get(r["method"], r["method"])} for r in rows()]))
    assert "clear difference in 2 of 2 comparisons with shuffled weights, 0 of them" in harms.summary
    alike = [{**r, "method": "Shuffled gate"} for r in rows() if r["method"] == "FedeKD"]
    alike = [{**r, "key": f"{r['key']} shuffled"} for r in alike]
    none = gate_finding(Measured([*(r for r in rows() if r["method"] != "Shuffled gate"), *alike]))
    assert "no clear difference in any of 2 comparisons" in none.summary
    assert "Nothing can be said" in gate_finding(Measured(rows()[:3])).summary


def test_places_of_a_file_are_filled_and_the_rest_is_left() -> None:
    text = "# A\n<!-- fill: methods digits -->\nold\n<!-- /fill -->\nB\n<!-- fill: sweep beta -->\n<!-- /fill -->\n"
    filled = fill(text, Measured(rows()))
    assert "old" not in filled
    assert filled.startswith("# A\n<!-- fill: methods digits -->\n\n| data set |")
    assert "| digits, accuracy | 0.5 | FedeKD | 0.9400 | +0.0100 | +0.0200 | +0.0150 | 1 |" in filled
    assert "| digits, accuracy | 0.5 | Local | 0.9300 | 0 | 0 | 0 | 1 |" in filled
    assert "| average Delta at alpha 0.5 | beta 1 | beta 4 | seeds |" in filled
    assert "| digits, accuracy | +0.0100 | +0.0200 | 1 |" in filled
    assert fill(filled, Measured(rows())) == filled
    with pytest.raises(UserError, match="did you mean 'gate'"):
        fill("<!-- fill: gates -->\n<!-- /fill -->", Measured(rows()))


class Page(HTMLParser):
    """Counts what a page is made of, and sees that what is opened is closed."""

    VOID = frozenset({"meta", "link", "img", "br"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.counts: dict[str, int] = {}
        self.loads: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.counts[tag] = self.counts.get(tag, 0) + 1
        given = dict(attributes)
        self.loads += [given[name] or "" for name in ("src", "href") if name in given and tag != "a"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture
def results(tmp_path: Path) -> Path:
    write_results(tmp_path / "runs/results", rows())
    return tmp_path / "runs"


def test_a_report_is_a_page_that_loads_nothing(
    results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fedekd.benchmark.collect.paper_grid", lambda dataset: {r["key"]: None for r in rows()})
    assert main(["report", str(results), "--root", str(results / "none")]) == 0
    assert "of the paper's 456 cells: not run" in capsys.readouterr().out
    folder = results / "report"
    page = Page()
    page.feed((folder / "index.html").read_text())
    assert page.open == []
    assert page.loads
    assert all(target.startswith("data:") for target in page.loads)
    assert page.counts["img"] == len(list((folder / "figures").glob("*.png"))) == 4
    assert {path.stem for path in (folder / "tables").glob("*.csv")} == {
        *(f"table{number:02d}" for number in range(1, 11)),
        *("paired", "gate"),
    }
    with (folder / "tables/table01.csv").open() as file:
        cells = {(c["dataset"], c["method"], c["alpha"]): c for c in csv.DictReader(file)}
    cell = cells["fashionmnist", "FedeKD", "0.1"]
    assert float(cell["mean"]) == pytest.approx(-0.0065)
    assert json.loads(cell["values"])["0"] == pytest.approx(-0.0119)
    assert (cell["paper_mean"], cell["seeds"], cell["verdict"], cell["best"]) == ("-0.0065", "10", "agrees", "1")
    assert "wrong sign" in cells["fashionmnist", "FedDyn", "0.1"]["fault"]
    markdown = (folder / "report.md").read_text()
    for table in re.findall(r"(?:^\|.*\n)+", markdown, re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1, table
    for picture in re.findall(r"\]\((figures/.*?)\)", markdown):
        assert (folder / picture).is_file()
    assert "| digits | classification | 10 | 8x8x1 | 1,797 |" in markdown


def test_a_report_of_runs_of_fit(npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    small = [f"--data.dataset={npz}", "--data.num_clients=2", "--data.alpha=1", "--rounds=1", "--logger=null"]
    small += ["--client.local_epochs=1", "--trainer.threads=1"]
    for number, options in enumerate(([], ["--method.beta=3"])):
        assert main(["fit", *small, *options, f"--output=runs/{number}"]) == 0
    assert main(["report", "runs"]) == 0
    with (tmp_path / "runs/report/tables/table01.csv").open() as file:
        ours = {line["method"]: line for line in csv.DictReader(file) if line["verdict"] == "not in the paper"}
    assert set(ours) == {"FedeKD", "FedeKD, beta 3.0"}
    summary = json.loads((tmp_path / "runs/1/summary.json").read_text())
    assert float(ours["FedeKD, beta 3.0"]["mean"]) == summary["delta"]["avg"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "report needs a folder"),
        (["nowhere"], "report nowhere: there is no such folder"),
        (["."], "report .: there is no finished run"),
        (["--fill", "missing.md", "results"], "--fill missing.md: there is no such file"),
    ],
)
def test_bad_input_is_told_in_one_line(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_results(tmp_path / "work/results", [row("FedeKD", 0, 0.1, dataset="digits")])
    (tmp_path / "work/empty").mkdir()
    monkeypatch.chdir(tmp_path / "work/empty" if arguments == ["."] else tmp_path / "work")
    assert main(["report", *arguments]) == 2
    told = capsys.readouterr().err
    assert words in told
    assert told.count("\n") == 1
