"""Options of the rounds, and the random draws that follow from them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from fedekd.errors import UserError, require_choice
from fedekd.federation.wire import WIRE_DTYPES
from fedekd.seeding import derive_seed


@dataclass(frozen=True)
class RoundOptions:
    """Number of rounds, participation, and acceptance of updates.

    Args:
        rounds: Communication rounds, 1 to 1,000,000.
        participation: Fraction of the clients per round, in (0, 1], drawn for each round.
        update_loss_rate: Probability in [0, 1) that an update is lost on the way to the server (simulated fault).
        quorum: Accepted updates that a round needs, at least 1; with fewer the server keeps its state and warns.
        max_update_norm: Largest accepted 2-norm of the difference between update and message; null sets no bound, and
            only updates out of proportion to the others of their round are rejected.
        wire_dtype: Floating-point type in which messages travel, in both directions: float32 (dtypes of the models) or
            float16 (half the bytes; relative rounding error of at most 2^-11).
        select_round: Round whose model each client deploys after the last one: last, or best, the round in which the
            client's tuning split has the best primary metric (the latest of equal ones).
        checkpoint_every: Minimum number of seconds between checkpoints, at least 0. After a kill, Ctrl-C or error, the
            running round and the rounds since the last checkpoint are lost. The first round of a process and the last
            round are always saved; 0 saves every round. Does not change results.

    Raises:
        UserError: If an option is out of range.
    """

    rounds: int = 5
    participation: float = 1.0
    update_loss_rate: float = 0.0
    quorum: int = 1
    max_update_norm: float | None = None
    wire_dtype: str = "float32"
    select_round: str = "last"
    checkpoint_every: float = 10.0

    def __post_init__(self) -> None:
        norm = self.max_update_norm
        expected = {
            # The participants of all rounds are drawn before training.
            "rounds": ("1 to 1,000,000", 1 <= self.rounds <= 1_000_000),
            "participation": ("a fraction in (0, 1]", 0 < self.participation <= 1),
            "update_loss_rate": ("a probability in [0, 1)", 0 <= self.update_loss_rate < 1),
            "quorum": ("at least 1", self.quorum >= 1),
            "max_update_norm": ("a finite number above 0, or null", norm is None or 0 < norm < math.inf),
            "checkpoint_every": ("a finite number of at least 0", 0 <= self.checkpoint_every < math.inf),
        }
        for name, (allowed, is_valid) in expected.items():
            if not is_valid:
                raise UserError(f"{name}: expected {allowed}, got {getattr(self, name)}.")
        require_choice("wire_dtype", self.wire_dtype, WIRE_DTYPES)
        require_choice("select_round", self.select_round, ("last", "best"))

    def is_save_due(self, seconds: float) -> bool:
        """Return whether a round is saved.

        Args:
            seconds: Time since the last save.
        """
        return seconds >= self.checkpoint_every


@dataclass(frozen=True)
class BaselineOptions:
    """References of a run in addition to the local baseline.

    Args:
        control: Train the compute-matched local control of each client, which runs the method without the other
            clients: the surplus over it is what the federation adds. null trains it for methods that serve more than
            the private model. It takes as long as the method itself, and is kept for later runs.
        tune: Also compare with local training whose learning rate and epochs are chosen on the tuning split.
        learning_rates: Learning rates to choose from, at least one, each above 0. Default: 1e-4, 3e-4, 1e-3, 3e-3.
        epochs: Largest number of epochs to choose from, at least client.local_epochs; null is twice the epochs of the
            run.

    Raises:
        UserError: If an option is out of range.
    """

    control: bool | None = None
    tune: bool = False
    learning_rates: Sequence[float] = field(default_factory=lambda: [1e-4, 3e-4, 1e-3, 3e-3])
    epochs: int | None = None

    def __post_init__(self) -> None:
        rates = self.learning_rates
        if not len(rates) or not all(0 < rate < math.inf for rate in rates):
            raise UserError(f"baseline.learning_rates: expected finite numbers above 0, got {[*rates]}.")
        if self.epochs is not None and self.epochs < 1:
            raise UserError(f"baseline.epochs: expected at least 1, or null, got {self.epochs}.")


def participants(options: RoundOptions, num_clients: int, seed: int, round_idx: int) -> list[int]:
    """Draw the clients of a round, ascending; all clients in the last round.

    Example:
        >>> participants(RoundOptions(rounds=5, participation=0.5), 6, seed=0, round_idx=5)
        [0, 1, 2, 3, 4, 5]
        >>> len(participants(RoundOptions(rounds=5, participation=0.5), 6, seed=0, round_idx=1))
        3
    """
    clients = list(range(num_clients))
    if round_idx == options.rounds or options.participation == 1:
        return clients
    # Halves are rounded up: Python's round would give 2 of 2.5 clients and 4 of 3.5.
    size = max(1, int(np.floor(options.participation * num_clients + 0.5)))
    rng = np.random.default_rng(derive_seed(seed, round_idx, "participation"))
    return sorted(rng.choice(num_clients, size=size, replace=False).tolist())


def lost_updates(options: RoundOptions, num_clients: int, seed: int, round_idx: int) -> set[int]:
    """Draw the clients whose update is lost in a round.

    All clients are drawn, so that the result does not depend on the participants.
    """
    # "dropout" is the earlier name of the option: another text would draw other clients than in the stored results.
    rng = np.random.default_rng(derive_seed(seed, round_idx, "dropout"))
    return {client for client, lost in enumerate(rng.random(num_clients) < options.update_loss_rate) if lost}
