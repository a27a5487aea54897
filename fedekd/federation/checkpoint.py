"""Checkpoints of a run, and the serialization of states.

`checkpoints/` holds `manifest-0003.json`, which has the place of each state in a file and its SHA-256. The states of a
round, of the clients that changed and of the server, are one file. A client that did not take part keeps its state in
an older file. A manifest ends with its own SHA-256. It is written after its states are on disk, and the states of the
previous manifest are kept, so that one complete checkpoint always exists, even if a file of the newest one is corrupt.
On average, the files take 1.7 to 2.0 times the bytes of all states, at most 2.4 times (100 clients, participation 0.1
to 1).
"""

from __future__ import annotations

import io
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedekd.atomic import atomic_file, digest, remove_drafts, seal_json, unseal_json
from fedekd.errors import UserError, describe_error, shorten_path

#: Number of manifests on disk: the newest, and one to fall back to.
NUM_MANIFESTS = 2

#: Version of a manifest and of its notes; others are rejected.
FORMAT = 5

#: Share of a file that is still needed, below which its states are copied to the next file. With participation 0.5 a
#: share of 1/2 copies all states in every round (1.98 times the bytes that changed), 1/3 writes 1.32 times.
SPARSE = 1 / 3

#: Manifest file name; other files in the folder, such as a copy of a manifest, are ignored.
_MANIFEST = re.compile(r"manifest-([0-9]{4,})\.json")

_STATES = re.compile(r"states-[0-9]{4,}\.bin")

#: Place of a state: `file`, `start` and `size` in bytes, and `sha256`.
Entry = dict[str, Any]


@dataclass(frozen=True)
class Packed:
    """Serialized state.

    Attributes:
        content: Bytes, which `pack` returns unchanged.
    """

    content: bytes


def _canonical(state: Any) -> Any:
    """Return a nested state on the CPU, with one object for equal strings.

    Pickle writes a repeated string object as a reference: without this, a state read from a file would be serialized
    to other bytes than the same state computed.
    """
    if isinstance(state, Tensor):
        return state.detach().cpu()
    if isinstance(state, dict):
        return {_canonical(key): _canonical(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(_canonical(value) for value in state)
    return sys.intern(state) if isinstance(state, str) else state


def pack(state: Any) -> bytes:
    """Serialize a nested state of tensors, numbers and strings.

    Equal states give equal bytes.
    """
    if isinstance(state, Packed):
        return state.content
    buffer = io.BytesIO()  # with a path, torch.save would write the file name into the file
    torch.save(_canonical(state), buffer)
    return buffer.getvalue()


def unpack(content: bytes) -> Any:
    """Return the state of `pack`, on the CPU; no code of the content is run.

    Raises:
        Exception: Any exception of torch, if the bytes are not a complete state of plain values.
    """
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


class StoredStates(Mapping[int, Any]):
    """States by client number, read from a checkpoint at each access.

    Args:
        read: Returns the bytes of an entry.
        entries: Place of each state.
    """

    def __init__(self, read: Callable[[Entry], bytes], entries: Mapping[int, Entry]) -> None:
        self._read, self._entries = read, dict(entries)

    def __getitem__(self, number: int) -> Any:
        entry = self._entries[number]
        try:
            return unpack(self._read(entry))
        except (OSError, ValueError) as error:
            reason = f"changed while it was read ({describe_error(error)}). Repeat the command"
            raise UserError(f"{entry['file']}: {reason}") from error

    def __iter__(self) -> Iterator[int]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


@dataclass(frozen=True)
class Checkpoint:
    """Complete state of a run, verified against its manifest.

    Attributes:
        round: Next round.
        notes: JSON values saved with it.
        server: Server state of the method.
        clients: State by client number, read at each access.
    """

    round: int
    notes: dict[str, Any]
    server: Any
    clients: Mapping[int, Any]


class CheckpointStore:
    """Checkpoints of one run.

    Args:
        folder: Folder of the files; created with the first checkpoint.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._entries: dict[str, Entry] | None = None  # of the last checkpoint that was loaded or saved

    def save(self, round_idx: int, notes: Mapping[str, Any], server: Any, clients: Iterable[tuple[int, Any]]) -> None:
        """Write a checkpoint, then remove files that no manifest needs.

        Args:
            round_idx: Next round, from which a resumed run continues.
            notes: JSON values.
            server: Server state of the method.
            clients: Number and state of each client that changed since the last checkpoint, consumed one at a time.
        """
        if self._entries is None:
            with suppress(UserError):  # checkpoints of another version are replaced: runs load before they save
                self.load()
        entries = dict(self._entries or {})
        name = f"states-{round_idx:04d}.bin"
        with atomic_file(self.folder / name) as file:

            def append(key: str, content: bytes) -> None:
                entry = {"file": name, "start": file.tell(), "size": len(content), "sha256": digest(content)}
                file.write(content)
                entries[key] = entry

            for number, state in clients:
                append(f"client-{number:03d}", pack(state))
            entries.pop("server", None)
            copied = self._sparse_files(entries) | {name}  # a repeated round replaces its file
            for key, entry in (self._entries or {}).items():
                if entry is entries.get(key) and entry["file"] in copied:
                    try:
                        content = self._read(entry)
                    except (OSError, ValueError):
                        continue  # a corrupt state is found when it is loaded
                    append(key, content)
            append("server", pack(server))
        manifest = {"format": FORMAT, "round": round_idx, "files": entries, "notes": dict(notes)}
        with atomic_file(self._path(round_idx)) as file:
            file.write(seal_json(manifest))
        self._entries = entries
        self._prune(round_idx)

    def load(self) -> tuple[Checkpoint | None, list[str]]:
        """Load the newest valid checkpoint.

        Returns:
            The checkpoint, None if there is none; and a message for each newer one that is corrupt.

        Raises:
            UserError: If another version of fedekd wrote it.
        """
        messages: list[str] = []
        for round_idx in reversed(self._rounds()):
            try:
                return self._load(round_idx), messages
            except UserError:  # of another version: not damaged
                raise
            except Exception as error:  # a corrupt file may raise any exception: try the previous checkpoint
                messages.append(f"the checkpoint of round {round_idx} is corrupt ({describe_error(error)})")
        self._entries = {}
        return None, messages

    def notes(self) -> dict[str, Any] | None:
        """Return the notes of the newest valid manifest, without loading its states.

        Raises:
            UserError: If another version of fedekd wrote it.
        """
        manifest = self._newest_manifest()
        return None if manifest is None else manifest["notes"]

    def digests(self) -> dict[str, str]:
        """Return SHA-256 by state in the newest valid manifest: `client-000`, `server`.

        Raises:
            UserError: If another version of fedekd wrote it.
        """
        manifest = self._newest_manifest()
        return {} if manifest is None else {key: entry["sha256"] for key, entry in manifest["files"].items()}

    def has_any(self) -> bool:
        """Return whether there is a checkpoint, valid or not."""
        return bool(self._rounds())

    @property
    def newest(self) -> int:
        """Round of the newest manifest, valid or not; 0 without one."""
        return max(self._rounds(), default=0)

    def clear(self) -> None:
        """Remove the states of a first checkpoint that has no manifest."""
        remove_drafts(self.folder)
        for path in self._state_files():
            path.unlink(missing_ok=True)
        with suppress(OSError):  # missing, or with other files
            self.folder.rmdir()

    def _load(self, round_idx: int) -> Checkpoint:
        manifest = self._manifest(round_idx)
        entries: dict[str, Entry] = manifest["files"]
        for entry in entries.values():
            self._read(entry)  # the states of all clients need not fit into memory
        self._entries = entries
        numbers = {int(key.removeprefix("client-")): entry for key, entry in entries.items() if key != "server"}
        clients = StoredStates(self._read, numbers)
        return Checkpoint(manifest["round"], manifest["notes"], unpack(self._read(entries["server"])), clients)

    def _read(self, entry: Entry) -> bytes:
        """Return the bytes of a state.

        Raises:
            ValueError: If they do not match their checksum.
        """
        with open(self.folder / entry["file"], "rb") as file:
            file.seek(entry["start"])
            content = file.read(entry["size"])
        if digest(content) != entry["sha256"]:
            raise ValueError(f"{entry['file']} does not match its SHA-256")
        return content

    def _sparse_files(self, entries: Mapping[str, Entry]) -> set[str]:
        """Return files most of whose states have been replaced by newer ones."""
        needed = Counter[str]()
        for entry in entries.values():
            needed[entry["file"]] += entry["size"]
        sizes = {path.name: path.stat().st_size for path in self.folder.glob("states-*.bin")}
        return {name for name, size in sizes.items() if needed[name] < SPARSE * size}

    def _state_files(self) -> list[Path]:
        return [path for path in self.folder.glob("*-*.*") if _STATES.fullmatch(path.name)]

    def _path(self, round_idx: int) -> Path:
        return self.folder / f"manifest-{round_idx:04d}.json"

    def _rounds(self) -> list[int]:
        matches = (_MANIFEST.fullmatch(path.name) for path in self.folder.glob("manifest-*.json"))
        return sorted(int(match[1]) for match in matches if match)

    def _newest_manifest(self) -> dict[str, Any] | None:
        for round_idx in reversed(self._rounds()):
            try:
                return self._manifest(round_idx)
            except UserError:
                raise
            except (OSError, ValueError):
                continue  # corrupt: the previous one
        return None

    def _manifest(self, round_idx: int) -> dict[str, Any]:
        """Read and verify a manifest.

        Raises:
            ValueError: If it does not match its checksum.
            UserError: If another version of fedekd wrote it.
        """
        path = self._path(round_idx)
        try:
            manifest = unseal_json(path.read_bytes())
        except ValueError as error:
            raise ValueError(f"{path.name}: {error}") from error
        if (layout := manifest.get("format")) != FORMAT:
            raise UserError(
                f"{shorten_path(path)}: expected format {FORMAT}, got {str(layout).lower():.20}. Another version of"
                " fedekd wrote this run: use that version, or start a new run"
            )
        return manifest

    def _prune(self, newest: int) -> None:
        """Remove old manifests and unused files.

        A manifest newer than `newest` is corrupt, since the run continued from an older one, and is removed, too.
        """
        needed_rounds = [round_idx for round_idx in self._rounds() if round_idx <= newest][-NUM_MANIFESTS:]
        for round_idx in set(self._rounds()) - set(needed_rounds):
            self._path(round_idx).unlink()
        remove_drafts(self.folder)  # the folder has one writer
        try:
            manifests = [self._manifest(round_idx) for round_idx in needed_rounds]
        except (OSError, ValueError):
            return  # which files a corrupt manifest needs is unknown: keep all until it is removed
        needed = {entry["file"] for manifest in manifests for entry in manifest["files"].values()}
        for path in self._state_files():
            if path.name not in needed:
                path.unlink()
