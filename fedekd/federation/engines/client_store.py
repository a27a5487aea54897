"""States of clients on disk, so that a thousand clients need the memory of those at work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedekd.atomic import atomic_file
from fedekd.federation.storage import pack, unpack


class ClientStore:
    """A folder with a file for each state that a client was in.

    Every state has a version of its own: whoever works on the next one leaves the last as it is, and work that was lost
    half done can be done again from there.

    Args:
        folder: Where the files lie; it is there already, and all machines that run clients must see it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self, number: int, version: int) -> Any:
        """A state, on the CPU."""
        return unpack(self._path(number, version).read_bytes())

    def write(self, number: int, version: int, state: Any) -> None:
        """Keep a state; what has the same version is replaced.

        Raises:
            FileNotFoundError: If the folder is gone: its owner has no more use for it, and who is late to write must
                not make it again.
        """
        self.folder.stat()  # raises, where `atomic_file` makes what is missing
        with atomic_file(self._path(number, version)) as file:
            file.write(pack(state))

    def has(self, number: int, version: int) -> bool:
        """Whether a state is there."""
        return self._path(number, version).is_file()

    def versions(self, number: int) -> list[int]:
        """Of a client's states that are there, in order."""
        return sorted(int(path.stem.rpartition("-")[2]) for path in self.folder.glob(f"client-{number:05d}-*.pt"))

    def drop(self, number: int, version: int) -> None:
        """Forget a state, if it is there."""
        self._path(number, version).unlink(missing_ok=True)

    def _path(self, number: int, version: int) -> Path:
        return self.folder / f"client-{number:05d}-{version:06d}.pt"
