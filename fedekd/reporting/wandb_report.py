"""Upload of a report to a Weights & Biases run. Slow to import."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import wandb
import yaml

from fedekd.errors import UserError, describe_error
from fedekd.reporting.wandb_start import (
    ONLINE_MODES,
    choose_mode,
    require_writable_folders,
    stored_run_id,
    unreachable,
)

_URL = re.compile(r"https?://.+/([^/]+)/([^/]+)/runs/[^/]+")


def log_report(run_dir: Path, report: Path) -> str:
    """Log a report to the W&B run of a finished run.

    The page is the panel `report` of the run, and its folder an artifact `report-ID` with the alias `latest`.

    Args:
        run_dir: Run folder.
        report: Folder of the report, with `index.html`.

    Returns:
        Address of the W&B run.

    Raises:
        UserError: If the folder has no W&B run, W&B is offline, or the run is not on its server.
    """
    run_id = require_online_run(run_dir)
    require_writable_folders()
    arguments = {**_address(run_dir), "id": run_id, "dir": os.fspath(run_dir)}
    settings = wandb.Settings(silent=True, console="off", reinit="create_new", init_timeout=30)
    try:
        run = wandb.init(**arguments, mode=choose_mode(None), resume="must", settings=settings)
    except (wandb.errors.Error, ValueError) as error:
        raise UserError(
            f"--wandb: expected run {run_id} on the server of W&B, got an error: {describe_error(error)}. Upload an"
            f" offline run first: wandb sync {shlex.quote(str(run_dir))}/wandb/offline-run-*"
        ) from error
    if run.offline:
        run.finish()
        raise UserError("--wandb: expected a W&B server, got an offline run. Run `wandb login`")
    artifact = wandb.Artifact(f"report-{run_id}", type="report")
    artifact.add_dir(os.fspath(report))
    run.log_artifact(artifact, aliases=["latest"])
    run.log({"report": wandb.Html((report / "index.html").read_text(encoding="utf-8"), inject=False)})
    run.finish()
    return str(run.url)


def require_online_run(run_dir: Path) -> str:
    """Return the id of a W&B run, and check that its server answers.

    Raises:
        UserError: If the folder has no W&B run, W&B is offline, or its server does not answer.
    """
    run_id = stored_run_id(run_dir)
    if run_id is None:
        raise UserError(f"--wandb: expected the folder of a run that W&B has logged, got {run_dir}")
    is_online = choose_mode(None) in ONLINE_MODES
    problem = unreachable() if is_online else "W&B is offline: no login, WANDB_MODE, or `wandb offline`"
    if problem is not None:
        raise UserError(f"--wandb: expected a W&B server, got none ({problem}). Run `wandb login`, or `wandb online`")
    return run_id


def _address(run_dir: Path) -> dict[str, Any]:
    """Return entity and project, of the stored address or the logger's options."""
    file = run_dir / "wandb" / "url"
    match = _URL.fullmatch(file.read_text(encoding="utf-8").strip()) if file.is_file() else None
    if match is not None:
        return {"entity": unquote(match[1]), "project": unquote(match[2])}
    loggers = yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8")).get("logger") or []
    for logger in loggers if isinstance(loggers, list) else [loggers]:
        if logger["class_path"].endswith("WandbRunLogger"):
            options = logger.get("init_args", {})
            project = options.get("project") or os.environ.get("WANDB_PROJECT", "fedekd")
            return {"entity": options.get("entity"), "project": project}
    return {}
