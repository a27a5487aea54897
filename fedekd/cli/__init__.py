"""The command line. Nothing heavy is imported before it is known which command needs it."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from fedekd.errors import UserError, nearest

#: Command name to (module of this package, one line of help). A command is one file with `run(argv) -> exit code`.
COMMANDS = {
    "fit": (
        "fedekd.cli.fit",
        "run a federation, or go on with one: fit --config digits.yaml, fit --resume RUN",
    ),
    "test": ("fedekd.cli.test", "score a finished run again from its checkpoint: test RUN"),
    "calibrate": ("fedekd.cli.calibrate", "let images leave a trained network early, and promise how few go wrong"),
    "predict": ("fedekd.cli.predict", "classify images with a finished run: predict RUN --input images.npz"),
    "benchmark": ("fedekd.cli.benchmark", "run a grid of federations: benchmark --config benchmark/quick.yaml"),
    "report": ("fedekd.cli.report", "hold results against the paper: report RUNS"),
}

OK, MISTAKE, INTERRUPTED = 0, 2, 130


def overview() -> str:
    """What `--help` prints."""
    lines = [
        "usage: python orchestrator.py COMMAND [OPTIONS]        (installed: fedekd COMMAND [OPTIONS])",
        "",
        "Federated distillation that knows when to trust.",
        "",
        *(f"  {name:<10} {text}" for name, (_, text) in COMMANDS.items()),
        "",
        "COMMAND --help tells the options of a command.",
    ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: The command's name and its options; `sys.argv` by default.

    Returns:
        The exit code: 0; 2 for a user's mistake, told in one line on stderr; 130 after Ctrl-C.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    if sys.stdout is None:  # closed by who has started this: what is told is for nobody
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - it is open to the end
    try:
        code = _run(argv)
        sys.stdout.flush()
    except UserError as error:
        return _fail(str(error))
    except BrokenPipeError:
        # The reader of a pipe has gone; keep Python from failing again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except OSError as error:
        return _fail(_told(error, argv))
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
        raise UserError(f"unknown command {argv[0]!r}; {nearest(argv[0], COMMANDS)}")
    # Threads that spin while they wait make a busy machine many times slower; an idle one hardly notices.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if "" not in sys.path:
        sys.path.append("")  # a method or a partition of one's own may lie where one stands
    code: int = import_module(COMMANDS[argv[0]][0]).run(argv[1:])
    return code


def _told(error: OSError, argv: Sequence[str]) -> str:
    """What the system refused, and where."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f" while writing {error.filename}" if error.filename else ""
        again = "use fit --resume" if argv[:1] == ["fit"] else "start it again"
        return f"no space left on the disk{where}; what was finished is kept: free some space and {again}"
    text = error.strerror or str(error) or type(error).__name__
    return f"{error.filename}: {text}" if error.filename else text


def _fail(text: str) -> int:
    print(f"error: {' '.join(text.split())}", file=sys.stderr)
    return MISTAKE
