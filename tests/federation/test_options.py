"""Round options, participation, lost updates, and signals."""

from __future__ import annotations

import os
import re
import signal
from typing import Any

import pytest

from fedekd.errors import UserError
from fedekd.federation import Interrupted, RoundOptions
from fedekd.federation.interrupts import Interrupts, block_signals
from fedekd.federation.options import lost_updates, participants


@pytest.mark.parametrize(
    "option",
    [
        {"rounds": 0},
        {"participation": 0.0},
        {"participation": 1.5},
        {"participation": float("nan")},
        {"update_loss_rate": 1.0},
        {"update_loss_rate": -0.1},
        {"quorum": 0},
        {"max_update_norm": 0.0},
        {"max_update_norm": float("inf")},
    ],
)
def test_round_options_value_out_of_range_raises_user_error(option: dict[str, Any]) -> None:
    [(name, value)] = option.items()
    with pytest.raises(UserError, match=rf"^{name}: expected .*, got {re.escape(str(value))}\.$"):
        RoundOptions(**option)


def test_participants_depend_on_round_and_seed_and_are_all_clients_at_the_end() -> None:
    options = RoundOptions(rounds=30, participation=0.25)
    drawn = [participants(options, 20, 7, round_idx) for round_idx in range(30)]
    assert all(len(set(numbers)) == 5 and numbers == sorted(numbers) for numbers in drawn)
    assert drawn == [participants(options, 20, 7, round_idx) for round_idx in range(30)]
    assert drawn != [participants(options, 20, 8, round_idx) for round_idx in range(30)]
    assert set().union(*drawn) == set(range(20))
    assert participants(options, 20, 7, 30) == list(range(20))
    assert len(participants(RoundOptions(participation=0.01), 20, 0, 0)) == 1


def test_lost_updates_frequency_equals_the_rate() -> None:
    assert lost_updates(RoundOptions(), 100, 0, 0) == set()
    options = RoundOptions(update_loss_rate=0.3)
    lost = sum(len(lost_updates(options, 100, 0, round_idx)) for round_idx in range(100))
    assert 2_800 < lost < 3_200  # 10,000 draws; five standard deviations are 229


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupts_signal_raises_at_once_or_after_the_deferring_block(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with Interrupts():
        with pytest.raises(Interrupted) as error:
            os.kill(os.getpid(), number)
        assert error.value.signal_number == number
        finished = []
        with pytest.raises(Interrupted), block_signals(), block_signals():  # noqa: PT012 - nested, as in the pool
            os.kill(os.getpid(), number)
            finished.append("blocked")
        assert finished == ["blocked"]
    assert signal.getsignal(number) == before
