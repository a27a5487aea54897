"""Files that are either wholly there or not at all, whatever kills the process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A file to write to that takes the place of `path` only once it is complete and on the disk.

    The bytes go to a file beside the target (a rename is atomic only within one file system), which is flushed
    and synced before it replaces the target. If the block raises, the target stays as it was. Missing folders
    are made.

    Args:
        path: The file to create or to replace.

    Yields:
        A binary file, open for writing.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    # Named by process, so that two runs that share a folder do not write into each other's draft.
    draft = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with draft.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        draft.replace(target)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
