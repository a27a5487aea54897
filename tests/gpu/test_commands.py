"""Commands on runs that were trained on a CUDA device."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from fedekd.benchmark import Block, cells
from fedekd.benchmark.worker import run_cell
from fedekd.cli import main

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("method", ["SafeKD", "FedeKD"])
def test_commands_on_a_run(
    method: str,
    accelerator: str,
    write_blobs: Callable[..., Path],
    tmp_path: Path,
    undrawn: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    write_blobs(tmp_path / "blobs.npz", num_samples=600)
    with np.load("blobs.npz") as file:
        images = file["test_images"]
    np.savez("images.npz", images=images)
    fit = [
        *("fit", "--client.local_epochs=1", f"--trainer.accelerator={accelerator}", "--trainer.threads=1"),
        *("--logger=null", "--quiet", "--data.dataset=blobs.npz", "--data.num_clients=2", "--data.alpha=50"),
        *("--data.batch_size=16", "--rounds=2", "--output=run", "--client.optimizer.lr=0.002"),
        *(f"--method={method}", "--client.exits=2"),
    ]
    assert main(fit) == 0, capsys.readouterr().err
    assert main(["calibrate", "run", "--target_risk=0.3", "--confidence=0.7"]) == 0, capsys.readouterr().err
    assert main(["predict", "run", "--client=1", "--input=images.npz", "--output=out.csv"]) == 0
    with Path("out.csv").open(newline="") as table:
        rows = list(csv.DictReader(table))
    assert [int(row["image"]) for row in rows] == list(range(len(images)))
    assert {row["exit"] for row in rows} <= {"1", "2"}
    assert main(["test", "run"]) == 0
    assert main(["export", "run", "--client=1", "--format=torch", "--output=exported"]) == 0, capsys.readouterr().err
    program = torch.export.load("exported/model.pt2")
    assert {tensor.device.type for tensor in program.state_dict.values()} == {"cpu"}
    capsys.readouterr()


def test_result_row_names_device_and_precision(accelerator: str, tmp_path: Path, undrawn: None) -> None:
    block = Block(["digits"], [0.5], [0], {"FedeKD": {"class_path": "FedeKD"}}, {"rounds": 1, "client.local_epochs": 1})
    (cell,) = cells([block])
    trainer = {"accelerator": accelerator, "precision": "bf16-mixed", "threads": 1}
    row = run_cell(cell, tmp_path / "run", trainer, tmp_path / "local", "0123456789ab")
    device = torch.cuda.get_device_name() if accelerator == "cuda" else "cpu"
    assert (row["device"], row["precision"], row["commit"]) == (device, "bf16-mixed", "0123456789ab")
    assert row["torch"] == torch.__version__.partition("+")[0] or row["torch"] == torch.__version__
