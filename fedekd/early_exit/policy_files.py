"""Location of exit policies in a run folder."""

from __future__ import annotations

from pathlib import Path

from fedekd.early_exit.policy import ExitPolicy


def policy_path(run: Path, client: int) -> Path:
    """Return the path of one client's policy."""
    return run / "exits" / f"client-{client:03d}.json"


def client_table_path(run: Path) -> Path:
    """Return the path of the table of all clients."""
    return run / "exits" / "clients.csv"


def report_path(run: Path) -> Path:
    """Return the path of the rows of the table, with a checksum."""
    return run / "exits" / "clients.json"


def calibrated_samples(run: Path, client: int) -> list[str]:
    """Return the hashes of the samples of `calibrate --input`; empty without."""
    path = calibrated_samples_path(run, client)
    return path.read_text(encoding="utf-8").split() if path.is_file() else []


def calibrated_samples_path(run: Path, client: int) -> Path:
    """Return the path of the hashes of other samples that calibrated a policy."""
    return run / "exits" / f"client-{client:03d}.samples"


def load_policy(run: Path, client: int) -> ExitPolicy | None:
    """Load one client's policy; None if the run was not calibrated.

    Raises:
        UserError: The file is not a valid policy.
    """
    path = policy_path(run, client)
    return ExitPolicy.load(path) if path.is_file() else None
