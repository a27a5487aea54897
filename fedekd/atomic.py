"""Atomic file writes, also if the process is killed."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Context manager: open a file that replaces `path` once it is on disk.

    The bytes go to a file in the same folder, since a rename is atomic only within one file system. It is flushed and
    synced before it replaces the target. If the block raises, the target is unchanged. Missing folders are created.

    Args:
        path: File to create or replace.

    Yields:
        A binary file, open for writing.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    # A random name keeps apart the runs that share a folder: threads, processes and machines.
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
