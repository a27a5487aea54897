"""Location of exit policies in a run folder."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from fedekd.atomic import atomic_file, seal, unseal
from fedekd.early_exit.policy import ExitPolicy
from fedekd.errors import UserError, shorten_path


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
    """Return the hashes of the samples of `calibrate --input`; empty without.

    Raises:
        UserError: If the file is damaged.
    """
    path = calibrated_samples_path(run, client)
    if not path.is_file():
        return []
    try:
        return unseal(path.read_bytes()).decode().split()
    except ValueError as error:
        raise UserError(f"{shorten_path(path)}: damaged ({error}). Run calibrate again") from error


def save_calibrated_samples(run: Path, client: int, hashes: Iterable[str]) -> None:
    """Write the hashes of the samples of `calibrate --input`, with a checksum."""
    with atomic_file(calibrated_samples_path(run, client)) as file:
        file.write(seal("\n".join(hashes).encode()))


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
