"""`test`: evaluate the final checkpoint of a finished run again."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path

from jsonargparse import ArgumentParser
from rich.console import Console

from fedekd.configuration.help import BriefHelp
from fedekd.configuration.load_run import open_finished
from fedekd.configuration.options import parse
from fedekd.errors import UserError
from fedekd.federation.run_folder import RunFolder, first_difference
from fedekd.reporting import metrics_csv, result_tables

#: Keys of `summary.json` that depend on the machine and the date.
_UNREPEATABLE = ("seconds", "versions")


def run(argv: Sequence[str]) -> int:
    """Run `test RUN` and return the exit code: 1 if the results differ."""
    parser = ArgumentParser(
        prog="orchestrator.py test",
        usage="%(prog)s RUN",
        description="Evaluate the final checkpoint of a finished run again and compare the results with summary.json"
        " and metrics.csv. Exit code 1 if they differ.",
        formatter_class=BriefHelp,
        allow_abbrev=False,
        exit_on_error=False,
    )
    parser.add_argument("run", type=str, help="Folder of a finished run.")
    if not argv:
        raise UserError("test: expected the folder of a run, as in: test runs/NAME")
    folder = Path(parse(parser, argv).run)
    orchestrator, config, saved = open_finished("test", folder, verified=["config.yaml"])
    summary = orchestrator.evaluate_checkpoint()
    console = Console()
    for table in result_tables(summary, config.metrics):
        console.print(table)
    before, now = ({k: v for k, v in content.items() if k not in _UNREPEATABLE} for content in (saved, summary))
    if difference := first_difference(before, now):
        key, old, new = difference
        console.print(f"differs from summary.json: {key} was {old}, is now {new}", soft_wrap=True, markup=False)
        return 1
    progress = orchestrator.progress
    if line := _first_different_line(folder / "metrics.csv", metrics_csv(progress.history, progress.names)):
        console.print(
            f"metrics.csv differs from the checkpoint in line {line}; written again by: fit --resume {folder}",
            soft_wrap=True,
        )
        return 1
    RunFolder(folder, {}).require_intact("metrics.csv", "summary.json")
    console.print("the same as summary.json, to the last digit")
    return 0


def _first_different_line(path: Path, expected: bytes) -> int | None:
    """Return the number of the first line of a file that differs; None if none does."""
    content = path.read_bytes() if path.exists() else b""
    if content == expected:
        return None
    lines = zip_longest(content.splitlines(), expected.splitlines())
    return next((number for number, (ours, theirs) in enumerate(lines, start=1) if ours != theirs), 1)
