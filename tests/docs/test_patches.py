"""The patches of the how-to pages, applied to a copy of the package and run."""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from documents import DOCS, ROOT

RUN = "import sys; from fedekd.cli import main; sys.exit(main())"
#: By patch: options that use what it adds, and a column that the metrics must then have.
USES = {
    "method": (["--method", "FedAvgM", "--method.momentum", "0.5"], "accuracy/mean"),
    "partition": (["--data.partition", "shards"], "accuracy/mean"),
    "data_format": (["--data.dataset", "images.npy"], "accuracy/mean"),
    "metric": (["--task", "regression", "--metrics", "[medae]"], "medae/mean"),
}


def test_every_patch_is_used() -> None:
    assert {path.stem for path in (DOCS / "how-to" / "patches").glob("*.patch")} == set(USES)


@pytest.mark.slow
@pytest.mark.parametrize("patch", USES)
def test_patch_runs_on_digits(patch: str, tmp_path: Path) -> None:
    for folder in ("fedekd", "configs"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run(["git", "init", "--quiet"], cwd=tmp_path, check=True)
    subprocess.run(["git", "apply", str(DOCS / "how-to" / "patches" / f"{patch}.patch")], cwd=tmp_path, check=True)
    _write_npy(tmp_path)
    options, column = USES[patch]
    small = ["--rounds=1", "--client.local_epochs=1", "--data.num_clients=2", "--logger=null", "--output=run"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", RUN, "fit", "--config", "digits.yaml", *small, *options]
    subprocess.run(command, cwd=tmp_path, check=True, env=environment)
    with (tmp_path / "run" / "metrics.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert 0 <= float(row[column]) < 5


def _write_npy(folder: Path) -> None:
    """Write 300 of the digits as a pair of .npy files."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    np.save(folder / "images.npy", np.rint(digits.images[:300] * 255 / 16).astype(np.uint8))
    np.save(folder / "images.labels.npy", digits.target[:300])
