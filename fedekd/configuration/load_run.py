"""Open a finished run from its folder."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from fedekd.configuration.options import build_parts, federation_parser, parse
from fedekd.errors import UserError, shorten_path
from fedekd.federation import Orchestrator, RunFolder, Sequential


def parse_run(parser: ArgumentParser, folder: Path, argv: Sequence[str] = ()) -> Namespace:
    """Parse the saved configuration of a run.

    Args:
        parser: Parser of `fit`.
        folder: Folder of the run.
        argv: Further arguments, which override the configuration.

    Raises:
        UserError: If an option or value is invalid.
    """
    return parse(parser, ["--config", str(folder / "config.yaml"), *argv])


def open_finished(
    command: str, folder: Path, in_process: bool = False, verified: Sequence[str] = ("config.yaml", "summary.json")
) -> tuple[Orchestrator, Namespace, dict[str, Any]]:
    """Rebuild the federation of a finished run, without its loggers.

    Args:
        command: Name of the calling command, for error messages.
        folder: Folder of the run.
        in_process: Run the clients in this process, whatever engine the run used.
        verified: Files that must match their checksums.

    Returns:
        The orchestrator, the configuration and the content of `summary.json`.

    Raises:
        UserError: If the folder holds no run, the run is not finished or damaged, or its data cannot be loaded.
    """
    if not (folder / "config.yaml").exists():
        found = "has no config.yaml" if folder.exists() else "does not exist"
        raise UserError(
            f"{command}: expected the folder of a run, got {shorten_path(repr(str(folder)))}, which {found}."
        )
    run = RunFolder(folder, {})
    if run.is_finished:
        run.require_intact(*verified)
    if (summary := run.summary) is None:
        raise UserError(
            f"{command}: expected a finished run, got {shorten_path(folder)}, which is not. Go on with: fit --resume"
            f" {shorten_path(shlex.quote(str(folder)))}"
        )
    parser = federation_parser()
    config = parse_run(parser, folder)
    parts = build_parts(parser, config) | {"loggers": []}
    if in_process:
        parts["engine"] = Sequential(cache=None)
    return Orchestrator(**parts, output=folder, baseline_dir=Path(config.baseline_dir)), config, summary
