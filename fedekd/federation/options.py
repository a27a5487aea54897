"""How the rounds of a federation go: who takes part, what is accepted, and when it ends."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fedekd.errors import UserError


@dataclass(frozen=True)
class RoundOptions:
    """How many rounds there are, and who takes part in them.

    Args:
        rounds: Communication rounds, at least 1.
        participation: Fraction of the clients that take part in a round, in (0, 1]; drawn anew each round.
        dropout: Probability, in [0, 1), that a participant's update is lost on its way (a simulated fault).
        quorum: How many accepted updates a round needs; with fewer the server keeps its state, and says so.
        max_update_norm: Updates farther than this (2-norm) from what was sent are refused; null sets no bound.
    """

    rounds: int = 5
    participation: float = 1.0
    dropout: float = 0.0
    quorum: int = 1
    max_update_norm: float | None = None

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise UserError(f"rounds is {self.rounds}, and must be at least 1")
        if not 0 < self.participation <= 1:
            raise UserError(f"participation is {self.participation}, and must be in (0, 1]")
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout is {self.dropout}, and must be in [0, 1)")
        if self.quorum < 1:
            raise UserError(f"quorum is {self.quorum}, and must be at least 1")
        if self.max_update_norm is not None and not 0 < self.max_update_norm < math.inf:
            raise UserError(f"max_update_norm is {self.max_update_norm}, and must be above 0, or null")
