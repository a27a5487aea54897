"""The report on the paper as files."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from experiments.fedekd_paper import load
from experiments.fedekd_paper.__main__ import main
from fedekd.benchmark import write_results


class Page(HTMLParser):
    """Counts elements, collects what the page loads, and checks that elements are closed."""

    VOID = frozenset({"meta", "link", "img", "br"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.counts: dict[str, int] = {}
        self.loads: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.counts[tag] = self.counts.get(tag, 0) + 1
        values = dict(attributes)
        self.loads += [values[name] or "" for name in ("src", "href") if name in values and tag != "a"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory, helpers: Any) -> Path:
    """Write a report of example rows, one with a label that needs escaping, and return its folder."""
    folder = tmp_path_factory.mktemp("report")
    rows = [*helpers.example_rows(), helpers.make_row("A|B <i>", 0, 0.0, dataset="digits", alpha=0.5)]
    write_results(folder / "results", pd.DataFrame(rows))
    with pytest.MonkeyPatch.context() as patch:
        known = frozenset((row["configuration"], int(row["seed"])) for row in rows)
        patch.setattr(load, "paper_runs", lambda dataset: known)
        assert main([str(folder), "--root", str(folder / "none"), "--output", str(folder / "report")]) == 0
    return folder / "report"


def test_main_writes_a_page_that_loads_nothing(report: Path) -> None:
    text = (report / "index.html").read_text()
    page = Page()
    page.feed(text)
    assert page.open == []
    assert page.loads
    assert all(target.startswith("data:") for target in page.loads)
    assert page.counts["img"] == len(list((report / "figures").glob("*.png"))) == 4
    assert "Of the paper&#39;s 456 cells: not run" in text
    assert "A|B &lt;i&gt;" in text
    assert text.count("⚑") > 50
    assert "Figure 4. Average Delta over lambda_kd, the weight of the distillation: no runs." in text
    assert "RetinaMNIST deviates from the paper" in text


def test_main_writes_markdown_with_valid_tables_and_links(report: Path) -> None:
    markdown = (report / "report.md").read_text()
    tables = re.findall(r"(?:^\|.*\n)+", markdown, re.MULTILINE)
    assert len(tables) > 20
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1, table
    for picture in re.findall(r"\]\((.*?)\)", markdown):
        assert (report / picture).is_file()
        assert " " not in picture
    assert "| digits | loaded | classification | 10 | 8x8 | 1 | 1,797 | 1,797 |" in markdown
    assert "CIFAR-10 is not loaded: data.dataset: " in markdown


def test_main_writes_csv_files_with_the_values_of_the_page(report: Path) -> None:
    def read(name: str, index: list[str]) -> pd.DataFrame:
        return pd.read_csv(report / f"tables/{name}.csv").set_index(index)

    names = {path.stem for path in (report / "tables").glob("*.csv")}
    numbered = {*(f"table{number:02d}" for number in range(1, 11)), *(f"figure{number}" for number in (2, 3))}
    assert names == numbered | {"paired", "gate", "rankings", "missing"}
    cells = read("table01", ["dataset", "method", "alpha"]).sort_index()
    cell = cells.loc[("fashionmnist", "FedeKD", 0.1)]
    assert cell["mean"] == pytest.approx(-0.0065)
    assert json.loads(cell["values"])["0"] == pytest.approx(-0.0119)
    assert (cell["paper_mean"], cell["seeds"], cell["verdict"], cell["best"]) == (-0.0065, 10, "agrees", 1)
    assert "wrong sign" in cells.loc[("fashionmnist", "FedDyn", 0.1), "fault"]
    gate = read("gate", ["first", "second", "measure"]).loc[("FedeKD", "Shuffled gate", "delta_worst")]
    assert (gate["favours"], gate["pairs"]) == ("FedeKD", 10)
    facts = read("table03", ["data set", "source"])
    assert facts.loc[("OCTMNIST", "paper"), "samples"] == "109,309"
    ranks = read("rankings", ["measure"]).loc["delta_avg", "method"]
    assert sorted(ranks) == ["FedeKD", "Local", "No gating", "Shuffled gate"]


@pytest.mark.parametrize(("argument", "words"), [("nowhere", "does not exist"), ("empty", "expected CSV files of")])
def test_main_without_results_prints_one_line_error(
    argument: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    assert main([argument]) == 2
    message = capsys.readouterr().err
    assert words in message
    assert message.count("\n") == 1
