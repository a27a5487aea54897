"""Runs whose clients are named sites: what the commands print and write of the names."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from fedekd.cli import main

from .conftest import OPTIONS

#: In the order of their numbers; upper case comes first.
NAMES = ["Long Beach", "Zürich (CH) no. 1", "cleveland"]

_SITE_OPTIONS = [option for option in OPTIONS if not option.startswith(("--data.num_clients", "--data.alpha"))]

FitSites = Callable[..., int]


@pytest.fixture(scope="session")
def fit_sites() -> FitSites:
    """Run `fit` on the sites of a folder and return the exit code."""

    def run(folder: Path | str, *options: str) -> int:
        return main(["fit", f"--data.sites={folder}", *_SITE_OPTIONS, "--rounds=1", "--baseline_dir=local", *options])

    return run


def write_sites(folder: Path, write_blobs: Callable[..., Path]) -> Path:
    """Write three sites of 40 images; the last lacks class 2."""
    folder.mkdir()
    for seed, name in enumerate(NAMES):
        write_blobs(folder / f"{name}.npz", 60, seed=seed, num_classes=2 if name == "cleveland" else 3)
    return folder


@pytest.fixture(scope="session")
def site_run(tmp_path_factory: pytest.TempPathFactory, write_blobs: Callable[..., Path], fit_sites: FitSites) -> Path:
    """A finished run of three sites, with its figures; no test changes it."""
    folder = tmp_path_factory.mktemp("sites")
    sites = write_sites(folder / "hospitals", write_blobs)
    options = (f"--baseline_dir={folder}/local", f"--output={folder}/run", "--data.classes=[sick, well, 'a[b]']")
    assert fit_sites(sites, *options, "--quiet") == 0
    return folder / "run"


def test_fit_sites_names_columns_rows_and_no_partition(site_run: Path) -> None:
    header = next(csv.reader((site_run / "metrics.csv").open(encoding="utf-8", newline="")))
    clients = list(dict.fromkeys(name.split("/")[0] for name in header if name.startswith("client_")))
    assert clients == [f"client_{name}" for name in NAMES]
    summary = json.loads((site_run / "summary.json").read_text())
    assert [(row["client"], row["name"]) for row in summary["clients"]] == list(enumerate(NAMES))
    assert summary["dataset"] == "hospitals"
    assert "alpha" not in summary
    config = yaml.safe_load((site_run / "config.yaml").read_text())["data"]
    assert not {"partition", "alpha", "num_clients", "min_samples"} & set(config)
    assert main(["test", str(site_run)]) == 0
