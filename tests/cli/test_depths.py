"""All commands on a run whose clients have networks of different depth, one with a single exit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from fedekd.cli import main
from fedekd.early_exit import ExitPolicy
from fedekd.models import PrivateCNN, multi_exit

FAST = ["--client.local_epochs=1", "--trainer.accelerator=cpu", "--trainer.threads=1", "--logger=null", "--quiet"]
DATA = ["--data.dataset=blobs.npz", "--data.num_clients=2", "--data.alpha=50", "--data.batch_size=16", "--rounds=1"]
METHOD = ["--method=DepthFL", "--client.private_model.width=0.25", "--client.optimizer.lr=0.01"]


@pytest.fixture
def here(write_blobs: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undrawn: None) -> Path:
    monkeypatch.chdir(tmp_path)
    write_blobs(tmp_path / "blobs.npz", num_samples=600)
    return tmp_path


def test_commands_accept_clients_of_different_depth(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", *FAST, *DATA, *METHOD, "--client.depths=[1, 3]", "--output=run"]) == 0
    summary = json.loads(Path("run/summary.json").read_text())
    assert [line["exit"] for line in summary["exits"]] == [1, 2, 3]
    assert main(["test", "run"]) == 0
    capsys.readouterr()
    assert main(["calibrate", "run", "--target_risk", "0.2", "--confidence", "0.8"]) == 0
    assert capsys.readouterr().err == ""
    single, other = (ExitPolicy.load(Path(f"run/exits/client-00{number}.json")) for number in (0, 1))
    assert (single.num_exits, other.num_exits) == (1, 3)
    assert single.thresholds == (float("-inf"),)
    assert single.exit_counts == (single.samples,)
    assert main(["predict", "run", "--client", "0", "--input", "blobs.npz", "--output", "images.csv"]) == 0
    lines = Path("images.csv").read_text().splitlines()
    assert {line.split(",")[2] for line in lines[1:]} == {"1"}
    capsys.readouterr()
    assert main(["report", "run", "--client", "0"]) == 2
    assert capsys.readouterr().err == "error: client 0: expected a network with at least 2 exits, got one with 1 exit\n"


@pytest.mark.parametrize("depths", ["three", "[1, 1.5]"])
def test_fit_invalid_depths_prints_allowed_types(depths: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", *FAST, *DATA, *METHOD, f"--client.depths={depths}", "--output=run"]) == 2
    expected = f"error: --client.depths: expected a whole number or a list or null, got '{depths}'\n"
    assert capsys.readouterr().err == expected


@pytest.mark.parametrize("first", ["PrivateCNN", "{class_path: fedekd.models.PrivateCNN}"])
def test_fit_clients_of_different_width(first: str, here: Path) -> None:
    Path("widths.yaml").write_text(
        f"method: ScaleFL\nclient:\n  exits: 3\n  private_models:\n  - {first}\n"
        "  - {class_path: fedekd.models.PrivateCNN, init_args: {width: 0.125}}\n"
    )
    assert main(["fit", "--config=widths.yaml", *FAST, *DATA, "--output=run"]) == 0
    assert main(["test", "run"]) == 0
    up = json.loads(Path("run/summary.json").read_text())["bytes_up"]
    sizes = [
        sum(parameter.numel() * 4 for parameter in multi_exit(PrivateCNN(1, 8, 3, width), 3, 3).parameters())
        for width in (1.0, 0.125)
    ]
    assert up == sum(sizes)
