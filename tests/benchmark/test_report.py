"""What is read, what is said of it, and what is written."""

from __future__ import annotations

import csv
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from fedekd.benchmark.collect import paper_grid
from fedekd.benchmark.comparisons import against, standings
from fedekd.benchmark.figures import swept
from fedekd.benchmark.fill import fill
from fedekd.benchmark.gate import GateFinding, gate_comparisons, gate_finding
from fedekd.benchmark.measured import Measured
from fedekd.benchmark.results import COLUMNS, Row, read_results, write_results
from fedekd.benchmark.tables import Entry, Table, build_tables
from fedekd.cli import main
from fedekd.cli.report import run
from fedekd.errors import UserError


def row(method: str, seed: int, delta: float, **more: Any) -> Row:
    values = {
        **dict.fromkeys(COLUMNS, "0"),
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


def of_retina(method: str, seeds: int, delta: float) -> list[Row]:
    return [row(method, s, delta + 1e-3 * s, dataset="retinamnist", metric="rmse") for s in range(1, seeds + 1)]


def test_the_best_is_the_highest_or_the_lowest_over_the_same_seeds() -> None:
    own = [*of_retina("FedeKD", 4, -0.1), *of_retina("FedProx", 4, -0.2), *of_retina("FedDyn", 3, -0.5)]
    tables = build_tables(Measured([*rows()[:-1], *own]))
    assert [name for _, name, _, found in tables[1].entries() if found.best] == ["FedProx"]
    assert [name for _, name, _, found in tables[0].entries() if found.best] == ["FedeKD"]
    few = build_tables(Measured([*of_retina("FedeKD", 2, -0.1), *of_retina("FedProx", 2, -0.2)]))
    assert not any(found.best for *_, found in few[1].entries())


def test_a_run_that_diverged_is_said_to_have() -> None:
    own = [*rows(), row("FedDyn", 0, math.nan), *(row("FedProx", s, math.nan if s else 0.1) for s in range(10))]
    measured = Measured(own)
    tables = build_tables(measured)
    assert entry(tables, 1, "fashionmnist", "FedProx", 0.1).verdict == "diverged"
    assert entry(tables, 1, "fashionmnist", "FedeKD", 0.1).best
    assert {c.second: c.test.p for c in against(measured)}["FedProx"] is None
    assert "FedProx" in standings(measured)[0].omitted


def test_runs_of_other_options_stand_apart() -> None:
    own = rows()
    known = {r["key"] for r in own if r["dataset"] == "fashionmnist" and r["method"] == "FedeKD"}
    measured = Measured(own, known)
    tables = build_tables(measured)
    assert measured.apart == ["fashionmnist", "retinamnist"]
    assert entry(tables, 1, "fashionmnist", "FedAvg", 0.1).verdict == "not run"
    assert entry(tables, 1, "fashionmnist, other options", "FedAvg", 0.1).verdict == "not in the paper"
    assert entry(tables, 1, "digits", "FedeKD", 0.5).values == {0: 0.01}
    filled = fill("<!-- fill: methods fashionmnist -->\n<!-- /fill -->", measured)
    assert "FedeKD" in filled
    assert "FedAvg" not in filled


def test_two_configurations_are_two_methods() -> None:
    measured = Measured([row("FedAvg", 0, 0.1), row("FedAvg", 1, 0.2, configuration="abcdefgh")])
    assert measured.methods("fashionmnist") == ["FedAvg (0)", "FedAvg (abcdef)"]
    assert measured.values("delta_avg", "FedAvg (abcdef)", "fashionmnist", 0.1) == {1: 0.2}


def test_the_papers_grid_is_the_shipped_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = set(paper_grid("retinamnist"))
    (tmp_path / "configs/benchmark").mkdir(parents=True)
    (tmp_path / "configs/retinamnist.yaml").write_text("data: {dataset: retinamnist}\nrounds: 99\n")
    (tmp_path / "configs/benchmark/paper.yaml").write_text("blocks: []\n")
    monkeypatch.chdir(tmp_path)
    paper_grid.cache_clear()
    assert set(paper_grid("retinamnist")) == wanted
    assert {cell.configuration for cell in paper_grid("retinamnist").values()} & wanted  # those of seed 0


def test_pairs_and_ranks() -> None:
    own = [*rows(), *(row("FedType", seed, -0.0001 * seed) for seed in range(10))]
    own += [*of_retina("FedeKD", 7, -0.1), *of_retina("FedProx", 7, -0.2)]
    measured = Measured(own)
    by_method = {(c.dataset, c.second, c.measure): c for c in against(measured)}
    assert not any(second in ("Shuffled gate", "No gating") for _, second, _ in by_method)
    assert by_method["fashionmnist", "FedAvg", "delta_avg"].test.p is None
    better = by_method["retinamnist", "FedProx", "delta_avg"]
    assert (better.favours, better.test.p, better.adjusted) == ("FedProx", 2 / 2**7, 2 / 2**7)
    assert better.gain == pytest.approx(-0.1)
    ranked = {(standing.dataset, standing.measure): standing for standing in standings(measured)}
    retina = ranked["retinamnist", "delta_worst"]
    assert list(retina.ranking.mean_ranks) == ["FedProx", "FedeKD", "Local"]
    fashion = ranked["fashionmnist", "delta_avg"]
    assert set(fashion.ranking.mean_ranks) == {"FedeKD", "Shuffled gate", "No gating", "FedType", "Local"}
    assert (fashion.ranking.repetitions, fashion.omitted, fashion.alphas) == (10, ["FedAvg"], [0.1])


def finding(own: list[Row]) -> GateFinding:
    return gate_finding(gate_comparisons(Measured(own)))


def test_the_finding_about_the_gate_follows_the_figures() -> None:
    helps = finding(rows())
    assert "average Delta it makes a clear difference in 1 of 1 place, all for the better (Fashion" in helps.summary
    assert "the gate gains +0.0035 on shuffled (p = 0.002*)" in helps.paragraph
    swapped = {"FedeKD": "Shuffled gate", "Shuffled gate": "FedeKD"}
    harms = finding([{**r, "method": swapped.get(r["method"], r["method"])} for r in rows()])
    assert "clear difference in 1 of 1 place, 0 of them for the better" in harms.summary
    alike = [{**r, "method": "Shuffled gate"} for r in rows() if r["method"] == "FedeKD"]
    none = finding([*(r for r in rows() if r["method"] != "Shuffled gate"), *alike])
    assert "For the average Delta no difference is clear in any of 1 place" in none.summary
    assert "Nothing can be said" in finding(rows()[:3]).summary
    # Six seeds at two places, better in every one: p is 2 / 2^6 each, and twice that is more than 5%.
    six = [row(m, s, d + 0.01 * s, alpha=a) for m, d in (("FedeKD", 0.1), ("Shuffled gate", 0.0)) for s in range(6)
           for a in (0.1, 0.3)]  # fmt: skip
    assert "the seeds are too few to show anything in 2 places" in finding(six).summary


def test_a_sweep_is_over_the_seeds_that_all_values_have() -> None:
    own = [row("FedeKD", s, 0.01 * s, dataset="digits", alpha=0.5) for s in range(5)]
    own += [row("beta 4.0", s, 0.1, dataset="digits", alpha=0.5) for s in (1, 2, 9)]
    own += [row("beta 0.5", s, 0.2, dataset="digits", alpha=0.5) for s in (2, 1, 3)]
    own += [row("beta high", 1, 0.2, dataset="digits", alpha=0.5), row("lambda_kd 2", 1, 0.0, dataset="digits")]
    by_value = swept(Measured(own), "beta")["digits"]
    assert by_value == {0.5: {1: 0.2, 2: 0.2}, 1.0: {1: 0.01, 2: 0.02}, 4.0: {1: 0.1, 2: 0.1}}
    assert swept(Measured(own), "lambda_kd") == {}


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
    assert "Nothing was run." in fill("<!-- fill: sweep lambda_kd -->\n<!-- /fill -->", Measured(rows()))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("<!-- fill: gates -->\n<!-- /fill -->", "did you mean 'gate'"),
        ("<!-- fill: methods digit -->\n<!-- /fill -->", "did you mean 'digits'"),
        ("<!-- fill: sweep betas -->\n<!-- /fill -->", "did you mean 'beta'"),
        ("<!-- fill: gate -->\nprose\n<!-- fill: verdicts -->\n<!-- /fill -->", "of 2 places .* 1 are closed"),
        ("nothing", "no place to fill"),
    ],
)
def test_a_place_that_cannot_be_filled_is_told(text: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        fill(text, Measured(rows()))


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
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A benchmark's folder, with a method of an awkward name; its rows count as the paper's grid."""
    own = [*rows(), row("A|B <i>", 0, 0.0, dataset="digits", alpha=0.5)]
    monkeypatch.setattr("fedekd.benchmark.collect.paper_grid", lambda dataset: {r["key"]: None for r in own})
    write_results(tmp_path / "runs/results", own)
    return tmp_path / "runs"


def test_a_report_is_a_page_that_loads_nothing(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(results), "--root", str(results / "none")]) == 0
    assert "Of the paper's 456 cells: not run" in capsys.readouterr().out
    folder = results / "report"
    text = (folder / "index.html").read_text()
    page = Page()
    page.feed(text)
    assert page.open == []
    assert page.loads
    assert all(target.startswith("data:") for target in page.loads)
    assert page.counts["img"] == len(list((folder / "figures").glob("*.png"))) == 4
    assert "A|B &lt;i&gt;" in text
    assert text.count("⚑") > 50
    assert "Figure 4. Average Delta over lambda_kd, the weight of the distillation: not run." in text
    assert "RetinaMNIST departs from the paper" in text
    names = {path.stem for path in (folder / "tables").glob("*.csv")}
    numbered = {*(f"table{number:02d}" for number in range(1, 11)), *(f"figure{number}" for number in (2, 3, 4))}
    assert names == numbered | {"paired", "gate", "rankings"}
    markdown = (folder / "report.md").read_text()
    tables = re.findall(r"(?:^\|.*\n)+", markdown, re.MULTILINE)
    assert len(tables) > 20
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1, table
    for picture in re.findall(r"\]\((.*?)\)", markdown):
        assert (folder / picture).is_file()
        assert " " not in picture
    assert "| digits | ours | classification | 10 | 8x8x1 | 1,797 |" in markdown
    assert "CIFAR-10 is not here: data.dataset: 'cifar10' is not readable" in markdown


def csv_lines(folder: Path, name: str) -> list[dict[str, str]]:
    with (folder / f"tables/{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_csv_files_hold_what_the_page_shows(results: Path) -> None:
    assert main(["report", str(results), "--root", str(results / "none")]) == 0
    folder = results / "report"
    cells = {(c["dataset"], c["method"], c["alpha"]): c for c in csv_lines(folder, "table01")}
    cell = cells["fashionmnist", "FedeKD", "0.1"]
    assert float(cell["mean"]) == pytest.approx(-0.0065)
    assert json.loads(cell["values"])["0"] == pytest.approx(-0.0119)
    assert (cell["paper_mean"], cell["seeds"], cell["verdict"], cell["best"]) == ("-0.0065", "10", "agrees", "1")
    assert "wrong sign" in cells["fashionmnist", "FedDyn", "0.1"]["fault"]
    gate = {(line["first"], line["second"], line["measure"]): line for line in csv_lines(folder, "gate")}
    assert gate["FedeKD", "Shuffled gate", "delta_worst"]["favours"] == "FedeKD"
    assert gate["FedeKD", "Shuffled gate", "delta_worst"]["pairs"] == "10"
    assert [line["value"] for line in csv_lines(folder, "figure3")] == ["1.0", "4.0"]
    facts = {line["dataset"]: line for line in csv_lines(folder, "table03")}
    assert (facts["octmnist"]["samples"], facts["octmnist"]["paper_samples"]) == ("", "109309")
    ranks = [line["method"] for line in csv_lines(folder, "rankings") if line["measure"] == "delta_avg"]
    assert sorted(ranks) == ["FedeKD", "Local", "No gating", "Shuffled gate"]


def test_a_report_replaces_an_older_one_and_nothing_else(results: Path) -> None:
    folder = results / "report"
    for name in ("figures/ranking-old-avg.png", "figures/mine.png", "tables/table99.csv", "tables/notes.csv"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("")
    assert main(["report", str(results), "--root", str(results / "none")]) == 0
    left = {path.name for path in folder.rglob("*") if path.stat().st_size == 0}
    assert left == {"mine.png", "notes.csv"}


def test_a_report_of_runs_of_fit(npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    small = [f"--data.dataset={npz}", "--data.num_clients=2", "--data.alpha=1", "--rounds=1", "--logger=null"]
    small += ["--client.local_epochs=1", "--trainer.threads=1"]
    for number, options in enumerate(([], ["--method.beta=3"], ["--method.gate=shuffled"])):
        assert main(["fit", *small, *options, f"--output=runs/{number}"]) == 0
    assert main(["report", "runs"]) == 0
    ours = {line["method"]: line for line in csv_lines(tmp_path / "runs/report", "table01") if line["mean"]}
    assert set(ours) == {"FedeKD", "FedeKD, beta 3.0", "Shuffled gate"}
    summary = json.loads((tmp_path / "runs/1/summary.json").read_text())
    assert float(ours["FedeKD, beta 3.0"]["mean"]) == summary["delta"]["avg"]
    (tmp_path / "runs/1/summary.json").write_text('{"delta": ')
    with pytest.raises(UserError, match="the run in runs/1 cannot be read"):
        run(["runs"])


GOOD = row("FedeKD", 0, 0.1, dataset="digits")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"key,dataset\na,digits\n", "line 2: no configuration"),
        (",".join(COLUMNS).encode() + b"\na,b,digits\n", "line 2: no alpha"),
        (",".join(COLUMNS).encode() + b"\n" + ",".join({**GOOD, "mean": "much"}.values()).encode(), "mean is 'much'"),
        (",".join(COLUMNS).encode() + b"\n" + ",".join({**GOOD, "seed": "x"}.values()).encode(), "seed is 'x'"),
        (",".join(COLUMNS).encode() + b"\n" + ",".join({**GOOD, "metric": "f1"}.values()).encode(), "metric is 'f1'"),
        (b"\xff\xfe\x00", "no CSV file of results"),
    ],
)
def test_damaged_results_are_told_by_line(content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "digits.csv").write_bytes(content)
    with pytest.raises(UserError, match=words):
        read_results(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "report needs a folder"),
        (["nowhere"], "report nowhere: there is no such folder"),
        (["."], "report .: there is no finished run"),
        (["--fill", "missing.md", "results"], "--fill missing.md: there is no such file"),
        (["--fill", "binary.md", "results"], "--fill binary.md is not text in UTF-8"),
        (["--output", "binary.md", "results"], "binary.md"),
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
    (tmp_path / "work/binary.md").write_bytes(b"\xff\xfe")
    monkeypatch.chdir(tmp_path / "work/empty" if arguments == ["."] else tmp_path / "work")
    assert main(["report", *arguments]) == 2
    told = capsys.readouterr().err
    assert words in told
    assert told.count("\n") == 1
