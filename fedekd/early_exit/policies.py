"""Where a run keeps the policies of its clients."""

from __future__ import annotations

from pathlib import Path

from fedekd.early_exit.policy import ExitPolicy


def policy_path(run: Path, client: int) -> Path:
    """The file of one client's policy."""
    return run / "exits" / f"client-{client:03d}.json"


def client_lines_path(run: Path) -> Path:
    """The table of all clients."""
    return run / "exits" / "clients.csv"


def load_policy(run: Path, client: int) -> ExitPolicy | None:
    """One client's policy; None if `calibrate` has not been there.

    Raises:
        UserError: If the file holds no policy.
    """
    path = policy_path(run, client)
    return ExitPolicy.load(path) if path.is_file() else None
