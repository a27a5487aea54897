"""A finished run, opened again with nothing but its folder."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from fedekd.configuration.options import build_parts, federation_parser, parse
from fedekd.errors import UserError
from fedekd.federation import Orchestrator, RunFolder, Sequential


def open_finished(
    command: str, folder: Path, in_process: bool = False
) -> tuple[Orchestrator, Namespace, dict[str, Any]]:
    """The federation of a finished run, as its `config.yaml` has it, without loggers.

    Args:
        command: Who asks, for errors.
        folder: The run's folder.
        in_process: Whether its clients are wanted in this process, whatever engine the run had.

    Returns:
        The orchestrator, the configuration, and the summary.

    Raises:
        UserError: If there is no run, it is not finished, or its data are not there any more.
    """
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{command} {folder}: there is no run (config.yaml is missing)")
    summary = RunFolder(folder, {}).summary
    if summary is None:
        raise UserError(f"{folder} is not finished; go on with: fit --resume {shlex.quote(str(folder))}")
    parser = federation_parser()
    config = parse(parser, ["--config", str(folder / "config.yaml")])
    parts = build_parts(parser, config) | {"loggers": []}
    if in_process:
        parts["engine"] = Sequential()
    return Orchestrator(**parts, output=folder, baseline_dir=Path(config.baseline_dir)), config, summary
