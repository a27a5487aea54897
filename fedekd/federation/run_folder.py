"""The folder of a run: its configuration, checkpoints, metrics, summary and figures."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml

from fedekd.atomic import atomic_file
from fedekd.data import FederatedDataModule
from fedekd.errors import UserError
from fedekd.federation.checkpoint import Checkpoint, CheckpointStore
from fedekd.federation.progress import Progress
from fedekd.reporting import figures, write_metrics_csv

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

#: Options that change no number: a run may go on with other ones.
RUNTIME_OPTIONS = ("data.root", "data.download", "baseline_dir", "trainer.device", "logger", "engine")


def first_difference(
    ours: Any, theirs: Any, ignored: Collection[str] = (), path: str = ""
) -> tuple[str, Any, Any] | None:
    """The first place at which two nested configurations differ, as (key, ours, theirs).

    Args:
        ours: One configuration.
        theirs: The other.
        ignored: Dotted keys that may differ.
        path: The dotted key at which the two lie.

    Example:
        >>> first_difference({"data": {"alpha": 0.1}}, {"data": {"alpha": 0.3}})
        ('data.alpha', 0.1, 0.3)
        >>> first_difference({"data": {"root": "a"}}, {"data": {"root": "b"}}, RUNTIME_OPTIONS)
    """
    if path in ignored:
        return None
    if isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        ours, theirs = (dict(enumerate(each)) for each in (ours, theirs))
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        for key in sorted({*ours, *theirs}):
            found = first_difference(ours.get(key), theirs.get(key), ignored, f"{path}.{key}" if path else str(key))
            if found is not None:
                return found
        return None
    both_nan = ours != ours and theirs != theirs
    return None if both_nan or ours == theirs else (path, ours, theirs)


def drop_unknown_keys(before: Any, now: Any) -> Any:
    """What is said now, without the keys that were not known before.

    An option that a run knows nothing of is younger than the run, and its default does what was done then.

    Example:
        >>> drop_unknown_keys({"client": {"local_epochs": 2}}, {"client": {"local_epochs": 3, "exits": None}})
        {'client': {'local_epochs': 3}}
    """
    if not (isinstance(before, Mapping) and isinstance(now, Mapping)):
        return now
    return {key: drop_unknown_keys(before[key], value) for key, value in now.items() if key in before}


def to_json_value(value: Any) -> Any:
    """A configuration as values that JSON keeps as they are; an object as its class and its attributes."""
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, Mapping):
        return {str(key): to_json_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json_value(item) for item in value]
    own = {} if isinstance(value, torch.nn.Module) else getattr(value, "__dict__", {})
    return {"class": type(value).__qualname__, **to_json_value(own)}


class FolderInUseError(UserError):
    """Another process is at work in a run's folder."""


class RunFolder:
    """Where a run writes.

    Args:
        folder: The run's folder; made if missing.
        config: What the run was configured with, as JSON values; enough to repeat it.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        self.folder, self.config = folder, dict(config)
        self.checkpoints = CheckpointStore(folder / "checkpoints")
        folder.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Inside, no other process can claim the folder, and the configuration is in it; one that is killed frees it.

        Raises:
            FolderInUseError: If another one has.
        """
        with _locked(self.folder):
            if self.config and not (self.folder / "config.yaml").exists():
                with atomic_file(self.folder / "config.yaml") as file:
                    file.write(yaml.safe_dump(self.config, sort_keys=False).encode())
            yield

    def restore(self, identity: Mapping[str, Any]) -> tuple[Checkpoint | None, list[str]]:
        """The newest whole checkpoint, if it is one of this configuration and this data.

        Raises:
            UserError: If it is not.
        """
        for draft in self.folder.glob(".*.tmp"):  # what a killed process left behind: nobody else writes here
            draft.unlink()
        checkpoint, complaints = self.checkpoints.load()
        if checkpoint is not None:
            kept = checkpoint.notes
            config = drop_unknown_keys(kept["config"], self.config)
            if difference := first_difference(kept["config"], config, RUNTIME_OPTIONS):
                key, before, now = difference
                raise UserError(
                    f"{self.folder} was run with {key}: {before!r}, and the configuration now says {now!r};"
                    " resume with the same configuration, or start a new run with --output"
                )
            if difference := first_difference(kept["identity"], drop_unknown_keys(kept["identity"], dict(identity))):
                key, before, now = difference
                raise UserError(f"{self.folder} was run with other {key}: it was {before}, and is now {now}")
        return checkpoint, complaints

    def keep(
        self, progress: Progress, server: Any, clients: Iterable[tuple[int, Any]], identity: Mapping[str, Any]
    ) -> None:
        """Write a checkpoint that makes the last round count, and metrics.csv from it."""
        notes = {"progress": progress.to_json(), "config": self.config, "identity": dict(identity)}
        self.checkpoints.save(progress.round, notes, server, clients)
        if progress.history:
            write_metrics_csv(progress.history, self.folder / "metrics.csv")

    def draw(
        self, summary: Mapping[str, Any], history: Sequence[Mapping[str, float]], data: FederatedDataModule
    ) -> None:
        """Write the figures of a finished run."""
        folder = self.folder / "figures"
        figures.save(figures.partition(data.class_counts()), folder / "partition.png")
        figures.save(figures.delta_per_client(summary), folder / "delta_per_client.png")
        figures.save(figures.score_per_round(history, summary), folder / f"{summary['metric']}_per_round.png")
        if (gate := figures.gate_weights(history)) is not None:
            figures.save(gate, folder / "gate_weights.png")

    def conclude(self, summary: Mapping[str, Any], history: Sequence[Mapping[str, float]]) -> None:
        """Write metrics.csv and, last of all, summary.json, by which a run counts as finished."""
        write_metrics_csv(history, self.folder / "metrics.csv")
        with atomic_file(self.folder / "summary.json") as file:
            file.write((json.dumps(dict(summary), indent=2) + "\n").encode())

    def is_damaged(self) -> bool:
        """Whether the newest checkpoint is; not if there is none any more."""
        _, complaints = self.checkpoints.load()
        return bool(complaints)

    def reopen(self) -> None:
        """Make a finished run one that is not."""
        (self.folder / "summary.json").unlink(missing_ok=True)

    @property
    def summary(self) -> dict[str, Any] | None:
        """The summary of a finished run; None before that.

        Raises:
            UserError: If it cannot be read as one.
        """
        path = self.folder / "summary.json"
        if not path.exists():
            return None
        try:
            summary = json.loads(path.read_text())
        except ValueError:  # JSONDecodeError, UnicodeDecodeError
            summary = None
        if not isinstance(summary, dict):
            raise UserError(f"{path} is damaged; remove it and go on with fit --resume {shlex.quote(str(self.folder))}")
        return summary


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a folder's lock, which ends with the process; where there are no locks, nothing is held."""
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise FolderInUseError(f"{folder}: another process is at work there") from error
        except OSError:  # a file system that knows no locks
            pass
        yield
    finally:
        os.close(handle)
