"""Checkpoints that count only when they are whole: one file a client, one for the server, and a manifest, last.

`checkpoints/` of a run holds `manifest-0003.json`, which names the files of round 3 with their SHA-256; a client
that did not take part keeps its older file. A manifest is written after all its files are on the disk, and the
files of the manifest before it stay, so that whatever happens there is one complete state to go on from.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedekd.atomic import atomic_file
from fedekd.federation.storage import digest, pack, unpack

#: How many manifests are kept: the newest, and one to fall back to.
KEPT = 2

#: The name of a manifest, exactly: somebody's copy of one beside it is none.
_MANIFEST = re.compile(r"manifest-([0-9]{4,})\.json")


@dataclass(frozen=True)
class Checkpoint:
    """A complete state, verified against its manifest.

    Attributes:
        round_idx: The round to begin with.
        notes: What else was kept, as JSON values.
        server: The method's server state.
        clients: By client number: the client's state.
    """

    round: int
    notes: dict[str, Any]
    server: Any
    clients: dict[int, Any]


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        folder: Made when the first checkpoint is written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, round_idx: int, notes: Mapping[str, Any], server: Any, clients: Iterable[tuple[int, Any]]) -> None:
        """Write a checkpoint, and then drop those that are no longer needed.

        Args:
            round_idx: The round to begin with when going on from here.
            notes: JSON values.
            server: The method's server state.
            clients: Number and state of each client that changed since the last checkpoint, taken one at a time;
                the others keep the file that the checkpoint before this one names.
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
        """The newest checkpoint that is whole, or None; and what is wrong with those that were passed over."""
        complaints: list[str] = []
        for round_idx in reversed(self._rounds()):
            try:
                return self._load(round_idx), complaints
            except Exception as error:  # a damaged file may fail in any way: the one before is then tried
                complaints.append(f"the checkpoint of round {round_idx} is damaged ({error})")
        return None, complaints

    def _load(self, round_idx: int) -> Checkpoint:
        manifest = self._manifest(round_idx)
        states = {}
        for key, entry in manifest["files"].items():
            content = (self.folder / entry["file"]).read_bytes()
            if digest(content) != entry["sha256"]:
                raise ValueError(f"{entry['file']} is not what was written")
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
        found = (_MANIFEST.fullmatch(path.name) for path in self.folder.glob("manifest-*.json"))
        return sorted(int(match[1]) for match in found if match)

    def _manifest(self, round_idx: int) -> dict[str, Any]:
        manifest: dict[str, Any] = json.loads(self._path(round_idx).read_text())
        return manifest

    def _prune(self, newest: int) -> None:
        """Drop what is older than the manifest before `newest`, and what is younger: it was passed over as damaged."""
        kept = [round_idx for round_idx in self._rounds() if round_idx <= newest][-KEPT:]
        for round_idx in set(self._rounds()) - set(kept):
            self._path(round_idx).unlink()
        needed = {entry["file"] for round_idx in kept for entry in self._manifest(round_idx)["files"].values()}
        for path in self.folder.iterdir():
            # A draft is what a killed process left behind: nobody else writes here.
            if path.suffix == ".tmp" or (path.suffix == ".pt" and path.name not in needed):
                path.unlink()
