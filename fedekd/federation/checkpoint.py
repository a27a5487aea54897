"""Checkpoints of a run, and the serialization of states.

`checkpoints/` holds `manifest-0003.json`, which names the files of round 3 with their SHA-256: one file per client and
one for the server. A client that did not take part keeps its older file. A manifest is written after all its files are
on disk, and the files of the previous manifest stay, so that one complete state always exists.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedekd.atomic import atomic_file

#: Number of manifests on disk: the newest, and one to fall back to.
NUM_MANIFESTS = 2

#: Manifest file name; other files in the folder, such as a copy of a manifest, are ignored.
_MANIFEST = re.compile(r"manifest-([0-9]{4,})\.json")


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
    buffer = io.BytesIO()  # with a path, torch.save would write the file name into the file
    torch.save(_canonical(state), buffer)
    return buffer.getvalue()


def unpack(content: bytes) -> Any:
    """Return the state of `pack`, on the CPU; no code of the content is run.

    Raises:
        Exception: Any exception of torch, if the bytes are not a complete state of plain values.
    """
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def digest(content: bytes) -> str:
    """Return the SHA-256 in hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


@dataclass(frozen=True)
class Checkpoint:
    """Complete state of a run, verified against its manifest.

    Attributes:
        round: Next round.
        notes: JSON values saved with it.
        server: Server state of the method.
        clients: State by client number.
    """

    round: int
    notes: dict[str, Any]
    server: Any
    clients: dict[int, Any]


class CheckpointStore:
    """Checkpoints of one run.

    Args:
        folder: Folder of the files; created with the first checkpoint.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, round_idx: int, notes: Mapping[str, Any], server: Any, clients: Iterable[tuple[int, Any]]) -> None:
        """Write a checkpoint, then remove files that no manifest needs.

        Args:
            round_idx: Next round, from which a resumed run continues.
            notes: JSON values.
            server: Server state of the method.
            clients: Number and state of each client that changed since the last checkpoint, consumed one at a time.
        """
        before = [earlier for earlier in self._rounds() if earlier < round_idx]
        files: dict[str, dict[str, str]] = dict(self._manifest(before[-1])["files"]) if before else {}
        for number, state in clients:
            files[f"client-{number:03d}"] = self._write(f"client-{number:03d}", round_idx, state)
        files["server"] = self._write("server", round_idx, server)
        manifest = {"round": round_idx, "files": files, "notes": dict(notes)}
        with atomic_file(self._path(round_idx)) as file:
            file.write(json.dumps(manifest, indent=1).encode())
        self._prune(round_idx)

    def load(self) -> tuple[Checkpoint | None, list[str]]:
        """Load the newest valid checkpoint.

        Returns:
            The checkpoint, None if there is none; and a message for each newer one that is corrupt.
        """
        messages: list[str] = []
        for round_idx in reversed(self._rounds()):
            try:
                return self._load(round_idx), messages
            except Exception as error:  # a corrupt file may raise any exception: try the previous checkpoint
                messages.append(f"the checkpoint of round {round_idx} is corrupt ({error})")
        return None, messages

    def _load(self, round_idx: int) -> Checkpoint:
        manifest = self._manifest(round_idx)
        states = {}
        for key, entry in manifest["files"].items():
            content = (self.folder / entry["file"]).read_bytes()
            if digest(content) != entry["sha256"]:
                raise ValueError(f"{entry['file']} does not match its SHA-256")
            states[key] = unpack(content)
        server = states.pop("server")
        clients = {int(key.removeprefix("client-")): state for key, state in states.items()}
        return Checkpoint(manifest["round"], manifest["notes"], server, clients)

    def _write(self, key: str, round_idx: int, state: Any) -> dict[str, str]:
        content = pack(state)
        name = f"{key}-{round_idx:04d}.pt"
        with atomic_file(self.folder / name) as file:
            file.write(content)
        return {"file": name, "sha256": digest(content)}

    def _path(self, round_idx: int) -> Path:
        return self.folder / f"manifest-{round_idx:04d}.json"

    def _rounds(self) -> list[int]:
        matches = (_MANIFEST.fullmatch(path.name) for path in self.folder.glob("manifest-*.json"))
        return sorted(int(match[1]) for match in matches if match)

    def _manifest(self, round_idx: int) -> dict[str, Any]:
        manifest: dict[str, Any] = json.loads(self._path(round_idx).read_text())
        return manifest

    def _prune(self, newest: int) -> None:
        """Remove old manifests and unused files.

        A manifest newer than `newest` is corrupt, since the run continued from an older one, and is removed, too.
        """
        needed_rounds = [round_idx for round_idx in self._rounds() if round_idx <= newest][-NUM_MANIFESTS:]
        for round_idx in set(self._rounds()) - set(needed_rounds):
            self._path(round_idx).unlink()
        manifests = map(self._manifest, needed_rounds)
        needed = {entry["file"] for manifest in manifests for entry in manifest["files"].values()}
        for path in self.folder.iterdir():
            # A .tmp file is the unfinished write of a killed process: the folder has one writer.
            if path.suffix == ".tmp" or (path.suffix == ".pt" and path.name not in needed):
                path.unlink()
