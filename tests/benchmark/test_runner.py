"""Run a grid: every cell once, in spite of failures, dead processes and interruptions."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import yaml

from fedekd.benchmark import Block, Cell, cells, read_results, run_grid, write_results
from fedekd.benchmark.provenance import code_digest, data_digest
from fedekd.benchmark.results import COLUMNS
from fedekd.cli import main


def fake_row(cell: Cell) -> dict[str, str]:
    row = {**dict.fromkeys(COLUMNS, "0"), "metric": "accuracy"}
    row |= {"configuration": cell.configuration, "seed": str(cell.seed), "data": "", "torch": torch.__version__}
    return {**row, "key": cell.key, "dataset": cell.dataset, "alpha": str(cell.alpha), "method": cell.method}


def fake_run(cell: Cell, output: Path, trainer: Any, baseline_dir: Path, commit: str) -> dict[str, str]:
    """Replacement of `run_cell`: records the call, and fails or dies according to the method."""
    folder = output / cell.key
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "ran").open("a") as file:
        file.write("x")
    if cell.method == "fails":
        raise ValueError("two\nlines")
    if cell.method == "dies":
        os._exit(9)
    return fake_row(cell)


class Recorder:
    def __init__(self) -> None:
        self.failed: list[str] = []
        self.start: tuple[int, int] | None = None
        self.finished: list[str] = []

    def started(self, total: int, done: int) -> None:
        self.start = (total, done)

    def cell_started(self, cell: Cell) -> None:
        pass

    def cell_finished(self, cell: Cell, row: Any) -> None:
        self.finished.append(cell.method)

    def cell_failed(self, cell: Cell, reason: str) -> None:
        self.failed.append(f"{cell.method}: {reason}")


def cell(method: str, seed: int = 0) -> Cell:
    return Cell("digits", 0.1, seed, method, {}, f"{method}-{seed}", method)


def test_run_grid_keeps_rows_that_another_grid_added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedekd.benchmark.runner._pool", ThreadPoolExecutor)
    others = [Cell("digits", 0.1, 5, "other", {}, "other", "other")]
    results = tmp_path / "results"

    def interrupted(cell: Cell, *arguments: Any) -> dict[str, str]:
        if cell.seed == 0:
            run_grid(others, tmp_path, results, 1, {}, Recorder(), fake_run)
        return fake_run(cell, *arguments)

    run_grid([cell("a", 0), cell("a", 1)], tmp_path, results, 1, {}, Recorder(), interrupted)
    assert sorted(read_results(results).index) == ["a-0", "a-1", "other"]


@pytest.mark.slow
def test_run_grid_failures_and_dead_processes_do_not_stop_other_cells(tmp_path: Path) -> None:
    grid = [cell("fails"), cell("dies", seed=1), cell("a"), cell("b"), cell("c", seed=2)]
    recorder = Recorder()
    failures = run_grid(grid, tmp_path / "runs", tmp_path / "results", 2, {}, recorder, fake_run)
    assert sorted(c.method for c, _ in failures) == ["dies", "fails"]
    assert sorted(recorder.finished) == ["a", "b", "c"]
    assert any(text == "fails: ValueError: two lines" for text in recorder.failed)
    assert set(read_results(tmp_path / "results")["key"]) == {"a-0", "b-0", "c-2"}
    # Finished cells are not repeated. A cell that ran when the process died was repeated in the first grid.
    calls = {path: path.read_text() for path in tmp_path.glob("runs/*/ran")}
    recorder = Recorder()
    run_grid(grid[2:], tmp_path / "runs", tmp_path / "results", 2, {}, recorder, fake_run)
    assert recorder.start == (3, 3)
    assert calls == {path: path.read_text() for path in tmp_path.glob("runs/*/ran")}


@pytest.mark.parametrize("broken_call", [0, 1, 2])
def test_run_grid_pool_that_breaks_between_two_cells_is_replaced(
    broken_call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = iter(range(100))

    class BreaksOnce(ThreadPoolExecutor):
        def submit(self, *arguments: Any, **named: Any) -> Any:
            if next(calls) == broken_call:
                raise BrokenProcessPool("a process died")
            return super().submit(*arguments, **named)

    monkeypatch.setattr("fedekd.benchmark.runner._pool", BreaksOnce)
    recorder = Recorder()
    grid = [cell("a"), cell("b"), cell("c", seed=2)]
    assert run_grid(grid, tmp_path / "runs", tmp_path / "results", 2, {}, recorder, fake_run) == []
    assert set(read_results(tmp_path / "results")["key"]) == {"a-0", "b-0", "c-2"}


@pytest.mark.slow
def test_benchmark_command_writes_results_and_repeats_nothing(
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
    rows = read_results(Path("out/results")).set_index("method").T
    assert set(rows) == {"FedeKD", "Local"}
    assert float(rows["FedeKD"]["local_mean"]) == float(rows["Local"]["mean"])
    assert rows["FedeKD"]["device"] == "cpu"
    assert not list(Path("out/runs").rglob("checkpoints"))
    capsys.readouterr()
    assert main(command) == 0
    assert "2 cells, 2 of them finished" in capsys.readouterr().out


def test_benchmark_finished_cells_that_were_made_otherwise_print_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("grid.yaml").write_text("blocks:\n- {datasets: [digits], alphas: [5.0], seeds: [0], methods: {L: Local}}\n")
    [only] = cells([Block(["digits"], [5.0], [0], {"L": {"class_path": "Local"}})])
    write_results(Path("out/results"), pd.DataFrame([{**fake_row(only), "precision": "bf16-mixed", "code": ""}]))
    command = ["benchmark", "--config=grid.yaml", "--output=out", "--accelerator=cpu"]
    assert main([*command, "--precision=32-true"]) == 0
    line = "warning: 1 of 1 finished cells were made otherwise than now (1 by unknown code, 1 from unknown data"
    assert capsys.readouterr().err.startswith(f"{line}, 1 in bf16-mixed). ")
    for options in (["--precision=bf16-mixed"], ["--precision=auto"], ["--run=false"]):
        assert main([*command, *options]) == 0
        assert capsys.readouterr().err.startswith(f"{line}). ")
    finished = {"data": str(data_digest(only.values)), "code": code_digest(only.values)}
    write_results(Path("out/results"), pd.DataFrame([{**fake_row(only), **finished}]))
    assert main(command) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("alphas: [0]", "digits alpha 0 FedeKD: data.alpha"),
        ("methods: {FedeKD: {class_path: FedeKD, init_args: {beta: -1}}}", "digits alpha 5 FedeKD: method.beta"),
        ("options: {rounds: 0}", "digits alpha 5 FedeKD: rounds"),
        (
            "{methods: {T: {class_path: FedType}}, options: {client.exits: 2}, coverage: {draws: 1}}",
            "digits alpha 5 T: coverage: expected a method that does not train on validation samples",
        ),
    ],
)
def test_benchmark_invalid_cell_prints_error_before_any_run(
    line: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    block = {"datasets": ["digits"], "alphas": [5.0], "seeds": [0], "methods": {"FedeKD": {"class_path": "FedeKD"}}}
    Path("grid.yaml").write_text(yaml.safe_dump({"blocks": [block | yaml.safe_load(line)]}))
    assert main(["benchmark", "--config=grid.yaml", "--output=out", "--accelerator=cpu"]) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"error: {words}")
    assert message.count("\n") == 1
    assert not Path("out").exists()


@pytest.mark.slow
def test_benchmark_killed_repeats_no_finished_run(tmp_path: Path) -> None:
    (tmp_path / "grid.yaml").write_text(
        "blocks:\n- datasets: [digits]\n  alphas: [5.0]\n  seeds: [0, 1, 2]\n"
        "  options: {rounds: 1, client.local_epochs: 1, data.batch_size: 256}\n"
        "  methods: {FedAvg: {class_path: FedAvg}}\n"
    )
    code = "import sys; from fedekd.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "benchmark", "--config", "grid.yaml", "--output", "out"]
    results = tmp_path / "out/results/digits.csv"
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL) as running:
        until = time.monotonic() + 300
        while not results.exists():
            assert running.poll() is None
            assert time.monotonic() < until
            time.sleep(0.02)
        running.kill()
    before = read_results(results.parent)
    assert 1 <= len(before) < 3
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert f"3 cells, {len(before)} of them finished" in ended.stdout
    after = read_results(results.parent)
    assert len(after) == 3
    # The seconds that a run took would differ if it had been run again.
    assert after.loc[before.index].equals(before)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "--config benchmark/quick.yaml"),
        (
            ["--config", "benchmark/quick.yaml", "--filter", "dataset=cifar"],
            "--filter: expected a condition that a cell of the grid meets, got 'dataset=cifar'",
        ),
        (["--config", "benchmark/quick.yaml", "--processes", "0"], "--processes: expected at least 1, got 0"),
        (["--config", "benchmark/quick.yml"], "Did you mean 'benchmark/quick.yaml'"),
        (["--config", "benchmark/quick.yaml", "--outptu", "x"], "Did you mean --output"),
        (["--config", "benchmark/quick.yaml", "--threads", "0"], "--threads: expected a whole number of at least 1"),
        (["--config", "benchmark/quick.yaml", "--accelerator", "foo"], "--accelerator"),
        (["--config", "benchmark/quick.yaml", "--precision", "foo"], "--precision"),
        (["--config", "benchmark/quick.yaml", "--output", "/dev/null"], "--output: expected a directory"),
    ],
)
def test_benchmark_invalid_option_prints_one_line_error(
    options: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["benchmark", *options]) == 2
    message = capsys.readouterr().err
    assert words in message
    assert message.count("\n") == 1


GRID = "datasets: [digits], alphas: [1], seeds: [0], methods: {A: FedAvg}"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("blocks: [1]", "--blocks: expected a class path, or keys and values, got 1"),
        ("blocks: [null]", "--blocks: expected a class path, or keys and values, got None"),
        ("blocks: []", "--blocks: expected a grid, got none"),
        ("blocks: null", "--blocks: expected a grid, got none"),
        (f"blocks: [{{{GRID}, datasets: [digits]}}]", "grid.yaml, line 1: invalid YAML: 'datasets' is given twice"),
        (f"blocks: [{{{GRID}, coverage: 3}}]", "--blocks.coverage: expected a class path, or keys and values, got 3"),
        (f"blocks: [{{{GRID}, coverage: {{modes: [path]}}}}]", "got 'path'. It was renamed to 'ltt_joint'"),
        (
            f"blocks: [{{{GRID}, options: {{client.optimizer.lr: -1}}}}]",
            "A: client.optimizer.lr: expected a value that",
        ),
        (
            f"blocks: [{{{GRID.replace('[0]', '[99999999999999999999]')}}}]",
            "--blocks.seeds: expected a number of 64 bits",
        ),
        (f"blocks: [{{{GRID.replace('[0]', '[]')}}}]", "--blocks: expected at least one cell"),
    ],
)
def test_benchmark_invalid_grid_prints_one_line_error(
    text: str, words: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "grid.yaml").write_text(text + "\n")
    assert main(["benchmark", f"--config={tmp_path}/grid.yaml", f"--output={tmp_path}/grid"]) == 2
    message = capsys.readouterr().err
    assert words in message
    assert message.count("\n") == 1
