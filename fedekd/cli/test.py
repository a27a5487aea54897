"""`test`: score a finished run again from its checkpoint."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser
from rich.console import Console

from fedekd.configuration.arguments import build_parts, federation_parser, parse
from fedekd.errors import UserError
from fedekd.federation import Orchestrator, RunFolder
from fedekd.federation.run_folder import first_difference
from fedekd.reporting import client_table

#: What another machine or another day may change.
_UNREPEATABLE = ("seconds", "versions")


def run(argv: Sequence[str]) -> int:
    """Run `test RUN`; the exit code is 1 if the figures are not those of `summary.json`."""
    folder = finished_run("test", argv)
    kept = RunFolder(folder, {}).summary
    if kept is None:
        raise UserError(f"{folder} is not finished; go on with: fit --resume {shlex.quote(str(folder))}")
    parser = federation_parser()
    config = parse(parser, ["--config", str(folder / "config.yaml")])
    parts = build_parts(parser, config)
    parts["loggers"] = []
    summary = Orchestrator(**parts, output=folder, reference_folder=Path(config.reference_dir)).rescore()
    console = Console()
    console.print(client_table(summary))
    before, now = ({k: v for k, v in each.items() if k not in _UNREPEATABLE} for each in (kept, summary))
    if difference := first_difference(before, now):
        key, was, is_now = difference
        console.print(f"differs from summary.json: {key} was {was}, and is now {is_now}", soft_wrap=True)
        return 1
    console.print("the same as summary.json, to the last digit")
    return 0


def finished_run(command: str, argv: Sequence[str]) -> Path:
    """The folder in `COMMAND RUN`.

    Raises:
        UserError: If it is missing, or holds no run.
    """
    parser = ArgumentParser(
        prog=f"orchestrator.py {command}", description=__doc__, allow_abbrev=False, exit_on_error=False
    )
    parser.add_argument("run", type=str, help="The folder of a run.")
    if not argv:
        raise UserError(f"{command} needs the folder of a run, as in: {command} runs/NAME")
    folder = Path(parse(parser, argv).run)
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{command} {folder}: there is no run (config.yaml is missing)")
    return folder
