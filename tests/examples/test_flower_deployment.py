"""The Flower example: real processes on this machine, with TLS and keys."""

from __future__ import annotations

import csv
import time
from pathlib import Path

import pytest

pytest.importorskip("flwr")

from examples.flower_deployment.credentials import make_authority
from examples.flower_deployment.deployment import LocalDeployment, running_deployment
from examples.flower_deployment.rehearsal import OPTIONS, main, report

pytestmark = pytest.mark.flower

#: Two sites, three rounds of one epoch.
TWO_SITES = (*OPTIONS, "--rounds=3", "--data.num_clients=2", "--data.num_classes=10", "--logger=null")


def wait_for(path: Path, seconds: float = 600) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"{path} does not exist after {seconds:g} s"
        time.sleep(0.5)


def log_of_untrusting_node(deployment: LocalDeployment) -> str:
    """The log of a SuperNode that trusts another authority."""
    keys = deployment.folder / "credentials"
    make_authority(keys, "other")
    options = ["--superlink", deployment.address, "--root-certificates", str(keys / "other.pem"), "--max-retries", "2"]
    deployment.launch("other", ["flower-supernode", *options, "--auth-supernode-private-key", str(keys / "site-0")])
    deployment.processes["other"].wait(120)
    return (deployment.folder / "other.log").read_text()


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_deployment_killed_site_is_missing_and_returns(tmp_path: Path) -> None:
    with running_deployment(tmp_path, TWO_SITES, 2) as deployment:
        run_id = deployment.submit(TWO_SITES, timeout=120.0)
        assert "certificate" in log_of_untrusting_node(deployment).lower()
        wait_for(tmp_path / "server/checkpoints/manifest-0001.json")
        deployment.processes["site-1"].kill()  # during round 1
        deployment.processes["site-1"].wait()
        wait_for(tmp_path / "server/checkpoints/manifest-0002.json")
        deployment.start_site(1)
        summary = deployment.wait(run_id, 900)
    log = " ".join((tmp_path / "server.log").read_text().split())
    assert "no valid reply from site 1; left out of this round" in log
    assert [client["client"] for client in summary["clients"]] == [0, 1]
    with (tmp_path / "server/metrics.csv").open(newline="") as file:
        updates = [row["comm/updates"] for row in csv.DictReader(file)]
    assert len(updates) == 3
    assert "1" in updates  # the round without site 1 counts


def test_rehearsal_invalid_option_prints_one_line_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "sites"
    assert main([f"--folder={folder}", "--secure=true", "--sites=2"]) == 2
    assert capsys.readouterr().err.startswith("error: secure: expected 3 to 1023 sites per round, got 2.")
    assert not folder.exists()
    assert main([f"--folder={tmp_path}"]) == 2
    assert capsys.readouterr().err.startswith(f"error: --folder: expected a new folder, got {tmp_path}.")


def test_report_different_runs_return_exit_code_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.csv").write_text(name)
    assert report(tmp_path / "one", tmp_path / "other") == 1
    assert capsys.readouterr().out == "metrics.csv: different\nfinal proxy: different\n"
