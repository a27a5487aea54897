"""Observer of a run: a display, a test, a notebook."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from fedekd.errors import print_warning


class Observer(Protocol):
    """Receiver of the events of a run, such as `fedekd.reporting.Display`."""

    def started(self, rounds: int, total_steps: int, done_steps: int) -> None:
        """Called once, with rounds, training steps, and steps done before a resume."""
        ...

    def logged_at(self, url: str) -> None:
        """Called once per logger that is online, with the address of its run."""
        ...

    def round_started(self, round_idx: int) -> None:
        """Called before the participants receive aggregate `round_idx`."""
        ...

    def phase_started(self, client: int, phase: str) -> None:
        """Called when a client begins a phase: `local`, `receive` or `update`."""
        ...

    def phase_finished(self, client: int, phase: str, steps: int) -> None:
        """Called when a client ends a phase of `steps` training steps."""
        ...

    def round_finished(self, row: Mapping[str, float]) -> None:
        """Called with the metrics row of a finished round, which may not be saved yet."""
        ...

    def warn(self, text: str) -> None:
        """Called with a warning message."""
        ...

    def finished(self) -> None:
        """Called once, at the end."""
        ...


class SilentObserver:
    """Observer that prints warnings only; a base class for observers of few events."""

    def started(self, rounds: int, total_steps: int, done_steps: int) -> None:
        """See `Observer`."""

    def logged_at(self, url: str) -> None:
        """See `Observer`."""

    def round_started(self, round_idx: int) -> None:
        """See `Observer`."""

    def phase_started(self, client: int, phase: str) -> None:
        """See `Observer`."""

    def phase_finished(self, client: int, phase: str, steps: int) -> None:
        """See `Observer`."""

    def round_finished(self, row: Mapping[str, float]) -> None:
        """See `Observer`."""

    def warn(self, text: str) -> None:
        """Print one line on standard error."""
        print_warning(text)

    def finished(self) -> None:
        """See `Observer`."""
