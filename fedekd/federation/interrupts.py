"""Ctrl-C at any moment, but never in the middle of a checkpoint."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, Self


class Interrupted(BaseException):
    """The user, or the system, asked the run to stop.

    Not a KeyboardInterrupt: a Lightning Trainer answers that one by leaving the process with exit code 1.

    Attributes:
        signal_number: SIGINT or SIGTERM.
    """

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signal_number).name}")
        self.signal_number = signal_number


class Interrupts:
    """Turns SIGINT and SIGTERM into `Interrupted`, and holds them back inside `shield`.

    Outside the main thread, where Python allows no signal handlers, it does nothing.
    """

    def __init__(self) -> None:
        self._before: dict[int, Any] = {}
        self._shields = 0
        self._pending: int | None = None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._shields:
            self._pending = number
        else:
            raise Interrupted(number)

    @contextmanager
    def shield(self) -> Iterator[None]:
        """Inside, an interrupt waits until the end of the block."""
        self._shields += 1
        try:
            yield
        finally:
            self._shields -= 1
        if self._pending is not None and not self._shields:
            number, self._pending = self._pending, None
            raise Interrupted(number)


@contextmanager
def deferred() -> Iterator[None]:
    """Inside, signals wait, and handlers that are set there are forgotten.

    For short calls into a library that cannot bear an exception halfway, or takes the handlers for itself.
    Outside the main thread, where no handler runs, it does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pending: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, lambda number, frame: pending.append(number))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if pending:
        signal.raise_signal(pending[0])
