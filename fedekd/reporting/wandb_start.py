"""Start of a W&B run: id, mode, credentials, server and folders."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import tempfile
from pathlib import Path

from fedekd.atomic import atomic_file
from fedekd.errors import require_choice

#: Modes of W&B that need its server.
ONLINE_MODES = ("online", "run", "shared")
_OTHER_MODES = ("offline", "dryrun", "disabled")

#: Run ids that Weights & Biases accepts.
_RUN_ID = re.compile(r"[\w.-]{1,128}", re.ASCII)


def own_run_id(run_dir: Path | None) -> str:
    """Return the run id from the environment or the run folder, or draw one.

    It does not depend on the seed: two equal federations are two runs. A damaged file counts as missing.
    """
    given = os.environ.get("WANDB_RUN_ID")
    if not given and run_dir is not None and (stored := stored_run_id(run_dir)) is not None:
        return stored
    run_id = given or secrets.token_hex(4)
    if run_dir is not None:
        with atomic_file(_id_file(run_dir)) as output:
            output.write(f"{run_id}\n".encode())
    return run_id


def stored_run_id(run_dir: Path) -> str | None:
    """Return the run id in a run folder; None if it is missing or damaged."""
    file = _id_file(run_dir)
    stored = file.read_bytes().decode(errors="replace").strip() if file.is_file() else ""
    return stored if _RUN_ID.fullmatch(stored) else None


def _id_file(run_dir: Path) -> Path:
    return run_dir / "wandb" / "run-id"


def remove_offline_runs(save_dir: Path, run_id: str) -> None:
    """Remove offline folders of this run, whose rounds will be replayed."""
    pattern = re.compile(rf"offline-run-\d+_\d+-{re.escape(run_id)}(-\d+)?")
    for folder in [*save_dir.glob("wandb/offline-run-*"), *save_dir.glob(".wandb/offline-run-*")]:
        if pattern.fullmatch(folder.name):
            # First the file that `wandb sync` reads: the service of a killed process may still write other files.
            (folder / f"run-{run_id}.wandb").unlink(missing_ok=True)
            shutil.rmtree(folder, ignore_errors=True)


def choose_mode(offline: bool | None) -> str:
    """Return the mode for `wandb.init`.

    The order is: `WANDB_MODE`; the argument, if it is not None; the settings of W&B, if there are credentials;
    `offline`.

    Raises:
        UserError: If `WANDB_MODE` is not a mode.
    """
    if mode := os.environ.get("WANDB_MODE"):
        require_choice("WANDB_MODE", mode, (*ONLINE_MODES, *_OTHER_MODES))
        return mode
    if offline is None and is_logged_in():
        import wandb

        return str(wandb.setup().settings.mode)
    return "online" if offline is False else "offline"


def is_logged_in() -> bool:
    """Return whether the environment or the netrc file has credentials of the server."""
    import wandb
    from requests.utils import get_netrc_auth

    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    return get_netrc_auth(wandb.setup().settings.base_url) is not None


def unreachable(timeout: float = 5.0) -> str | None:
    """Return why the server does not answer; None if it does.

    W&B itself would retry for 90 s.
    """
    import requests
    import wandb

    url = wandb.setup().settings.base_url
    try:
        requests.head(url, timeout=timeout)
    except requests.exceptions.SSLError:  # an answer; W&B has certificates of its own
        return None
    except (requests.ConnectionError, requests.Timeout) as error:
        return f"no answer from {url}: {type(error).__name__}"
    return None


def require_writable_folders() -> None:
    """Check the folders that W&B needs in addition to the run's own.

    Its service would print 20 lines, and the summary would fail at the end.

    Raises:
        OSError: If one cannot be written.
    """
    from wandb import env

    for variable, folder in (("WANDB_CACHE_DIR", env.get_cache_dir()), ("WANDB_DATA_DIR", env.get_data_dir())):
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            raise OSError(f"'{folder}' cannot be written, set {variable} to another folder") from error
