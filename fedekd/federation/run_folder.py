"""Folder of a run: configuration, checkpoints, metrics, summary and figures."""

from __future__ import annotations

import json
import shlex
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from filelock import FileLock, Timeout

from fedekd.atomic import atomic_file
from fedekd.data import FederatedDataModule
from fedekd.errors import UserError
from fedekd.federation.checkpoint import Checkpoint, CheckpointStore
from fedekd.federation.results import Progress
from fedekd.reporting import figures, write_metrics_csv

#: Options that do not affect results and may change on resume.
RUNTIME_OPTIONS = ("data.root", "data.download", "baseline_dir", "trainer.device", "logger", "engine")

#: Empty file in the run folder that is locked during a run.
LOCK_FILE = ".lock"


def first_difference(
    ours: Any, theirs: Any, ignored: Collection[str] = (), path: str = ""
) -> tuple[str, Any, Any] | None:
    """Return the first difference of two configurations: (dotted key, ours, theirs).

    Args:
        ours: One configuration.
        theirs: Another configuration.
        ignored: Dotted keys that may differ.
        path: Dotted key of the two values themselves.

    Example:
        >>> first_difference({"data": {"alpha": 0.1}}, {"data": {"alpha": 0.3}})
        ('data.alpha', 0.1, 0.3)
        >>> first_difference({"data": {"root": "a"}}, {"data": {"root": "b"}}, RUNTIME_OPTIONS)
    """
    if path in ignored:
        return None
    if isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        ours, theirs = (dict(enumerate(items)) for items in (ours, theirs))
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        for key in sorted({*ours, *theirs}):
            name = f"{path}.{key}" if path else str(key)
            difference = first_difference(ours.get(key), theirs.get(key), ignored, name)
            if difference is not None:
                return difference
        return None
    both_nan = ours != ours and theirs != theirs
    return None if both_nan or ours == theirs else (path, ours, theirs)


def drop_unknown_keys(before: Any, now: Any) -> Any:
    """Return `now` without the keys that `before` lacks.

    Options added after a run was created are ignored: their defaults reproduce the old behaviour.

    Example:
        >>> drop_unknown_keys({"client": {"local_epochs": 2}}, {"client": {"local_epochs": 3, "exits": None}})
        {'client': {'local_epochs': 3}}
    """
    if not (isinstance(before, Mapping) and isinstance(now, Mapping)):
        return now
    return {key: drop_unknown_keys(before[key], value) for key, value in now.items() if key in before}


def to_json_value(value: Any) -> Any:
    """Convert a configuration to JSON values.

    An object becomes its class name and its attributes.
    """
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, Mapping):
        return {str(key): to_json_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json_value(item) for item in value]
    attributes = {} if isinstance(value, torch.nn.Module) else getattr(value, "__dict__", {})
    return {"class": type(value).__qualname__, **to_json_value(attributes)}


class FolderInUseError(UserError):
    """Raised when another process has locked a run folder."""


class RunFolder:
    """Folder of a run.

    Args:
        folder: Path; created if missing.
        config: Configuration of the run as JSON values, enough to repeat it.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        self.folder, self.config = folder, dict(config)
        self.checkpoints = CheckpointStore(folder / "checkpoints")
        folder.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Context manager: lock the folder, and write the configuration.

        The lock ends with the process. Its empty file stays, since removing it would let two processes lock two files.

        Raises:
            FolderInUseError: If another process has locked it.
        """
        try:
            lock = FileLock(self.folder / LOCK_FILE).acquire(timeout=0)
        except Timeout as error:
            raise FolderInUseError(f"{self.folder}: run folder is locked by another process") from error
        with lock:
            if self.config and not (self.folder / "config.yaml").exists():
                with atomic_file(self.folder / "config.yaml") as file:
                    file.write(yaml.safe_dump(self.config, sort_keys=False).encode())
            yield

    def restore(self, identity: Mapping[str, Any]) -> tuple[Checkpoint | None, list[str]]:
        """Load the newest valid checkpoint.

        Args:
            identity: JSON values that must equal those of the checkpoint.

        Returns:
            The checkpoint, None if there is none; and a message for each newer one that is corrupt.

        Raises:
            UserError: If the checkpoint is of another configuration or other data.
        """
        for unfinished in self.folder.glob(".*.tmp"):  # of a killed process: the folder has one writer
            unfinished.unlink()
        checkpoint, messages = self.checkpoints.load()
        if checkpoint is not None:
            notes = checkpoint.notes
            config = drop_unknown_keys(notes["config"], self.config)
            now_identity = drop_unknown_keys(notes["identity"], dict(identity))
            difference = first_difference(notes["config"], config, RUNTIME_OPTIONS)
            if difference := difference or first_difference(notes["identity"], now_identity):
                key, before, now = difference
                raise UserError(
                    f"{self.folder}: {key}: expected the saved value {before!r}, got {now!r}."
                    " Resume with the same configuration, or start a new run with --output."
                )
        return checkpoint, messages

    def save(
        self, progress: Progress, server: Any, clients: Iterable[tuple[int, Any]], identity: Mapping[str, Any]
    ) -> None:
        """Write a checkpoint, which makes the last round count, and then metrics.csv."""
        notes = {"progress": progress.to_json(), "config": self.config, "identity": dict(identity)}
        self.checkpoints.save(progress.round, notes, server, clients)
        if progress.history:
            write_metrics_csv(progress.history, self.folder / "metrics.csv")

    def write_figures(
        self, summary: Mapping[str, Any], history: Sequence[Mapping[str, float]], data: FederatedDataModule
    ) -> None:
        """Write the figures of a finished run."""
        folder = self.folder / "figures"
        figures.save(figures.partition(data.class_counts()), folder / "partition.png")
        figures.save(figures.delta_per_client(summary), folder / "delta_per_client.png")
        figures.save(figures.score_per_round(history, summary), folder / f"{summary['metric']}_per_round.png")
        if (gate := figures.gate_weights(history)) is not None:
            figures.save(gate, folder / "gate_weights.png")

    def finalize(self, summary: Mapping[str, Any], history: Sequence[Mapping[str, float]]) -> None:
        """Write metrics.csv, then summary.json, which marks the run as finished."""
        write_metrics_csv(history, self.folder / "metrics.csv")
        with atomic_file(self.folder / "summary.json") as file:
            file.write((json.dumps(dict(summary), indent=2) + "\n").encode())

    def is_corrupt(self) -> bool:
        """Return whether the newest checkpoint is corrupt; False if there is none."""
        _, messages = self.checkpoints.load()
        return bool(messages)

    def reopen(self) -> None:
        """Mark a finished run as unfinished."""
        (self.folder / "summary.json").unlink(missing_ok=True)

    @property
    def summary(self) -> dict[str, Any] | None:
        """Summary of a finished run; None for an unfinished one.

        Raises:
            UserError: If `summary.json` is corrupt.
        """
        path = self.folder / "summary.json"
        if not path.exists():
            return None
        try:
            summary = json.loads(path.read_text())
        except ValueError:  # JSONDecodeError, UnicodeDecodeError
            summary = None
        if not isinstance(summary, dict):
            raise UserError(f"{path} is corrupt. Remove it and run: fit --resume {shlex.quote(str(self.folder))}")
        return summary
