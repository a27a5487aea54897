"""`fit`: run a federation, or go on with one."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from fedekd.cli.arguments import as_values, build_parts, federation_parser, parse
from fedekd.errors import UserError
from fedekd.federation import Interrupted, Orchestrator, RunFolder
from fedekd.federation.run_folder import first_difference
from fedekd.reporting import Display, client_table


def run(argv: Sequence[str]) -> int:
    """Run `fit` with its options; returns the exit code."""
    parser = federation_parser()
    resume = _resumed_folder(argv)
    if resume is None:
        config = parse(parser, argv)
        output = None
    else:
        config, output = _saved_configuration(parser, argv, resume)
        if RunFolder(output, {}).summary is not None:
            print(f"{output} is finished: nothing to do")
            return 0
    parts = build_parts(parser, config)
    if output is None:
        output = _new_folder(config.output, parts)
    return federate(parts, config, output)


def federate(parts: dict[str, Any], config: Namespace, output: Path) -> int:
    """Run the federation to its end, or until Ctrl-C; returns the exit code."""
    with Display(quiet=config.quiet) as display:
        orchestrator = Orchestrator(
            **parts, output=output, reference_folder=Path(config.reference_dir), observer=display
        )
        try:
            summary = orchestrator.run()
        except Interrupted as stop:
            print(f"{stop}; go on with: python orchestrator.py fit --resume {output}", file=sys.stderr)
            return 128 + stop.signal_number
    if not config.quiet:
        display.console.print(client_table(summary))
        display.console.print(f"written to {output}", soft_wrap=True)
    return 0


def _resumed_folder(argv: Sequence[str]) -> Path | None:
    for place, argument in enumerate(argv):
        if argument.startswith("--resume="):
            return Path(argument.removeprefix("--resume="))
        if argument == "--resume":
            if place + 1 == len(argv):
                raise UserError("--resume needs the folder of a run")
            return Path(argv[place + 1])
    return None


def _saved_configuration(parser: ArgumentParser, argv: Sequence[str], folder: Path) -> tuple[Namespace, Path]:
    """The configuration that a run was begun with.

    Raises:
        UserError: If there is none, or an option given now says something else.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        raise UserError(f"--resume {folder}: there is no run ({path} is missing)")
    saved = parse(parser, ["--config", str(path)])
    now = parse(parser, ["--config", str(path), *argv])
    before, after = as_values(parser, saved), as_values(parser, now)
    if difference := first_difference(before, after):
        key, old, new = difference
        raise UserError(
            f"--resume {folder} was begun with {key} {old!r}, and cannot go on with {new!r}; start a new run"
        )
    return now, folder


def _new_folder(given: str | None, parts: dict[str, Any]) -> Path:
    """The folder of a new run, claimed: nobody else gets it.

    Raises:
        UserError: If the folder that was asked for is there already.
    """
    if given is not None:
        folder = Path(given)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError, PermissionError) as error:
            raise UserError(f"--output {folder} cannot be a folder: {error.strerror}") from error
        if any(folder.iterdir()):
            raise UserError(f"--output {folder} exists already; choose another, or go on with fit --resume {folder}")
        return folder
    stem = f"{Path(parts['data'].dataset).stem}-{type(parts['method']).__name__.lower()}"
    for number in range(1, 100_000):
        folder = Path("runs") / f"{stem}-{number:03d}"
        try:
            folder.parent.mkdir(exist_ok=True)
            os.mkdir(folder)  # fails if it is there, so that two runs started together get two folders
        except FileExistsError:
            continue
        return folder
    raise UserError("runs/ is full; name the run's folder with --output")
