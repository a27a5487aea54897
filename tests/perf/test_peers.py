"""`make bench-peers`: the contenders that need no other library."""

from __future__ import annotations

import json
import re

import pytest
import torch

from perf.peers import __main__ as peers
from perf.peers import workload
from perf.peers.workload import Clock


def test_clock_reports_rounds_after_the_first(capsys: pytest.CaptureFixture[str]) -> None:
    Clock([(5.0, 1.0), (6.0, 1.5), (9.0, 3.0)]).report([torch.tensor([3.0]), torch.tensor([[4.0]])])
    values = json.loads(capsys.readouterr().out)
    assert {name: values[name] for name in ("wall", "cpu", "start_up", "norm")} == {
        "wall": 2.0,
        "cpu": 1.0,
        "start_up": 1.0,
        "norm": 5.0,
    }
    assert peers.BATCH == workload.BATCH


@pytest.mark.slow
def test_contenders_train_equal_models_and_absent_ones_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """fluke and pfl-research are compared where they are installed: `make bench-peers`."""
    monkeypatch.setattr(peers, "SETTINGS", ((2, 9, 8),))
    monkeypatch.setattr("sys.argv", ["bench-peers", "--rounds", "3", "--repetitions", "1", "--peers", "nowhere/python"])
    peers.main()
    output = capsys.readouterr().out
    assert "fluke: left out, nowhere/python has no module fluke" in output
    rows = output.splitlines()[-3:]
    assert [row.split(" | ")[2] for row in rows] == ["bare loop", "fedekd", "fedekd, every round saved"]
    assert all(re.search(r"\| \d+\.\d \(\d+\.\d, \d+\.\d\) \| \d+\.\d\d \| \d+\.\d \|", row) for row in rows)


def test_another_model_ends_the_comparison() -> None:
    peers.require_equal_models({"bare loop": 10.0, "fedekd": 10.00001})
    with pytest.raises(SystemExit, match=r"fluke: expected a global model of the norm 10\.000000, .*, got 10\.010000"):
        peers.require_equal_models({"bare loop": 10.0, "fluke": 10.01})


@pytest.mark.parametrize(("option", "least"), [("--rounds=1", 2), ("--repetitions=0", 1), ("--clients=-1", 0)])
def test_number_out_of_range_is_named(
    option: str, least: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name, value = option.split("=")
    monkeypatch.setattr("sys.argv", ["bench-peers", option])
    with pytest.raises(SystemExit) as ended:
        peers.main()
    assert ended.value.code == 2
    assert f"{name}: expected at least {least}, got {value}" in capsys.readouterr().err
