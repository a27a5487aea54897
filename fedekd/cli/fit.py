"""`fit`: run a federation, or resume one."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from fedekd.configuration.load_run import parse_run
from fedekd.configuration.options import as_values, build_parts, federation_parser, parse
from fedekd.errors import LONGEST_ERROR, UserError, describe_error, print_warning, shorten, shorten_path
from fedekd.federation import Interrupted, Orchestrator, RunFolder
from fedekd.federation.checkpoint import CheckpointStore
from fedekd.federation.engines.performance import gc_frozen
from fedekd.federation.run_folder import RUNTIME_OPTIONS, first_difference, has_run
from fedekd.reporting import Display, result_tables


def run(argv: Sequence[str]) -> int:
    """Run `fit` with its options and return the exit code."""
    parser = federation_parser()
    resume = _resumed_folder(argv)
    if resume is None:
        config = parse(parser, argv)
        resume = None if config.resume is None else Path(config.resume)
        if resume is None and not config.data.dataset and not config.data.sites:
            raise UserError(
                "--data.dataset: expected a data set or --data.sites, got nothing. Give one, or --config digits.yaml."
            )
    if resume is not None:
        if not any((resume / name).exists() for name in ("config.yaml", "checkpoints")):
            raise UserError(
                f"--resume {shorten_path(resume)}: expected the folder of a run, got {_state(resume)}. Start a new run"
                " without --resume"
            )
        folder = RunFolder(resume, {})
        is_complete = folder.is_complete(print_warning)
        folder.restore_config()
        config = _saved_configuration(parser, argv, folder)
        if is_complete:
            print(f"{resume} is finished: nothing to do")
            return 0
    parts = build_parts(parser, config)
    # Check before a folder is created: an invalid run must leave none behind.
    baseline_dir = Path(config.baseline_dir)
    if baseline_dir.exists() and not baseline_dir.is_dir():
        raise UserError(f"--baseline_dir: expected a folder, got the file {shorten_path(baseline_dir)}")
    parts["data"].setup()
    output, created = (resume, False) if resume is not None else _new_folder(config.output, parts)
    try:
        return federate(parts, config, output)
    except BaseException:
        if created:
            with suppress(OSError):  # it has files: of a checkpoint, or of another process
                output.rmdir()
        raise


def federate(parts: dict[str, Any], config: Namespace, output: Path) -> int:
    """Run the federation to its end or to a signal and return the exit code."""
    labels = [splits.label for splits in parts["data"].clients]
    with Display(quiet=config.quiet, clients=labels) as display:
        orchestrator = Orchestrator(**parts, output=output, baseline_dir=Path(config.baseline_dir), observer=display)
        try:
            with gc_frozen():
                summary = orchestrator.run()
        except Interrupted as stop:
            print(f"{stop}; go on with: {_program()} fit --resume {shlex.quote(str(output))}", file=sys.stderr)
            return 128 + stop.signal_number
        except (UserError, OSError):
            raise
        except Exception as error:
            _print_failure(error, output)
            raise
    if not config.quiet:
        for table in result_tables(summary, config.metrics):
            display.console.print(table)
        display.console.print(f"written to {output}", soft_wrap=True)
    return 0


def _print_failure(error: Exception, output: Path) -> None:
    """Print one line on an exception of a user's code, before its traceback."""
    place = "; ".join(getattr(error, "__notes__", ["the run"])[:1])
    is_kept = CheckpointStore(output / "checkpoints").has_any()
    kept = f" Saved rounds are kept: fit --resume {shlex.quote(str(output))}." if is_kept else ""
    line = f"{place} failed with {describe_error(error)}.{kept} The traceback follows."
    print(f"error: {shorten(line, LONGEST_ERROR)}", file=sys.stderr)


def _program() -> str:
    """Return the command of this program, for messages that can be copied."""
    programs = {"orchestrator.py": "python orchestrator.py", "__main__.py": "python -m fedekd"}
    return programs.get(Path(sys.argv[0]).name, "fedekd")


def _resumed_folder(argv: Sequence[str]) -> Path | None:
    """Return the folder of `--resume`, whose configuration is parsed first."""
    folder = None
    for index, argument in enumerate(argv):
        if argument.startswith("--resume="):
            folder = argument.removeprefix("--resume=")
        elif argument == "--resume":
            if index + 1 == len(argv):
                raise UserError("--resume: expected the folder of a run, got nothing")
            folder = argv[index + 1]
    return None if folder is None else Path(folder)


def _state(folder: Path) -> str:
    if folder.is_dir():
        return "one without config.yaml"
    return "a file" if folder.exists() else "one that does not exist"


def _saved_configuration(parser: ArgumentParser, argv: Sequence[str], run: RunFolder) -> Namespace:
    """Return the saved configuration of a run, updated by runtime options.

    Raises:
        UserError: If there is no run, its configuration is damaged, or another option differs from the saved value.
    """
    folder = run.folder
    path = folder / "config.yaml"
    if not path.exists():
        raise UserError(f"--resume {shorten_path(folder)}: expected the folder of a run, got {_state(folder)}")
    run.require_intact("config.yaml")
    try:
        saved = parse_run(parser, folder)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    now = parse_run(parser, folder, argv)
    if now.output is not None:
        raise UserError(
            f"--output: expected none with --resume {shorten_path(folder)}, got {shorten(repr(now.output))}. A run"
            " resumes in its own folder."
        )
    if difference := first_difference(as_values(parser, saved), as_values(parser, now), RUNTIME_OPTIONS):
        key, old, new = difference
        raise UserError(
            f"--resume {shorten_path(folder)}: {key}: expected the saved value {shorten(repr(old))}, got"
            f" {shorten(repr(new))}. Start a new run to change it."
        )
    return now


def _new_folder(output: str | None, parts: dict[str, Any]) -> tuple[Path, bool]:
    """Create the folder of a new run: `output`, or the next free name in `runs/`.

    Returns:
        The folder, and whether it was created.

    Raises:
        UserError: If `output` cannot be created or is not empty.
    """
    if output is not None:
        if not output:
            raise UserError("--output: expected a folder, got an empty name")
        folder = Path(output)
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            folder.mkdir()
        except OSError as error:
            if not folder.is_dir():
                raise UserError(
                    f"--output: expected a folder that can be created, got {shorten_path(output)}. {error.strerror}"
                ) from error
            if has_run(folder):
                is_run = (folder / "config.yaml").is_file()
                hint = f", or resume it with fit --resume {shorten_path(shlex.quote(output))}" if is_run else ""
                raise UserError(
                    f"--output: expected an empty folder, got {shorten_path(output)}. Choose another one{hint}."
                ) from error
            return folder, False
        return folder, True
    stem = f"{parts['data'].samples.name}-{type(parts['method']).__name__.lower()}"
    for number in range(1, 100_000):
        folder = Path("runs") / f"{stem}-{number:03d}"
        try:
            folder.parent.mkdir(exist_ok=True)
            os.mkdir(folder)  # fails if it exists: two runs started at the same time get two folders
        except FileExistsError:
            continue
        return folder, True
    raise UserError(
        f"--output: expected a folder, got none, and no name {stem}-NUMBER is free in runs/. Choose a folder."
    )
