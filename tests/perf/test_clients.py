"""Engines side by side: what is timed, what is compared, and what is said where something is missing."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

from perf import clients
from perf.clients import Clock, main


def test_whole_rounds_are_timed_by_their_checkpoints(tmp_path: Path) -> None:
    """Of rounds 0 to 3 the first absorbs nothing and the last uploads nothing; a manifest is named by what follows."""
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    (tmp_path / "sites/site-001/local").mkdir(parents=True)
    clock = Clock(tmp_path)
    clock.look()
    assert not clock.first_trained
    trained = tmp_path / "sites/site-001/local/reference.pt"
    trained.touch()
    os.utime(trained, (50, 50))
    for number, time in enumerate((100, 110, 125, 126), start=1):
        manifest = tmp_path / f"run/checkpoints/manifest-{number:04d}.json"
        manifest.touch()
        os.utime(manifest, (time, time))
        clock.look()
        manifest.unlink()  # as old ones are
    assert clock.rounds(3) == [10, 15]
    assert clock.first_trained == 50


def test_without_the_extras_it_says_how_to_get_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(clients, "find_spec", lambda name: None)
    assert main([]) == 2
    assert capsys.readouterr().err == "error: Ray and Flower are not both installed: make extras\n"


@pytest.mark.parametrize("wrong", ["--engines=Ray,Rai", "--rounds=1", "--clients=0", "--processes=0"])
def test_what_cannot_be_measured_is_said(wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([wrong])
    assert wrong.rpartition("=")[0] in capsys.readouterr().err


@pytest.mark.ray
@pytest.mark.flower
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(not all(map(importlib.util.find_spec, ("ray", "flwr"))), reason="needs Ray and Flower")
def test_all_engines_come_to_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--clients=6", "--rounds=2", "--options=--client.local_epochs 1"]) == 0
    told = capsys.readouterr().out
    for name in clients.ENGINES.values():
        assert f"| {name.format(2)} | " in told
    assert "Every figure of every round is the same.\nThe last proxy is the same, bit for bit." in told
