"""Command line. A command is imported only when it runs: `--help` needs no torch."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from fedekd.errors import LONGEST_ERROR, NO_ROOM, UserError, nearest, shorten, shorten_path

#: Command -> (module, line of help). A command is one module with `run(argv) -> exit code`.
COMMANDS = {
    "fit": (
        "fedekd.cli.fit",
        "run a federation, or resume one: fit --config digits.yaml, fit --resume RUN",
    ),
    "test": ("fedekd.cli.test", "evaluate a finished run again and compare with its summary: test RUN"),
    "calibrate": (
        "fedekd.cli.calibrate",
        "calibrate early-exit thresholds with a guaranteed error rate: calibrate RUN",
    ),
    "predict": ("fedekd.cli.predict", "classify images with a finished run: predict RUN --input images.npz"),
    "monitor": (
        "fedekd.cli.monitor",
        "follow the guarantees of a deployed model: monitor RUN --arrivals arrivals.csv",
    ),
    "export": (
        "fedekd.cli.export",
        "write a client's model for other programs: export RUN --client K --format onnx",
    ),
    "benchmark": ("fedekd.cli.benchmark", "run a grid of federations: benchmark --config benchmark/quick.yaml"),
    "report": ("fedekd.cli.report", "write a report of finished runs: report RUNS"),
}

OK, INVALID_INPUT, INTERRUPTED = 0, 2, 130


def overview() -> str:
    """Return the text of `--help`."""
    lines = [
        "usage: python orchestrator.py COMMAND [OPTIONS]        (installed: fedekd COMMAND [OPTIONS])",
        "",
        "Federated distillation with guarantees for early exits and for each client.",
        "",
        *(f"  {name:<10} {text}" for name, (_, text) in COMMANDS.items()),
        "",
        "At a site of a Flower run, test, calibrate, predict, monitor and export take --site FOLDER in place of RUN.",
        "COMMAND --help lists the options of a command.",
    ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: Name of the command and its options; `sys.argv[1:]` by default.

    Returns:
        The exit code: 0; 1 if `test` found a difference or a cell of a benchmark failed; 2 for invalid input, with
        one line on stderr; 3 after an alarm of `monitor`; 130 after Ctrl-C; 143 after SIGTERM.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    if sys.stdout is None:  # closed by the parent process, as in `fedekd fit ... >&-`
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - used until exit
    try:
        code = _run(argv)
        sys.stdout.flush()
    except UserError as error:
        return _fail(str(error))
    except BrokenPipeError:
        # The reader of the pipe has exited; without this Python fails again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except OSError as error:
        return _fail(_describe(error, argv))
    except KeyboardInterrupt:
        return INTERRUPTED
    return code


def _run(argv: Sequence[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(overview())
        return OK
    if argv[0] in ("-V", "--version"):
        from fedekd import __version__

        print(f"fedekd {__version__}")
        return OK
    if argv[0] not in COMMANDS:
        raise UserError(
            f"command: expected one of {', '.join(COMMANDS)}, got {shorten(repr(argv[0]))}."
            f" {nearest(argv[0], COMMANDS)}"
        )
    # OpenMP threads that spin while they wait slow down a busy machine severalfold; no measurable cost on an idle one.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if "" not in sys.path:
        sys.path.append("")  # class paths may name modules in the working folder
    code: int = import_module(COMMANDS[argv[0]][0]).run(argv[1:])
    return code


def _describe(error: OSError, argv: Sequence[str]) -> str:
    """Return what the system refused, and for which file."""
    if error.errno in NO_ROOM:
        where = f" while writing {shorten_path(error.filename)}" if error.filename else ""
        repeat = "use fit --resume" if argv[:1] == ["fit"] else "start it again"
        if error.errno == errno.EFBIG:
            return f"file size limit reached{where}; finished work is kept: raise the limit (ulimit -f) and {repeat}"
        return f"no space left on the disk{where}; finished work is kept: free some space and {repeat}"
    if error.errno == errno.EISDIR and error.filename:
        return f"{shorten_path(error.filename)}: expected a file, got a directory. Move it away and repeat the command"
    text = error.strerror or str(error) or type(error).__name__
    return f"{shorten_path(error.filename)}: {text}" if error.filename else text


def _fail(text: str) -> int:
    print(f"error: {shorten(text, LONGEST_ERROR)}", file=sys.stderr)
    return INVALID_INPUT
