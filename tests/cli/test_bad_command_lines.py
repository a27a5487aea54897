"""Invalid command lines end with one short line and exit code 2; `bad_command_lines` has the full count."""

from __future__ import annotations

import io
import random
import shutil
import subprocess
import sys
import traceback
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from fedekd.cli import main
from fedekd.federation import Orchestrator

from .bad_command_lines import ARRIVALS, COUNT, FIT_YAML, GRID_YAML, SEED, VALID, CommandLine, command_lines

LONGEST, MOST_LINES = 400, 3


class Outcome(NamedTuple):
    line: CommandLine
    code: int | None
    text: str
    traceback: str

    @property
    def lines(self) -> int:
        return len(self.text.splitlines())

    @property
    def is_bad(self) -> bool:
        codes = (2,) if self.line.is_invalid else (0, 2)
        too_long = self.code == 2 and (len(self.text.rstrip("\n")) > LONGEST or self.lines > MOST_LINES)
        return bool(self.traceback) or self.code not in codes or too_long or (self.code == 2 and not self.text)

    def __str__(self) -> str:
        argv = [argument if len(argument) < 80 else f"{argument[:70]}..." for argument in self.line.argv]
        files = {name: content[:200] for name, content in self.line.files.items() if name == "bad.yaml"}
        return f"{self.line.kind}: {argv} {files}\n  {self.code}: {self.text[:500]}{self.traceback[-1500:]}"


def in_process(line: CommandLine) -> Outcome:
    stdout, stderr = io.StringIO(), io.StringIO()
    code, trace = None, ""
    with redirect_stdout(stdout), redirect_stderr(stderr):
        try:
            code = main(list(line.argv))
        except SystemExit as ended:  # --help and --print_config of jsonargparse
            code = ended.code if isinstance(ended.code, int) else 1
        except BaseException:
            trace = traceback.format_exc()
    return Outcome(line, code, stderr.getvalue(), trace)


def start(orchestrator: Orchestrator) -> None:
    """A run that ends before the first round."""
    orchestrator.method.init_server(orchestrator.spec)
    orchestrator.engine.close()


@pytest.fixture
def folder(finished_run: Path, write_blobs: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder in which `fit` and `benchmark` stop before training."""
    write_blobs(Path("blobs.npz"))
    Path("fit.yaml").write_text(FIT_YAML)
    Path("grid.yaml").write_text(GRID_YAML)
    Path("arrivals.csv").write_text(ARRIVALS)
    monkeypatch.setattr(Orchestrator, "run", start)
    monkeypatch.setattr("fedekd.cli.fit.result_tables", lambda summary: [])
    monkeypatch.setattr("fedekd.cli.benchmark.run_grid", lambda *arguments: [])
    return Path.cwd()


@pytest.fixture
def outcomes(folder: Path) -> Iterator[Outcome]:
    kept = {path.name for path in folder.iterdir()}

    def run() -> Iterator[Outcome]:
        for line in command_lines(COUNT, SEED):
            line.write(folder)
            yield in_process(line)
            for path in folder.iterdir():
                if path.name not in kept:
                    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    return run()


@pytest.mark.parametrize("command", VALID)
def test_valid_command_line_is_accepted(command: str, folder: Path) -> None:
    """What the mutators start from."""
    outcome = in_process(CommandLine(VALID[command], "valid", is_invalid=False))
    expected = 2 if command == "calibrate" else 0  # the network of the run has no exits
    assert (outcome.code, outcome.traceback) == (expected, "")


def test_bad_command_lines_end_in_one_short_line(
    outcomes: Iterator[Outcome], capsys: pytest.CaptureFixture[str]
) -> None:
    seen = list(outcomes)
    failed = [outcome for outcome in seen if outcome.code == 2]
    invalid = [outcome for outcome in seen if outcome.line.is_invalid]
    with capsys.disabled():
        print(
            f"\n{len(seen)} command lines of seed {SEED}, {len(invalid)} invalid:"
            f" {sum(bool(outcome.traceback) for outcome in seen)} tracebacks,"
            f" {sum(outcome.code != 2 for outcome in invalid)} exit codes other than 2,"
            f" longest message {max(len(outcome.text.rstrip()) for outcome in failed)} characters in"
            f" {max(outcome.lines for outcome in failed)} lines"
        )
    bad = [str(outcome) for outcome in seen if outcome.is_bad]
    assert not bad, "\n".join(bad)


def test_bad_command_lines_as_processes_print_the_same(folder: Path) -> None:
    # Suggested loggers and optimizers are the classes that a process has imported: other tests import more.
    loaded = ("logger", "optimizer")
    lines = [line for line in command_lines(200, SEED) if line.is_invalid and "\0" not in "".join(line.argv)]
    lines = [line for line in lines if not any(name in str(line) for name in loaded)]
    for line in random.Random(SEED).sample(lines, 1):
        line.write(folder)
        command = [sys.executable, "-m", "fedekd", *line.argv]
        ended = subprocess.run(command, capture_output=True, text=True, errors="surrogateescape", check=False)
        outcome = Outcome(line, ended.returncode, ended.stderr, "Traceback" if "Traceback" in ended.stderr else "")
        assert not outcome.is_bad, str(outcome)
        assert ended.stderr.splitlines()[-1] == in_process(line).text.splitlines()[-1]
