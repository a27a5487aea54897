"""Cached local baselines are verified when they are read."""

from __future__ import annotations

import os
from pathlib import Path

from fedekd.atomic import unseal
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
    path.write_bytes(pack({**content, "metrics": [{"accuracy": 2.0}]}))  # without a checksum, as of an older version
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
