"""`fit`: run a federation, or go on with one."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from fedekd.configuration.options import as_values, build_parts, federation_parser, parse
from fedekd.errors import UserError
from fedekd.federation import Interrupted, Orchestrator, RunFolder
from fedekd.federation.engines.gc_frozen import gc_frozen
from fedekd.federation.run_folder import RUNTIME_OPTIONS, FolderInUseError, first_difference
from fedekd.reporting import Display, result_tables


def run(argv: Sequence[str]) -> int:
    """Run `fit` with its options; returns the exit code."""
    parser = federation_parser()
    resume = _resumed_folder(argv)
    if resume is None:
        # A configuration may say no more than which run to go on with.
        parser.set_defaults({"data.dataset": ""})
        config = parse(parser, argv)
        resume = None if config.resume is None else Path(config.resume)
        if resume is None and not config.data.dataset:
            raise UserError("--data.dataset must be given, there or in a configuration: --config digits.yaml")
    if resume is not None:
        config = _saved_configuration(parser, argv, resume)
        folder = RunFolder(resume, {})
        if folder.summary is not None and not folder.is_damaged():
            print(f"{resume} is finished: nothing to do")
            return 0
    parts = build_parts(parser, config)
    # What is wrong with the data is found before a new folder is there.
    kept = Path(config.baseline_dir)
    if kept.exists() and not kept.is_dir():
        raise UserError(f"--baseline_dir {kept} is no folder")
    parts["data"].prepare_data()
    parts["data"].setup()
    output = resume if resume is not None else _new_folder(config.output, parts)
    try:
        return federate(parts, config, output)
    except UserError as error:
        if resume is None and not isinstance(error, FolderInUseError):
            _give_back(output)
        raise


def _give_back(folder: Path) -> None:
    """Remove the folder of a run that never began."""
    with suppress(OSError):
        if [path.name for path in folder.iterdir()] in ([], ["config.yaml"]):
            (folder / "config.yaml").unlink(missing_ok=True)
            folder.rmdir()


def federate(parts: dict[str, Any], config: Namespace, output: Path) -> int:
    """Run the federation to its end, or until Ctrl-C; returns the exit code."""
    with Display(quiet=config.quiet) as display:
        orchestrator = Orchestrator(**parts, output=output, baseline_dir=Path(config.baseline_dir), observer=display)
        try:
            with gc_frozen():
                summary = orchestrator.run()
        except Interrupted as stop:
            print(f"{stop}; go on with: {_program()} fit --resume {shlex.quote(str(output))}", file=sys.stderr)
            return 128 + stop.signal_number
    if not config.quiet:
        for table in result_tables(summary):
            display.console.print(table)
        display.console.print(f"written to {output}", soft_wrap=True)
    return 0


def _program() -> str:
    """How this program was called, for a line to copy."""
    return "python orchestrator.py" if Path(sys.argv[0]).name == "orchestrator.py" else "fedekd"


def _resumed_folder(argv: Sequence[str]) -> Path | None:
    """The run to go on with; the options beside it mean nothing before its own configuration is read."""
    given = None
    for place, argument in enumerate(argv):
        if argument.startswith("--resume="):
            given = argument.removeprefix("--resume=")
        elif argument == "--resume":
            if place + 1 == len(argv):
                raise UserError("--resume needs the folder of a run")
            given = argv[place + 1]
    return None if given is None else Path(given)


def _saved_configuration(parser: ArgumentParser, argv: Sequence[str], folder: Path) -> Namespace:
    """The configuration that a run was begun with, with what may change as it is said now.

    Raises:
        UserError: If there is none, or an option given now says something else.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        raise UserError(f"--resume {folder}: there is no run ({path} is missing)")
    try:
        saved = parse(parser, ["--config", str(path)])
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    now = parse(parser, ["--config", str(path), *argv])
    if now.output is not None:
        raise UserError(
            f"--output {now.output} cannot be given with --resume {folder}: a run goes on in its own folder"
        )
    if difference := first_difference(as_values(parser, saved), as_values(parser, now), RUNTIME_OPTIONS):
        key, old, new = difference
        raise UserError(
            f"--resume {folder} was begun with {key} {old!r}, and cannot go on with {new!r}; start a new run"
        )
    return now


def _new_folder(given: str | None, parts: dict[str, Any]) -> Path:
    """The folder of a new run, claimed: nobody else gets it.

    Raises:
        UserError: If the folder that was asked for is there already.
    """
    if given is not None:
        if not given:
            raise UserError("--output is empty, and must name a folder")
        folder = Path(given)
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            folder.mkdir()
        except OSError as error:
            if not folder.is_dir():
                raise UserError(f"--output {folder} cannot be a folder: {error.strerror}") from error
            if any(folder.iterdir()):
                is_run = (folder / "config.yaml").is_file()
                hint = f", or go on with fit --resume {shlex.quote(given)}" if is_run else ""
                raise UserError(f"--output {folder} exists already; choose another{hint}") from error
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
