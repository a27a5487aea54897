"""A grid runs every cell once, whatever fails, dies or is stopped."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedekd.benchmark import Block, Cell, cells, parse_filter, read_results, require_valid, run_grid, write_results
from fedekd.benchmark.results import COLUMNS
from fedekd.cli import main
from fedekd.errors import UserError

BLOCK = Block(
    datasets=["digits"],
    alphas=[0.1, 0.5],
    seeds=[0, 1],
    methods={"FedeKD": {"class_path": "FedeKD"}, "FedAvg": {"class_path": "FedAvg"}},
)

#: A card without bfloat16.
OLD_CARD = {"trainer.precision": "16-mixed"}


def test_a_grid_is_the_product_and_each_cell_is_there_once() -> None:
    grid = cells([BLOCK, BLOCK])
    assert len(grid) == len({cell.key for cell in grid}) == 8
    assert {(c.alpha, c.seed, c.method) for c in grid} == {
        (alpha, seed, method) for alpha in (0.1, 0.5) for seed in (0, 1) for method in ("FedeKD", "FedAvg")
    }
    assert [cell.group for cell in grid] == sorted(cell.group for cell in grid)


def key(method: Mapping[str, Any], **options: Any) -> str:
    block = Block(["digits"], [0.1], [0], {"x": method}, options)
    return cells([block])[0].key


def test_the_key_is_of_what_decides_the_numbers() -> None:
    plain = key({"class_path": "FedeKD"})
    assert key({"class_path": "fedekd.methods.FedeKD", "init_args": {"beta": 1.0}}) == plain
    assert key({"class_path": "FedeKD"}, **{"trainer.threads": 2, "data.root": "elsewhere"}) == plain
    different = [
        key({"class_path": "FedeKD", "init_args": {"beta": 2.0}}),
        key({"class_path": "Local"}),
        key({"class_path": "FedeKD"}, rounds=4),
        key({"class_path": "FedeKD"}, **{"client.local_epochs": 3}),
    ]
    assert len({plain, *different}) == 5


def test_filter() -> None:
    assert parse_filter("") == {}
    grid = cells([BLOCK], parse_filter("alpha=0.50,method=fedavg"))
    assert {(cell.alpha, cell.method) for cell in grid} == {(0.5, "FedAvg")}
    for text, words in (("alpha", "NAME=VALUE"), ("aplha=1", "did you mean 'alpha'")):
        with pytest.raises(UserError, match=words):
            parse_filter(text)


def fake_row(cell: Cell) -> dict[str, str]:
    row = {**dict.fromkeys(COLUMNS, "0"), "metric": "accuracy"}
    return {**row, "key": cell.key, "dataset": cell.dataset, "alpha": str(cell.alpha), "method": cell.method}


def fake_run(cell: Cell, folder: Path, trainer: Any, baseline_dir: Path, commit: str) -> dict[str, str]:
    """In place of a federation: notes that it ran; fails or dies where it is told to."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "ran").open("a") as file:
        file.write("x")
    if cell.method == "fails":
        raise ValueError("no luck\ntoday")
    if cell.method == "dies":
        os._exit(9)
    return fake_row(cell)


class Watch:
    def __init__(self) -> None:
        self.failed: list[str] = []
        self.begun: tuple[int, int] | None = None
        self.finished: list[str] = []

    def started(self, total: int, done: int) -> None:
        self.begun = (total, done)

    def cell_started(self, cell: Cell) -> None:
        pass

    def cell_finished(self, cell: Cell, row: Any) -> None:
        self.finished.append(cell.method)

    def cell_failed(self, cell: Cell, reason: str) -> None:
        self.failed.append(f"{cell.method}: {reason}")


def cell(method: str, seed: int = 0) -> Cell:
    return Cell("digits", 0.1, seed, method, {}, f"{method}-{seed}")


@pytest.mark.slow
def test_failures_and_deaths_do_not_stop_the_rest(tmp_path: Path) -> None:
    grid = [cell("fails"), cell("dies", seed=1), cell("a"), cell("b"), cell("c", seed=2)]
    watch = Watch()
    failures = run_grid(grid, tmp_path / "runs", tmp_path / "results", 2, {}, watch, fake_run)
    assert sorted(c.method for c, _ in failures) == ["dies", "fails"]
    assert sorted(watch.finished) == ["a", "b", "c"]
    assert any(text == "fails: ValueError: no luck today" for text in watch.failed)
    assert set(read_results(tmp_path / "results")) == {"a-0", "b-0", "c-2"}
    # Again: what is finished is not run again, what failed is tried anew.
    watch = Watch()
    run_grid(grid[2:], tmp_path / "runs", tmp_path / "results", 2, {}, watch, fake_run)
    assert watch.begun == (3, 3)
    assert (tmp_path / "runs" / "a-0" / "ran").read_text() == "x"


def test_results_are_sorted_and_written_once(tmp_path: Path) -> None:
    rows = [fake_row(cell("b", 1)), fake_row(cell("a", 0))]
    write_results(tmp_path, rows)
    content = (tmp_path / "digits.csv").read_bytes()
    stamp = (tmp_path / "digits.csv").stat().st_mtime_ns
    write_results(tmp_path, reversed(rows))
    assert (tmp_path / "digits.csv").read_bytes() == content
    assert (tmp_path / "digits.csv").stat().st_mtime_ns == stamp
    assert [row["method"] for row in csv.DictReader(content.decode().splitlines())] == ["a", "b"]
    assert read_results(tmp_path / "nowhere") == {}


@pytest.mark.slow
def test_benchmark_command_fills_the_results_and_repeats_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("grid.yaml").write_text(
        "blocks:\n- datasets: [digits]\n  alphas: [5.0]\n  seeds: [0]\n"
        "  options: {rounds: 1, client.local_epochs: 1, data.batch_size: 256}\n"
        "  methods: {FedeKD: {class_path: FedeKD}, Local: {class_path: Local}}\n"
    )
    command = ["benchmark", "--config", "grid.yaml", "--output", "out", "--accelerator", "cpu"]
    assert main(command) == 0
    rows = {row["method"]: row for row in read_results(Path("out/results")).values()}
    assert set(rows) == {"FedeKD", "Local"}
    assert float(rows["FedeKD"]["local_mean"]) == float(rows["Local"]["mean"])
    assert rows["FedeKD"]["device"] == "cpu"
    assert not list(Path("out/runs").rglob("checkpoints"))
    capsys.readouterr()
    assert main(command) == 0
    assert "2 cells, 2 of them finished" in capsys.readouterr().out


def test_finished_cells_of_another_precision_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("grid.yaml").write_text("blocks:\n- {datasets: [digits], alphas: [5.0], seeds: [0], methods: {L: Local}}\n")
    [only] = cells([Block(["digits"], [5.0], [0], {"L": {"class_path": "Local"}})])
    write_results(Path("out/results"), [{**fake_row(only), "precision": "bf16-mixed"}])
    command = ["benchmark", "--config=grid.yaml", "--output=out", "--accelerator=cpu"]
    assert main([*command, "--precision=32-true"]) == 0
    assert "--precision is 32-true, and of the finished cells were run 1 in bf16-mixed" in capsys.readouterr().err
    for same in ("bf16-mixed", "auto"):
        assert main([*command, f"--precision={same}"]) == 0
        assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("alphas: [0]", "digits alpha 0 FedeKD: data.alpha=0"),
        ("methods: {FedeKD: {class_path: FedeKD, init_args: {beta: -1}}}", "digits alpha 5 FedeKD: method.beta is -1"),
        ("options: {rounds: 0}", "digits alpha 5 FedeKD: rounds is 0"),
        (
            "{methods: {T: {class_path: FedType}}, options: {client.exits: 2}, coverage: {draws: 1}}",
            "digits alpha 5 T: promises are made on validation samples, and the method learns from these",
        ),
    ],
)
def test_what_no_run_could_be_made_of_is_told_before_any(
    line: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    block = {"datasets": ["digits"], "alphas": [5.0], "seeds": [0], "methods": {"FedeKD": {"class_path": "FedeKD"}}}
    Path("grid.yaml").write_text(yaml.safe_dump({"blocks": [block | yaml.safe_load(line)]}))
    assert main(["benchmark", "--config=grid.yaml", "--output=out", "--accelerator=cpu"]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"error: {words}")
    assert told.count("\n") == 1
    assert not Path("out").exists()


def test_what_the_command_says_of_the_trainer_comes_before_the_grid() -> None:
    [cell] = cells([replace(BLOCK, alphas=[0.5], seeds=[0], methods={"L": {"class_path": "Local"}}, options=OLD_CARD)])
    with pytest.raises(UserError, match="needs CUDA"):
        require_valid([cell], {"accelerator": "cpu"})
    require_valid([cell], {"accelerator": "cpu", "precision": "32-true"})


@pytest.mark.slow
def test_a_killed_benchmark_repeats_no_finished_run(tmp_path: Path) -> None:
    (tmp_path / "grid.yaml").write_text(
        "blocks:\n- datasets: [digits]\n  alphas: [5.0]\n  seeds: [0, 1, 2]\n"
        "  options: {rounds: 1, client.local_epochs: 1, data.batch_size: 256}\n"
        "  methods: {FedAvg: {class_path: FedAvg}}\n"
    )
    code = "import sys; from fedekd.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "benchmark", "--config", "grid.yaml", "--output", "out"]
    kept = tmp_path / "out/results/digits.csv"
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL) as running:
        until = time.monotonic() + 300
        while not kept.exists():
            assert running.poll() is None
            assert time.monotonic() < until
            time.sleep(0.02)
        running.kill()
    before = read_results(kept.parent)
    assert 1 <= len(before) < 3
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert f"3 cells, {len(before)} of them finished" in ended.stdout
    after = read_results(kept.parent)
    assert len(after) == 3
    # The seconds that a run took would differ if it had been run again.
    assert {key: after[key] for key in before} == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "--config benchmark/quick.yaml"),
        (["--config", "benchmark/quick.yaml", "--filter", "dataset=cifar"], "no cell"),
        (["--config", "benchmark/quick.yaml", "--processes", "0"], "processes is 0"),
        (["--config", "benchmark/quick.yml"], "did you mean 'benchmark/quick.yaml'"),
        (["--config", "benchmark/quick.yaml", "--outptu", "x"], "did you mean --output"),
        (["--config", "benchmark/quick.yaml", "--threads", "0"], "--threads is '0', and must be a whole number of"),
        (["--config", "benchmark/quick.yaml", "--accelerator", "foo"], "--accelerator is 'foo'"),
        (["--config", "benchmark/quick.yaml", "--precision", "foo"], "--precision is 'foo'"),
        (["--config", "benchmark/quick.yaml", "--output", "/dev/null"], "--output /dev/null is no folder"),
    ],
)
def test_mistakes_are_told_in_one_line(options: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["benchmark", *options]) == 2
    told = capsys.readouterr().err
    assert words in told
    assert told.count("\n") == 1
