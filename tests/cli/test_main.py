from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from fedekd.cli import COMMANDS, main

MAIN = [sys.executable, "-u", "-c", "import sys; from fedekd.cli import main; sys.exit(main(sys.argv[1:]))"]


def run(command: list[str], stdout: object = None) -> tuple[int, str]:
    ended = subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True, check=False)  # type: ignore[call-overload]
    return ended.returncode, ended.stderr


def test_main_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text for name in COMMANDS)
    assert "fit --resume RUN" in text


def test_main_unknown_command_or_missing_argument_returns_two(error_line: Callable[[], str]) -> None:
    assert main(["fitt"]) == 2
    assert "Did you mean 'fit'" in error_line()
    assert main(["test"]) == 2
    assert "test runs/NAME" in error_line()


def test_package_runs_as_a_module() -> None:
    ended = subprocess.run([sys.executable, "-m", "fedekd", "fitt"], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr.count("\n")) == (2, 1)
    assert ended.stderr.startswith("error: command: expected one of fit, ")


@pytest.mark.parametrize("name", ["x" * 10_000, "\x1b[31m", "\udcff", ""])
def test_main_unknown_command_prints_a_short_printable_line(name: str, error_line: Callable[[], str]) -> None:
    assert main([name]) == 2
    text = error_line().removesuffix("\n")
    assert len(text) < 400
    assert text.isprintable()


def test_main_help_does_not_import_torch() -> None:
    code = "import sys; from fedekd.cli import main; main(['--help']); sys.exit('torch' in sys.modules)"
    assert run([sys.executable, "-c", code], subprocess.DEVNULL) == (0, "")


@pytest.mark.parametrize("options", [[], ["--version"]])
def test_main_closed_or_full_stdout_returns_without_traceback(options: list[str]) -> None:
    command = [*MAIN, *options]
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as closed_pipe:
        assert run(command, closed_pipe) == (0, "")
    with open("/dev/full", "w") as full:
        code, text = run(command, full)
    assert code == 2
    assert text.startswith("error: no space left on the disk")
    assert run(["sh", "-c", 'exec "$@" >&-', "sh", *command]) == (0, "")


def test_main_broken_pipe_during_command_returns_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(argv: list[str]) -> int:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr("fedekd.cli.fit.run", broken)
    monkeypatch.setattr("os.dup2", lambda *descriptors: None)
    monkeypatch.setattr("sys.stdout", SimpleNamespace(fileno=lambda: 1))
    assert main(["fit"]) == 0


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "a/metrics.csv"), "a/metrics.csv: Permission denied"),
        (OSError(errno.EROFS, "Read-only file system", "a"), "a: Read-only file system"),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "a/b"), "no space left on the disk while writing a/b"),
        (OSError("network unreachable"), "network unreachable"),
    ],
)
def test_main_os_error_prints_one_line(
    error: OSError, words: str, monkeypatch: pytest.MonkeyPatch, error_line: Callable[[], str]
) -> None:
    def refused(argv: list[str]) -> int:
        raise error

    monkeypatch.setattr("fedekd.cli.fit.run", refused)
    assert main(["fit"]) == 2
    assert words in error_line()
