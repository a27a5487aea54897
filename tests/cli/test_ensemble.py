"""Commands on a run whose clients serve an ensemble with exits."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from fedekd.cli import main
from fedekd.data import FederatedDataModule

OPTIONS = [
    *("--method=ProxyEnsemble", "--method.proxy_epochs=1", "--method.finetune_epochs=1", "--rounds=1"),
    *("--client.local_epochs=1", "--client.exits=2", "--client.optimizer.lr=1e-3", "--baseline.control=false"),
    *("--data.num_clients=2", "--data.alpha=10", "--logger=null", "--quiet", "--trainer.threads=1"),
]


def test_predict_calibrate_and_test_use_the_ensemble(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, images = tmp_path / "run", tmp_path / "images.npz"
    local = f"--baseline_dir={tmp_path / 'local'}"
    assert main(["fit", "--config", "digits.yaml", *OPTIONS, local, f"--output={run}"]) == 0
    summary = json.loads((run / "summary.json").read_text())
    weights = [summary["serving"][f"weight_{name}"] for name in ("private", "proxy", "tuned")]
    assert sum(weights) > 0.5
    assert summary["serving"]["flops"] > summary["serving"]["private_flops"]
    assert main(["test", str(run)]) == 0
    assert main(["calibrate", str(run), "--target_risk=0.5", "--confidence=0.5"]) == 0
    pixels = FederatedDataModule("digits").samples.inputs[:20].numpy().transpose(0, 2, 3, 1)
    np.savez(images, images=pixels)
    output = tmp_path / "predictions.csv"
    capsys.readouterr()
    assert main(["predict", str(run), "--client=1", f"--input={images}", f"--output={output}"]) == 0
    printed = capsys.readouterr().out
    assert "ensemble of private, proxy, tuned: " in printed
    assert "times the FLOPs of the private model" in printed
    with output.open() as file:
        assert len(list(csv.DictReader(file))) == 20
