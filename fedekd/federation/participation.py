"""Who takes part in a round, and whose update is lost: drawn from (seed, round) alone."""

from __future__ import annotations

import numpy as np

from fedekd.federation.options import RoundOptions
from fedekd.seeding import derive_seed


def participants(options: RoundOptions, num_clients: int, seed: int, round_idx: int) -> list[int]:
    """The clients of a round, in ascending order; all of them once the last aggregate is absorbed.

    Example:
        >>> participants(RoundOptions(rounds=5, participation=0.5), 6, seed=0, round_idx=5)
        [0, 1, 2, 3, 4, 5]
        >>> len(participants(RoundOptions(rounds=5, participation=0.5), 6, seed=0, round_idx=1))
        3
    """
    everyone = list(range(num_clients))
    if round_idx == options.rounds or options.participation == 1:
        return everyone
    chosen = max(1, round_half_up(options.participation * num_clients))
    rng = np.random.default_rng(derive_seed(seed, round_idx, "participation"))
    return sorted(rng.choice(num_clients, size=chosen, replace=False).tolist())


def lost_updates(options: RoundOptions, num_clients: int, seed: int, round_idx: int) -> set[int]:
    """The clients whose update would be lost in a round, by the simulated fault rate.

    Drawn for all clients, so that it does not depend on who takes part.
    """
    rng = np.random.default_rng(derive_seed(seed, round_idx, "dropout"))
    return {client for client, lost in enumerate(rng.random(num_clients) < options.dropout) if lost}


def round_half_up(value: float) -> int:
    """The nearest integer, halves upwards (Python's own rounding would send 2.5 clients to 2 and 3.5 to 4)."""
    return int(np.floor(value + 0.5))
