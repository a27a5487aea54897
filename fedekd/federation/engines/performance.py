"""Garbage collection of large processes."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


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
