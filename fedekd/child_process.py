"""Lifetime of child processes."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import threading
from pathlib import Path


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
