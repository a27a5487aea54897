"""Comparison of engines: times, equality checks, and errors."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

from perf import clients
from perf.clients import Clock, main


def test_clock_times_rounds_by_their_checkpoints(tmp_path: Path) -> None:
    """Rounds 0 and 3 are not counted; a manifest is named by the next round."""
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
        manifest.unlink()  # old manifests are removed
    assert clock.rounds(3) == [10, 15]
    assert clock.first_trained == 50


def test_main_without_extras_prints_how_to_install_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(clients, "find_spec", lambda name: None)
    assert main([]) == 2
    assert capsys.readouterr().err == "error: Ray and Flower are not installed. Run: make extras\n"


@pytest.mark.parametrize("wrong", ["--engines=Ray,Rai", "--rounds=1", "--clients=0", "--processes=0"])
def test_main_invalid_option_names_it(wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([wrong])
    assert wrong.rpartition("=")[0] in capsys.readouterr().err


@pytest.mark.ray
@pytest.mark.flower
@pytest.mark.slow
@pytest.mark.skipif(not all(map(importlib.util.find_spec, ("ray", "flwr"))), reason="needs Ray and Flower")
def test_main_all_engines_have_equal_results(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--clients=6", "--rounds=2", "--options=--client.local_epochs 1"]) == 0
    output = capsys.readouterr().out
    for name in clients.ENGINES.values():
        assert f"| {name.format(2)} | " in output
    assert "Every figure of every round is the same.\nThe last proxy is the same, bit for bit." in output
