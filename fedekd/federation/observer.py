"""Who watches a federation: a display, a test, a notebook."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Protocol


class Observer(Protocol):
    """Is told what happens. `fedekd.reporting.Display` is one."""

    def started(self, rounds: int, total_steps: int, done_steps: int) -> None:
        """The work begins, or goes on: training steps in all, and those already done."""
        ...

    def round_started(self, round_idx: int) -> None:
        """The participants are about to absorb aggregate number `round_idx`."""
        ...

    def phase_started(self, client: int, phase: str) -> None:
        """A client begins a phase: `local`, `receive` or `update`."""
        ...

    def phase_finished(self, client: int, phase: str, steps: int) -> None:
        """A client has ended a phase, which counted for `steps` training steps."""
        ...

    def round_finished(self, row: Mapping[str, float]) -> None:
        """A round's scores are known and on disk."""
        ...

    def warn(self, text: str) -> None:
        """Something was put right or left out, and the user should know."""
        ...

    def finished(self) -> None:
        """No more will come."""
        ...


class SilentObserver:
    """Says nothing but warnings; a base for observers that care for a few events only."""

    def started(self, rounds: int, total_steps: int, done_steps: int) -> None:
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
        """One line on standard error."""
        print(f"warning: {text}", file=sys.stderr)

    def finished(self) -> None:
        """See `Observer`."""
