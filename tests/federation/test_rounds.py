"""Options, participation and interrupts."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest

from fedekd.errors import UserError
from fedekd.federation import Interrupted, RoundOptions
from fedekd.federation.interrupts import Interrupts
from fedekd.federation.participation import lost_updates, participants


@pytest.mark.parametrize(
    "wrong",
    [
        {"rounds": 0},
        {"participation": 0.0},
        {"participation": 1.5},
        {"participation": float("nan")},
        {"dropout": 1.0},
        {"dropout": -0.1},
        {"quorum": 0},
        {"max_update_norm": 0.0},
        {"max_update_norm": float("inf")},
    ],
)
def test_a_value_out_of_range_is_named(wrong: dict[str, Any]) -> None:
    [(name, value)] = wrong.items()
    with pytest.raises(UserError, match=f"{name} is {value}"):
        RoundOptions(**wrong)


def test_participants_are_drawn_by_round_and_seed_and_all_come_at_the_end() -> None:
    options = RoundOptions(rounds=30, participation=0.25)
    drawn = [participants(options, 20, 7, round_idx) for round_idx in range(30)]
    assert all(len(set(each)) == 5 and each == sorted(each) for each in drawn)
    assert drawn == [participants(options, 20, 7, round_idx) for round_idx in range(30)]
    assert drawn != [participants(options, 20, 8, round_idx) for round_idx in range(30)]
    assert set().union(*drawn) == set(range(20))
    assert participants(options, 20, 7, 30) == list(range(20))
    assert participants(RoundOptions(participation=0.01), 20, 0, 0).__len__() == 1


def test_lost_updates_come_at_the_given_rate() -> None:
    assert lost_updates(RoundOptions(), 100, 0, 0) == set()
    options = RoundOptions(dropout=0.3)
    lost = sum(len(lost_updates(options, 100, 0, round_idx)) for round_idx in range(100))
    assert 2_800 < lost < 3_200  # 10,000 draws; five standard deviations are 229


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_interrupts_at_once_but_waits_behind_a_shield(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with Interrupts() as interrupts:
        with pytest.raises(Interrupted) as told:
            os.kill(os.getpid(), number)
        assert told.value.signal_number == number
        finished = False
        with pytest.raises(Interrupted), interrupts.shield():  # noqa: PT012 - the shield must let it end
            os.kill(os.getpid(), number)
            finished = True
        assert finished
    assert signal.getsignal(number) == before
