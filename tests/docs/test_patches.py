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
#: Runs that use what the patches add, and a column that the metrics must then have.
USES = {
    ("method", "partition", "data_format"): (
        [*("--method=FedAvgM", "--method.momentum=0.5", "--data.partition=shards", "--data.dataset=images.npy")],
        "accuracy/mean",
    ),
    ("metric",): (["--task=regression", "--metrics=[medae]"], "medae/mean"),
}


def test_every_patch_is_used() -> None:
    used = [name for names in USES for name in names]
    assert {path.stem for path in (DOCS / "how-to" / "patches").glob("*.patch")} == set(used)


@pytest.fixture(scope="module")
def patched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package with all patches."""
    folder = tmp_path_factory.mktemp("patched")
    for name in ("fedekd", "configs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run(["git", "init", "--quiet"], cwd=folder, check=True)
    for path in (DOCS / "how-to" / "patches").glob("*.patch"):
        subprocess.run(["git", "apply", str(path)], cwd=folder, check=True)
    _write_npy(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("patches", USES, ids=" ".join)
def test_patches_run_on_digits(patches: tuple[str, ...], patched: Path) -> None:
    options, column = USES[patches]
    run = "run_" + patches[0]
    small = ["--rounds=1", "--client.local_epochs=1", "--data.num_clients=2", "--logger=null", f"--output={run}"]
    environment = {**os.environ, "PYTHONPATH": str(patched), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", RUN, "fit", "--config", "digits.yaml", *small, *options]
    subprocess.run(command, cwd=patched, check=True, env=environment)
    with (patched / run / "metrics.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert 0 <= float(row[column]) < 5


def _write_npy(folder: Path) -> None:
    """Write 300 of the digits as a pair of .npy files."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    np.save(folder / "images.npy", np.rint(digits.images[:300] * 255 / 16).astype(np.uint8))
    np.save(folder / "images.labels.npy", digits.target[:300])
