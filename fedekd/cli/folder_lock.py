"""Lock of a folder in which several commands write."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from fedekd.errors import UserError, shorten_path
from fedekd.federation.run_folder import LOCK_FILE

#: Longest wait for another call that writes in the same folder.
LOCK_SECONDS = 60.0


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Context manager: lock a folder against other calls; created if missing.

    Used for the state of a monitor, and for the exit policies, which `calibrate` and `monitor --apply` write.

    Raises:
        UserError: If the lock is not free within `LOCK_SECONDS`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(folder / LOCK_FILE).acquire(timeout=LOCK_SECONDS)
    except Timeout as error:
        raise UserError(f"{shorten_path(folder)}: locked by another call of fedekd. Repeat the command") from error
    with lock:
        yield
