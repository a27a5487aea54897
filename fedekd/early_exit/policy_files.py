"""Location of exit policies in a run folder."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from fedekd.atomic import atomic_file, seal_json, unseal_json
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


class OtherSamples(NamedTuple):
    """Samples of `calibrate --input`.

    Attributes:
        hashes: `input_digests` of all.
        drift: Columns by which a monitor recognises drift, of one sample per group.
    """

    hashes: list[str]
    drift: dict[str, list[float]]


def load_other_samples(run: Path, client: int) -> OtherSamples | None:
    """Return the samples of `calibrate --input` of the present policy; None without.

    Raises:
        UserError: If the file is damaged.
    """
    path = other_samples_path(run, client)
    if not path.is_file():
        return None
    try:
        content = unseal_json(path.read_bytes())
        return OtherSamples(content["hashes"], content["drift"])
    except (ValueError, KeyError) as error:
        reason = f"damaged, or of another version of fedekd ({error})"
        raise UserError(f"{shorten_path(path)}: {reason}. Run calibrate again") from error


def save_other_samples(run: Path, client: int, samples: OtherSamples) -> None:
    """Write samples of `calibrate --input`, with a checksum."""
    with atomic_file(other_samples_path(run, client)) as file:
        file.write(seal_json(samples._asdict()))


def other_samples_path(run: Path, client: int) -> Path:
    """Return the path of the hashes of other samples that calibrated a policy."""
    return run / "exits" / f"client-{client:03d}.samples"


def load_policy(run: Path, client: int) -> ExitPolicy | None:
    """Load one client's policy; None if the run was not calibrated.

    Raises:
        UserError: The file is not a valid policy.
    """
    path = policy_path(run, client)
    return ExitPolicy.load(path) if path.is_file() else None
