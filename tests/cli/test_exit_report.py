"""Command `report` for runs with exits."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator
from functools import partial
from html.parser import HTMLParser
from pathlib import Path

import pytest

from fedekd.cli import main
from fedekd.early_exit.report.exit_report import ReportOptions

FAST = ["--client.local_epochs=1", "--trainer.accelerator=cpu", "--trainer.threads=1", "--logger=null", "--quiet"]
TABLES = {"exits", "policies", "validity", "reliability", "corruption", "provenance"}


def fit(npz: Path, folder: str, *options: str) -> None:
    data = [f"--data.dataset={npz}", "--data.num_clients=1", "--data.partition=iid", "--data.batch_size=8"]
    assert main(["fit", *FAST, *data, "--rounds=2", f"--output={folder}", *options]) == 0


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, write_blobs: Callable[..., Path]) -> Iterator[Path]:
    """Create a folder with a data set, a run with exits and its report."""
    folder = tmp_path_factory.mktemp("exits")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        # Few images and batches, for speed.
        patch.setattr("fedekd.cli.exit_report.ReportOptions", partial(ReportOptions, corrupted=60, batches=2))
        npz = write_blobs(folder / "blobs.npz", num_samples=400)
        fit(npz, "runs/safe", "--method=SafeKD", "--client.exits=2")
        assert main(["report", "runs/safe", "--draws=5"]) == 0
        yield folder


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_report_writes_page_tables_and_figures(run: Path) -> None:
    report = run / "runs/safe/report"
    assert {path.stem for path in (report / "tables").glob("*.csv")} == TABLES | {"runs", "run1-clients"}
    figures = {path.stem for path in (report / "figures").glob("*.png")}
    of_run = {"run1-delta", "run1-rounds"}
    assert figures == {"accuracy_against_cost", "validity", "reliability", "corruption"} | of_run
    assert all(path.stat().st_size > 5000 for path in (report / "figures").glob("*.png"))
    markdown = (report / "report.md").read_text()
    assert markdown.count("\n| ---") == len(TABLES) + 6  # runs, clients, other metrics, exits, budgets, settings
    for link in re.findall(r"\]\((figures/[^)]+)\)", markdown):
        assert (report / link).is_file()


def test_report_page_has_no_external_resources(run: Path) -> None:
    class Links(HTMLParser):
        found: list[str] = []  # noqa: RUF012 - one page

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            self.found += [value or "" for name, value in attrs if name in ("src", "href")]

    parser = Links()
    parser.feed((run / "runs/safe/report/index.html").read_text())
    assert len(parser.found) > 5
    assert all(link.startswith(("data:", "#")) for link in parser.found), parser.found


def test_report_compares_network_with_local_baseline(run: Path) -> None:
    table = rows(run / "runs/safe/report/tables/exits.csv")
    assert [(row["network"], row["exit"]) for row in table] == [
        ("SafeKD", "1"),
        ("SafeKD", "2"),
        ("Local", "1"),
        ("Local", "2"),
    ]
    summary = json.loads((run / "runs/safe/summary.json").read_text())
    # The run was scored at the trainer's precision, the report is made in float32.
    assert float(table[1]["accuracy"]) == pytest.approx(summary["mean"], abs=0.03)
    assert float(table[3]["accuracy"]) == pytest.approx(summary["local_mean"], abs=0.03)
    assert float(table[1]["cost"]) == float(table[3]["cost"]) == 1.0


def test_report_validity_has_every_rule_and_target(run: Path) -> None:
    table = rows(run / "runs/safe/report/tables/validity.csv")
    assert len(table) == 4 * 5
    for row in table:
        assert float(row["violation rate"]) == int(row["violations"]) / 5
        assert row["guarantee"] == ("yes" if row["rule"] in ("ltt", "ltt_joint") else "no")


def test_report_corruptions_are_complete(run: Path) -> None:
    table = rows(run / "runs/safe/report/tables/corruption.csv")
    assert len({(row["corruption"], row["severity"]) for row in table}) == 6 * 5


@pytest.mark.slow
def test_report_compares_two_runs(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run)
    fit(run / "blobs.npz", "runs/again", "--method=SafeKD", "--client.exits=2", "--client.optimizer.lr=1e-2")
    assert main(["report", "runs/safe", "runs/again", "--draws=2", "--output=both"]) == 0
    table = rows(run / "both/tables/exits.csv")
    networks = list(dict.fromkeys(row["network"] for row in table))
    assert networks == ["SafeKD", "Local", "SafeKD (runs/again)"]
    without_rule = rows(run / "runs/safe/report/tables/exits.csv")
    assert [row["accuracy"] for row in table[:4]] == [row["accuracy"] for row in without_rule]


@pytest.mark.slow
def test_report_shows_federated_model_if_local_model_is_deployed(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run)
    fit(
        run / "blobs.npz",
        "runs/deployed_local",
        "--method=SafeKD",
        "--client.exits=2",
        "--do_no_harm.confidence=0.999999999",
    )
    assert json.loads(Path("runs/deployed_local/summary.json").read_text())["clients"][0]["deployed"] == "local"
    assert main(["report", "runs/deployed_local", "--draws=1"]) == 0
    deployed_local, without_rule = (
        rows(Path(f"runs/{name}/report/tables/exits.csv")) for name in ("deployed_local", "safe")
    )
    assert deployed_local == without_rule
    assert [row["accuracy"] for row in deployed_local[:2]] != [row["accuracy"] for row in deployed_local[2:]]


@pytest.mark.slow
def test_report_invalid_input_prints_one_line_error(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run)
    fit(run / "blobs.npz", "runs/plain", "--method=Local")
    fit(run / "blobs.npz", "runs/other", "--method=SafeKD", "--client.exits=2", "--seed=1")
    fit(run / "blobs.npz", "runs/single", "--method=Local", "--client.exits=1")
    capsys.readouterr()
    for words, expected in (
        (["runs/single"], "expected a network with at least 2 exits, got one with 1 exit"),
        (["runs/plain", "--exits=true"], "without exits"),
        (["runs/safe", "--client=3"], "--client: expected 0, got '3'"),
        (["runs/safe", "--draws=0"], "--draws: expected at least 1, got 0"),
        (["runs/safe", "runs/other"], "has the same images, got different images"),
    ):
        assert main(["report", *words]) == 2
        error = capsys.readouterr().err
        assert expected in error
        assert error.count("\n") == 1, error
