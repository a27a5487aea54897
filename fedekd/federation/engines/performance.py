"""Garbage collection and process lifetime."""

from __future__ import annotations

import gc
import multiprocessing
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def gc_frozen() -> Iterator[None]:
    """Context manager: exclude existing objects from garbage collection.

    A full collection otherwise visits every imported object, which takes about 0.25 s each time.
    """
    if gc.get_freeze_count():  # the caller froze objects already: leave them frozen
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def die_with_parent(folder: Path | None = None) -> None:
    """End this child process when its parent ends.

    A killed parent cannot end its children itself.

    Args:
        folder: Temporary folder of the parent, which is then removed.
    """
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            if folder is not None:
                for _ in range(3):  # the main thread may still write a file
                    shutil.rmtree(folder, ignore_errors=True)
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
