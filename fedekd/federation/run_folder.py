"""Folder of a run: configuration, checkpoints, metrics, summary and figures.

Every file that a command reads back is verified: states and manifests by `CheckpointStore`, the others by the checksums
in `SHA256SUMS`. What does not match is written again from the checkpoint by `fit --resume`.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from filelock import FileLock, Timeout

from fedekd.atomic import DRAFTS, atomic_file, digest, remove_drafts
from fedekd.data import FederatedDataModule
from fedekd.errors import NO_ROOM, UserError
from fedekd.federation.checkpoint import Checkpoint, CheckpointStore
from fedekd.federation.results import Progress
from fedekd.reporting import figures, write_metrics_csv
from fedekd.reporting.rows import client_titles

#: Options that do not affect results and may change on resume.
RUNTIME_OPTIONS = (
    "checkpoint_every",
    "data.root",
    "data.download",
    "data.num_workers",
    "baseline_dir",
    "trainer.device",
    "logger",
    "engine",
)

#: Empty file in the run folder that is locked during a run.
LOCK_FILE = ".lock"

#: Checksums of the other files, in the format of `sha256sum`. Until the run is finished it lists `config.yaml`.
SUMS_FILE = "SHA256SUMS"

_SUM = re.compile(r"([0-9a-f]{64})  (.+)")

_CONFIG, _METRICS, _SUMMARY = "config.yaml", "metrics.csv", "summary.json"

#: Files and folders of a finished run; a copy of them is a run folder.
ARTIFACT_FILES = (_CONFIG, _METRICS, _SUMMARY, SUMS_FILE, "figures", "checkpoints")

_FILES = set(ARTIFACT_FILES)


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


def has_run(folder: Path) -> bool:
    """Return whether a folder has files of a run, or files without a lock.

    A run that failed before its first checkpoint leaves its lock and what others wrote there: baselines, logs.
    """
    names = {child.name for child in folder.iterdir() if not child.match(DRAFTS)}
    return bool(names & _FILES) or (bool(names) and LOCK_FILE not in names)


class FolderInUseError(UserError):
    """Raised when another process has locked a run folder."""


class RunFolder:
    """Folder of a run.

    Args:
        folder: Path; created by `lock` if missing.
        config: Configuration of the run as JSON values, enough to repeat it.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        self.folder, self.config = folder, dict(config)
        self.checkpoints = CheckpointStore(folder / "checkpoints")

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Context manager: lock the folder, and write the configuration.

        The lock ends with the process. Its empty file stays, since removing it would let two processes lock two files.
        If a folder without a run was locked, and an exception ends the run before its first checkpoint, the files of
        the run are removed: they must not block the corrected command. Other files stay, with that of the lock.

        Raises:
            FolderInUseError: If another process has locked it.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / LOCK_FILE
        try:
            lock = FileLock(path).acquire(timeout=0)
        except Timeout as error:
            raise FolderInUseError(f"{self.folder}: run folder is locked by another process") from error
        with lock:
            if not path.exists():  # removed by a run that failed after this process had opened the file
                raise FolderInUseError(f"{self.folder}: run folder was removed by another process")
            is_new = not has_run(self.folder)
            if self.config and self._config_damage() is not None:
                self._write_config(self.config)
            try:
                yield
            except Exception as error:  # not `Interrupted`: that run goes on with --resume
                is_full = isinstance(error, OSError) and error.errno in NO_ROOM
                if is_new and not is_full and not self.checkpoints.has_any():
                    self._clear()
                raise

    def _clear(self) -> None:
        """Remove the files of a run that has no checkpoint.

        The file of the lock is removed last, if no other is left.
        """
        self.checkpoints.clear()
        remove_drafts(self.folder)
        for name in (_CONFIG, SUMS_FILE):
            (self.folder / name).unlink(missing_ok=True)
        if all(child.name == LOCK_FILE for child in self.folder.iterdir()):
            (self.folder / LOCK_FILE).unlink(missing_ok=True)

    def _write_config(self, config: Mapping[str, Any]) -> None:
        content = yaml.safe_dump(dict(config), sort_keys=False).encode()
        sums = self._sums() if self.is_finished else {}
        self._write(_CONFIG, content)
        if sums is not None:  # a finished run without checksums is not verified
            self._write_sums([], sums | {_CONFIG: digest(content)})

    def restore(self, identity: Mapping[str, Any]) -> tuple[Checkpoint | None, list[str]]:
        """Load the newest valid checkpoint.

        Args:
            identity: JSON values that must equal those of the checkpoint.

        Returns:
            The checkpoint, None if there is none; and a message for each newer one that is corrupt.

        Raises:
            UserError: If the checkpoint is of another configuration, other data or another version of fedekd.
        """
        for folder in (self.folder, self.folder / "figures"):
            remove_drafts(folder)  # the folder is locked
        checkpoint, messages = self.checkpoints.load()
        if checkpoint is not None:
            notes = checkpoint.notes
            config = drop_unknown_keys(notes["config"], to_json_value(self.config))
            # A part that is off is left out: one that is new was not part of the run.
            parts = {name: drop_unknown_keys(notes["identity"].get(name), part) for name, part in identity.items()}
            difference = first_difference(notes["config"], config, RUNTIME_OPTIONS)
            if difference := difference or first_difference(notes["identity"], parts):
                key, before, now = difference
                raise UserError(
                    f"{self.folder}: {key}: expected the saved value {before!r}, got {now!r}."
                    " Resume with the same configuration, or start a new run with --output."
                )
        return checkpoint, messages

    def save(
        self, progress: Progress, server: Any, clients: Iterable[tuple[int, Any]], identity: Mapping[str, Any]
    ) -> None:
        """Write a checkpoint, from which a run resumes, and then metrics.csv."""
        notes = {"progress": progress.to_json(), "config": self.config, "identity": dict(identity)}
        self.checkpoints.save(progress.round, notes, server, clients)
        if progress.history:
            write_metrics_csv(progress.history, self.folder / _METRICS, progress.names)

    def write_figures(
        self, summary: Mapping[str, Any], history: Sequence[Mapping[str, float]], data: FederatedDataModule
    ) -> None:
        """Write the figures of a finished run."""
        folder = self.folder / "figures"
        names = client_titles(summary) if data.has_sites else None
        if data.num_classes:  # real-valued targets have none
            table = figures.partition(data.class_counts(), summary.get("class_names"), names)
            figures.save(table, folder / "partition.png")
        figures.save(figures.delta_per_client(summary), folder / "delta_per_client.png")
        figures.save(figures.score_per_round(history, summary), folder / f"{summary['metric']}_per_round.png")
        if (gate := figures.gate_weights(history, summary)) is not None:
            figures.save(gate, folder / "gate_weights.png")

    def finalize(self, summary: Mapping[str, Any], history: Sequence[Mapping[str, float]]) -> None:
        """Write metrics.csv, SHA256SUMS, and summary.json, the mark of a finished run."""
        content = (json.dumps(dict(summary), indent=2) + "\n").encode()
        write_metrics_csv(history, self.folder / _METRICS, client_titles(summary))
        pictures = sorted(f"figures/{path.name}" for path in self.folder.glob("figures/*.png"))
        names = [name for name in (_CONFIG, _METRICS) if (self.folder / name).exists()]
        self._write_sums([*names, *pictures], {_SUMMARY: digest(content)})
        self._write(_SUMMARY, content)

    def is_complete(self, warn: Callable[[str], None]) -> bool:
        """Return whether the run is finished and all its files are intact.

        The next run in a damaged folder repeats the rounds that no checkpoint has, and writes the other files again.
        Until then the summary is kept, because data or options may prevent that run.

        Args:
            warn: Called with a message for each damaged file.

        Raises:
            UserError: If a damaged run has no checkpoints to repair it from.
        """
        if not self.is_finished:
            return False
        damage = self._damage()
        if damage:
            notes = self.checkpoints.notes()
            config_damage = self._config_damage()
            if config_damage is not None and not (notes and notes["config"]):
                raise UserError(f"{config_damage}. {self._way_out(_CONFIG)}")
            if not self.checkpoints.has_any():
                raise UserError(
                    f"{damage[0]}, and the run has no checkpoints to repair it from. Undo the change; or remove"
                    f" {_SUMMARY}, and fit --resume {shlex.quote(str(self.folder))} repeats all rounds"
                )
            with self.lock():
                for message in damage:
                    warn(f"{message}; repairing the run")
                if config_damage is not None and notes:
                    self._write_config(notes["config"])
        return not damage

    def restore_config(self) -> None:
        """Write a missing config.yaml again, from the newest checkpoint."""
        notes = None if (self.folder / _CONFIG).exists() else self.checkpoints.notes()
        if notes is not None and notes["config"]:
            with self.lock():
                self._write_config(notes["config"])

    def require_intact(self, *names: str) -> None:
        """Verify files of the run before they are read.

        A run whose checksums were removed is not verified.

        Args:
            names: Files of the folder.

        Raises:
            UserError: If a file is missing or does not match its checksum.
        """
        for name in names:
            if damage := self._file_damage(name):
                raise UserError(f"{damage}. {self._way_out(name)}")

    def _way_out(self, name: str) -> str:
        resume = f"fit --resume {shlex.quote(str(self.folder))}"
        if name == _CONFIG and self.checkpoints.notes() is None:
            return "Undo the change, or start a new run with --output"
        if self.is_finished:
            has_checkpoints = self.checkpoints.has_any()
            return f"Repair the run with: {resume}" if has_checkpoints else "Undo the change, or start a new run"
        return f"Undo the change, or remove {name} and run: {resume}"

    def _damage(self) -> list[str]:
        """Return a message for each damaged file of a finished run."""
        names = dict.fromkeys([_CONFIG, _METRICS, _SUMMARY, *(self._sums() or ())])
        messages = [message for name in names if (message := self._file_damage(name))]
        checkpoint, corrupt = self.checkpoints.load()
        messages += [f"{self.folder}: {message}" for message in corrupt]
        if not self.checkpoints.has_any():  # removed to save space, as by `benchmark`
            return messages
        summary = None if messages else self.summary
        if summary is not None and (checkpoint is None or checkpoint.round <= summary["rounds"]):
            messages.append(f"{self.folder}: the checkpoint of the last round is missing")
        if self._sums() is None:
            messages.append(f"{self.folder / SUMS_FILE} is missing")
        return messages

    def _file_damage(self, name: str) -> str | None:
        """Return a message if a file is missing or does not match its checksum."""
        if name == _CONFIG:
            return self._config_damage()
        path, sums = self.folder / name, self._sums()
        if not path.exists():
            return f"{path} is missing"
        if sums is None or sums.get(name) == digest(path.read_bytes()):
            return None
        return f"{path} does not match {SUMS_FILE}"

    def _config_damage(self) -> str | None:
        """Return a message if config.yaml differs from the options of the run.

        Runtime options may be edited.
        """
        path, sums = self.folder / _CONFIG, self._sums()
        if not path.exists():
            has_config = self.config or (sums is not None and _CONFIG in sums)
            return f"{path} is missing" if has_config else None
        content = path.read_bytes()
        if sums is None or sums.get(_CONFIG) == digest(content):
            return None
        notes = self.checkpoints.notes()
        try:
            config = yaml.safe_load(content)
        except (yaml.YAMLError, ValueError, RecursionError):
            config = None
        if notes is None or not isinstance(config, dict):
            return f"{path} does not match {SUMS_FILE}"
        if (difference := first_difference(notes["config"], to_json_value(config), RUNTIME_OPTIONS)) is None:
            return None
        key, before, now = difference
        return f"{path}: {key}: expected the saved value {before!r}, got {now!r}"

    def _sums(self) -> dict[str, str] | None:
        """Return the checksums by file name; None if there are none."""
        path = self.folder / SUMS_FILE
        if not path.exists():
            return None
        lines = path.read_bytes().decode(errors="replace").splitlines()
        return {match[2]: match[1] for match in map(_SUM.fullmatch, lines) if match}

    def _write_sums(self, names: Iterable[str], others: Mapping[str, str] | None = None) -> None:
        sums = {name: digest((self.folder / name).read_bytes()) for name in names} | dict(others or {})
        self._write(SUMS_FILE, "".join(f"{sums[name]}  {name}\n" for name in sums).encode())

    def _write(self, name: str, content: bytes) -> None:
        with atomic_file(self.folder / name) as file:
            file.write(content)

    def reopen(self) -> None:
        """Mark a finished run as unfinished."""
        (self.folder / _SUMMARY).unlink(missing_ok=True)

    @property
    def is_finished(self) -> bool:
        """True if the run has a summary, which is written last."""
        return (self.folder / _SUMMARY).exists()

    @property
    def summary(self) -> dict[str, Any] | None:
        """Summary of a finished run; None for an unfinished one.

        Raises:
            UserError: If `summary.json` is corrupt.
        """
        if not self.is_finished:
            return None
        path = self.folder / _SUMMARY
        try:
            summary = json.loads(path.read_text())
        except (ValueError, RecursionError):  # no JSON, no UTF-8, too many digits; too many levels
            summary = None
        if not isinstance(summary, dict):
            raise UserError(f"{path} is corrupt. {self._way_out(_SUMMARY)}")
        return summary
