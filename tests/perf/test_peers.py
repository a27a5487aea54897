"""`make bench-peers`: the table of the contenders that need no other library."""

from __future__ import annotations

import re

import pytest

from perf.peers import __main__ as peers
from perf.peers.workload import Clock


def test_clock_reports_rounds_after_the_first(capsys: pytest.CaptureFixture[str]) -> None:
    Clock([(5.0, 1.0), (6.0, 1.5), (9.0, 3.0)]).report()
    assert capsys.readouterr().out == '{"wall": 2.0, "cpu": 1.0}\n'


@pytest.mark.slow
def test_main_prints_a_row_per_contender(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    own = {name: row for name, row in peers.CONTENDERS.items() if not row[1]}
    monkeypatch.setattr(peers, "CONTENDERS", own)
    monkeypatch.setattr(peers, "SETTINGS", ((2, 9, 8),))
    monkeypatch.setattr("sys.argv", ["bench-peers", "--rounds", "3", "--repetitions", "1"])
    peers.main()
    rows = capsys.readouterr().out.splitlines()[-2:]
    assert [row.split(" | ")[2] for row in rows] == ["bare loop", "fedekd"]
    assert all(re.search(r"\| \d+\.\d \(\d+\.\d, \d+\.\d\) \| \d+\.\d\d \| \d+\.\d \|$", row) for row in rows)


def test_missing_peer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "SETTINGS", ((2, 9, 8),))
    monkeypatch.setattr("sys.argv", ["bench-peers", "--peers", "nowhere/python"])
    with pytest.raises(SystemExit, match="--peers: expected a Python with fluke and pfl, got 'nowhere/python'"):
        peers.main()
