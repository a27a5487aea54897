"""`report`: pages about finished runs and about the results of a grid."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest

from fedekd.cli import main
from fedekd.cli.report import run as report

FAST = ["--client.local_epochs=1", "--trainer.accelerator=cpu", "--trainer.threads=1", "--logger=null", "--quiet"]
RESULTS = Path(__file__).resolve().parents[2] / "results"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, write_blobs: Callable[..., Path]) -> Iterator[Path]:
    """Three short runs: FedeKD with do_no_harm, FedeKD with another beta, and FedAvg with exits."""
    folder = tmp_path_factory.mktemp("work")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        npz = write_blobs(folder / "blobs.npz", num_samples=150)
        small = ["fit", *FAST, f"--data.dataset={npz}", "--data.num_clients=2", "--data.alpha=1", "--rounds=2"]
        assert main([*small, "--do_no_harm.confidence=0.9", "--output=runs/0"]) == 0
        assert main([*small, "--method.beta=3", "--output=runs/1"]) == 0
        assert main([*small, "--method=FedAvg", "--client.exits=2", "--output=runs/2"]) == 0
        yield folder


@pytest.fixture
def here(runs: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Change to the folder of the runs."""
    monkeypatch.chdir(runs)
    return runs


def section(markdown: str, title: str) -> str:
    return re.split(rf"^## {re.escape(title)}.*\n", markdown, flags=re.MULTILINE)[1].split("\n## ")[0]


def test_report_of_runs_has_settings_clients_and_commands(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "runs", "--exits=false", "--output=all"]) == 0
    assert capsys.readouterr().out == "Report: all/index.html\n"
    markdown = (here / "all/report.md").read_text()
    lines = section(markdown, "Runs").strip().splitlines()
    rows = [dict(zip(lines[0].split(" | "), line.split(" | "), strict=True)) for line in lines[2:]]
    assert [row["| run"] for row in rows] == ["| runs/0", "| runs/1", "| runs/2"]
    assert [row["method"] for row in rows] == ["FedeKD", "FedeKD", "FedAvg"]
    assert rows[1]["settings that differ |"] == "method.beta 3.0 |"
    assert rows[1]["partition"] == "Dirichlet, alpha 1"
    for index, row in enumerate(rows):
        summary = json.loads((here / f"runs/{index}/summary.json").read_text())
        assert float(row["Delta avg"].replace("\N{MINUS SIGN}", "-")) == pytest.approx(
            summary["delta"]["avg"], abs=5e-5
        )
    own = section(markdown, "FedeKD on blobs (runs/0)")
    summary = json.loads((here / "runs/0/summary.json").read_text())
    for client in summary["clients"]:
        cells = [client["client"], ", ".join(map(str, client["classes"])), client["train"], client["test"]]
        assert f"| {' | '.join(map(str, cells))} | {client['local']:.4f} | {client['score']:.4f} |" in own
        assert client["deployed"] in own
    assert "Do no harm (confidence 0.9, margin 0)" in own
    assert "### Exits: all images at one exit" in section(markdown, "FedAvg on blobs (runs/2)")
    assert "fedekd fit --config runs/1/config.yaml --output runs/1-repeat\n" in section(markdown, "Repeat the runs")


def test_report_command_repeats_the_run(here: Path) -> None:
    command = "fit --config runs/1/config.yaml --output repeated"
    assert main(command.split()) == 0
    assert (here / "repeated/metrics.csv").read_bytes() == (here / "runs/1/metrics.csv").read_bytes()
    shutil.rmtree(here / "repeated")


def test_report_page_loads_nothing_and_replaces_only_its_files(here: Path) -> None:
    class Page(HTMLParser):
        loads: list[str] = []  # noqa: RUF012 - one page

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            self.loads += [value or "" for name, value in attrs if name in ("src", "href") and tag != "a"]

    assert main(["report", "runs/0", "runs/1", "--output=page"]) == 0
    page = Page()
    page.feed((here / "page/index.html").read_text())
    assert len(page.loads) > 5
    assert all(link.startswith("data:") for link in page.loads)
    assert len(list((here / "page/figures").glob("*.png"))) == 6
    (here / "page/figures/mine.png").write_text("")
    assert main(["report", "runs/1", "--output=page"]) == 0
    assert {path.name for path in (here / "page/figures").glob("*")} == {
        *("run1-delta.png", "run1-rounds.png", "run1-gate.png", "mine.png"),
    }


def test_report_of_results_has_methods_and_runs(tmp_path: Path) -> None:
    assert main(["report", str(RESULTS / "do_no_harm"), "--output", str(tmp_path)]) == 0
    markdown = (tmp_path / "report.md").read_text()
    assert "| fashionmnist, accuracy | 0.1 | FedeKD | 0.96" in section(markdown, "Methods")
    assert section(markdown, "Runs of the grid").count("\n| fashionmnist | 0.1 | FedeKD |") == 3
    assert (tmp_path / "figures/delta-fashionmnist-0.1.png").is_file()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "expected the folder of a run"),
        (["nowhere"], "got nowhere, which does not exist"),
        (["empty"], "got empty, which has neither"),
        (["damaged"], "the run in damaged is damaged"),
        (["runs/0", "--fill=README.md"], "--fill"),
        (["runs/0", "--output=blobs.npz"], "blobs.npz"),
    ],
)
def test_report_invalid_input_prints_one_line_error(
    arguments: list[str], words: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "empty").mkdir(exist_ok=True)
    shutil.copytree(here / "runs/1", here / "damaged", dirs_exist_ok=True)
    (here / "damaged/summary.json").write_text('{"delta": ')
    assert main(["report", *arguments]) == 2
    message = capsys.readouterr().err
    assert words in message
    assert message.count("\n") == 1


def test_report_for_wandb_offline_raises_before_the_work(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    shutil.copytree(here / "runs/1", here / "logged", dirs_exist_ok=True)
    (here / "logged/wandb").mkdir(exist_ok=True)
    (here / "logged/wandb/run-id").write_text("1a2b3c4d\n")
    for folder, words in (("runs/0", "the folder of a run that W&B has logged"), ("logged", "a W&B server, got none")):
        assert main(["report", folder, "--wandb=true", "--output=unwritten"]) == 2
        message = capsys.readouterr().err
        assert f"--wandb: expected {words}" in message
        assert message.count("\n") == 1
    assert not (here / "unwritten").exists()


def test_report_of_too_many_runs_raises(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedekd.cli.report.MAX_RUNS", 2)
    with pytest.raises(ValueError, match="expected at most 2 runs, got 3"):
        report(["runs"])


def test_report_ignores_other_csv_files_of_a_run(finished_run: Path) -> None:
    (finished_run / "notes.csv").write_bytes(b"\xff\xfe\x00")
    assert main(["report", str(finished_run), "--exits=false"]) == 0
