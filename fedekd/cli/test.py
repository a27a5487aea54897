"""`test`: score a finished run again from its checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser
from rich.console import Console

from fedekd.configuration.load_run import open_finished
from fedekd.configuration.options import parse
from fedekd.errors import UserError
from fedekd.federation.run_folder import first_difference
from fedekd.reporting import result_tables

#: What another machine or another day may change.
_UNREPEATABLE = ("seconds", "versions")


def run(argv: Sequence[str]) -> int:
    """Run `test RUN`; the exit code is 1 if the figures are not those of `summary.json`."""
    parser = ArgumentParser(prog="orchestrator.py test", description=__doc__, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("run", type=str, help="The folder of a run.")
    if not argv:
        raise UserError("test needs the folder of a run, as in: test runs/NAME")
    orchestrator, _, kept = open_finished("test", Path(parse(parser, argv).run))
    summary = orchestrator.evaluate_checkpoint()
    console = Console()
    for table in result_tables(summary):
        console.print(table)
    before, now = ({k: v for k, v in each.items() if k not in _UNREPEATABLE} for each in (kept, summary))
    if difference := first_difference(before, now):
        key, was, is_now = difference
        console.print(f"differs from summary.json: {key} was {was}, and is now {is_now}", soft_wrap=True)
        return 1
    console.print("the same as summary.json, to the last digit")
    return 0
