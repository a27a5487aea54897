"""Real processes on this machine, with TLS and keys: what is lost is survived, and who is not trusted stays out."""

from __future__ import annotations

import csv
import time
from pathlib import Path

import pytest

pytest.importorskip("flwr")

from fedekd.flower.credentials import make_authority
from fedekd.flower.rehearsal import OPTIONS, Rehearsal, rehearsed

pytestmark = [pytest.mark.flower, pytest.mark.slow, pytest.mark.timeout(1500)]

#: Two sites, three rounds of one epoch.
CHOSEN = (*OPTIONS, "--rounds=3", "--data.num_clients=2", "--data.num_classes=10", "--logger=null")


def until(what: Path, seconds: float = 600) -> None:
    end = time.monotonic() + seconds
    while not what.exists():
        assert time.monotonic() < end, f"{what} is not there after {seconds:g} s"
        time.sleep(0.5)


def stranger(rehearsal: Rehearsal) -> str:
    """What the SuperNode of a site that trusts another authority says, while the server is there."""
    keys = rehearsal.folder / "credentials"
    make_authority(keys, "other")
    own = ["--superlink", rehearsal.address, "--root-certificates", str(keys / "other.pem"), "--max-retries", "2"]
    rehearsal._launch("stranger", ["flower-supernode", *own, "--auth-supernode-private-key", str(keys / "site-0")])
    rehearsal.processes["stranger"].wait(120)
    return (rehearsal.folder / "stranger.log").read_text()


def test_a_site_that_is_killed_is_missing_and_comes_back(tmp_path: Path) -> None:
    with rehearsed(tmp_path, CHOSEN, 2) as rehearsal:
        run = rehearsal.submit(CHOSEN, timeout=120.0)
        assert "certificate" in stranger(rehearsal).lower()
        until(tmp_path / "server/checkpoints/manifest-0001.json")
        rehearsal.processes["site-1"].kill()  # in the visit of round 1
        rehearsal.processes["site-1"].wait()
        until(tmp_path / "server/checkpoints/manifest-0002.json")
        rehearsal.start_site(1)
        summary = rehearsal.wait(run, 900)
    told = " ".join((tmp_path / "server.log").read_text().split())
    assert "no usable answer from the sites 1; they are missing from this round" in told
    assert [client["client"] for client in summary["clients"]] == [0, 1]
    with (tmp_path / "server/metrics.csv").open(newline="") as file:
        updates = [row["comm/updates"] for row in csv.DictReader(file)]
    assert len(updates) == 3
    assert "1" in updates  # the round that counted without it
