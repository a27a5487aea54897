"""Cached local baselines are verified when they are read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from fedekd.atomic import unseal
from fedekd.federation import local_baseline
from fedekd.federation.checkpoint import pack, unpack
from fedekd.methods import Local

from .conftest import Federate


def test_damaged_baseline_is_trained_again(federate: Federate, tmp_path: Path) -> None:
    def scores() -> list[float]:
        run = federate(Local(), baseline_dir=tmp_path / "local")
        return run.engine.local_baselines({0: 1})[0].scores

    expected = scores()
    [path] = (tmp_path / "local").iterdir()
    whole = path.read_bytes()
    content = unpack(unseal(whole))
    path.write_bytes(pack({**content, "metrics": [{"accuracy": 2.0}]}))  # without a checksum
    assert scores() == expected
    assert path.read_bytes() == whole
    for place in range(0, len(whole), len(whole) // 6):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :])
        assert scores() == expected
        assert path.read_bytes() == whole


def test_old_draft_of_a_baseline_is_removed_and_a_new_one_is_kept(federate: Federate, tmp_path: Path) -> None:
    old, new = tmp_path / ".a.pt.1-2.tmp", tmp_path / ".b.pt.1-2.tmp"
    for draft in (old, new):
        draft.write_bytes(b"half")
    os.utime(old, (1e9, 1e9))
    federate(Local(), baseline_dir=tmp_path).engine.local_baselines({0: 1})
    assert not old.exists()
    assert new.exists()  # of another run that writes now


@pytest.mark.parametrize(("seconds", "trained_again"), [(0.0, 2), (1000.0, 3)])
def test_interrupted_baseline_repeats_rounds_since_the_last_write(
    federate: Federate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float, trained_again: int
) -> None:
    monkeypatch.setattr(local_baseline, "WRITE_SECONDS", seconds)
    client = federate(baseline_dir=tmp_path).engine._new_client
    expected = local_baseline.train_local_baseline(client(0), 3, None)
    receive, rounds = Local.receive, list[int]()

    def stop_in_round_2(self: Local, client: Any, message: Any, round_idx: int) -> Any:
        if rounds == [1]:
            raise KeyboardInterrupt
        rounds.append(round_idx)
        return receive(self, client, message, round_idx)

    monkeypatch.setattr(Local, "receive", stop_in_round_2)
    with pytest.raises(KeyboardInterrupt):
        local_baseline.train_local_baseline(client(0), 3, tmp_path)
    rounds.append(0)
    baseline = local_baseline.train_local_baseline(client(0), 3, tmp_path)
    assert len(rounds) == 2 + trained_again
    assert baseline.metrics == expected.metrics
