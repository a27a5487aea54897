"""Open a finished run from its folder."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from fedekd.configuration.options import build_parts, federation_parser, parse
from fedekd.configuration.yaml_files import load_yaml
from fedekd.do_no_harm.rule import EARLIER_VALUES as EARLIER_RULE
from fedekd.errors import UserError, shorten_path
from fedekd.federation import Orchestrator, RunFolder, Sequential

#: Values with which runs of earlier versions ran, of options that were added since with another default.
_EARLIER_VALUES = {"CAFEDistill": {"variant": "paper"}}


def with_earlier_rule(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a stored configuration whose do-no-harm rule has all fields.

    Those that it lacks have the values with which earlier versions decided.
    """
    rule = config.get("do_no_harm")
    if rule is None or rule is False:
        return config
    return {**config, "do_no_harm": {**EARLIER_RULE, **(rule if isinstance(rule, Mapping) else {})}}


def parse_run(parser: ArgumentParser, folder: Path, argv: Sequence[str] = ()) -> Namespace:
    """Parse the saved configuration of a run, also of an earlier version.

    Args:
        parser: Parser of `fit`.
        folder: Folder of the run.
        argv: Further arguments, which override the configuration.

    Raises:
        UserError: If an option or value is invalid.
    """
    path = folder / "config.yaml"
    saved = parse(parser, ["--config", str(path)])
    content = load_yaml(path.read_text(encoding="utf-8")) or {}
    method, rule = content.get("method"), content.get("do_no_harm")
    in_file = (method.get("init_args") or {}) if isinstance(method, dict) else {}
    added = _EARLIER_VALUES.get(saved.method.class_path.rpartition(".")[2], {})
    earlier = [f"--method.{name}={value}" for name, value in added.items() if name not in in_file]
    if rule is not None and rule is not False:
        in_file = rule if isinstance(rule, dict) else {}
        earlier += [f"--do_no_harm.{name}={value}" for name, value in EARLIER_RULE.items() if name not in in_file]
    return parse(parser, ["--config", str(path), *earlier, *argv]) if earlier or argv else saved


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
