"""Runs whose clients are named sites: what the commands print and write of the names."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
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


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="session")
def site_run(tmp_path_factory: pytest.TempPathFactory, write_blobs: Callable[..., Path], fit_sites: FitSites) -> Path:
    """A finished run of three sites, with its figures; no test changes it."""
    folder = tmp_path_factory.mktemp("sites")
    sites = write_sites(folder / "hospitals", write_blobs)
    options = (f"--baseline_dir={folder}/local", f"--output={folder}/run", "--data.classes=[sick, well, 'a[b]']")
    assert fit_sites(sites, *options, "--quiet") == 0
    return folder / "run"


def test_fit_sites_names_columns_rows_and_no_partition(site_run: Path) -> None:
    [header] = read_rows(site_run / "metrics.csv")
    clients = list(dict.fromkeys(name.split("/")[0] for name in header if name.startswith("client_")))
    assert clients == [f"client_{name}" for name in NAMES]
    summary = json.loads((site_run / "summary.json").read_text())
    assert [(row["client"], row["name"]) for row in summary["clients"]] == list(enumerate(NAMES))
    assert summary["dataset"] == "hospitals"
    assert "alpha" not in summary
    config = yaml.safe_load((site_run / "config.yaml").read_text())["data"]
    assert not {"partition", "alpha", "num_clients", "min_samples"} & set(config)
    assert main(["test", str(site_run)]) == 0


def test_report_of_sites_shows_names_of_sites_and_classes(site_run: Path, tmp_path: Path) -> None:
    assert main(["report", str(site_run), f"--output={tmp_path}/report"]) == 0
    text = (tmp_path / "report/report.md").read_text(encoding="utf-8")
    assert "| site | classes |" in text
    assert "| Zürich (CH) no. 1 | sick, well, a[b] |" in text
    assert "| cleveland | sick, well |" in text
    assert "alpha" not in text
    assert "partition" not in text
    page = (tmp_path / "report/index.html").read_text(encoding="utf-8")
    assert ">Zürich (CH) no. 1<" in page
    rows = read_rows(tmp_path / "report/tables/run1-clients.csv")
    assert [row["site"] for row in rows] == NAMES


def test_fit_sites_warnings_name_the_site(
    site_run: Path, workdir: Path, fit_sites: FitSites, capsys: pytest.CaptureFixture[str]
) -> None:
    sites = site_run.parent / "hospitals"
    assert fit_sites(sites, "--output=run", "--update_loss_rate=0.9", "--seed=1") == 0
    output = capsys.readouterr()
    assert "update of site 'cleveland' was lost" in output.err
    assert not re.search(r"client \d", output.err)
    assert "│ cleveland " in output.out
    assert "│   site" in output.out or "┃ site " in output.out
    assert "alpha" not in output.out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--data.alpha=0.5"], "data.alpha: expected no value with data.sites"),
        (["--data.num_clients=2"], "data.num_clients: expected no value with data.sites"),
        (["--data.partition=iid"], "data.partition: expected no value with data.sites"),
        (["--data.min_samples=2"], "data.min_samples: expected no value with data.sites"),
        (["--do_no_harm=true", "--data.fractions=[0.8,0,0.2]"], "do_no_harm: site 'Long Beach' has no sample"),
    ],
)
def test_fit_sites_invalid_option_prints_one_line_error(
    options: list[str], words: str, site_run: Path, workdir: Path, fit_sites: FitSites, error_line: Callable[[], str]
) -> None:
    assert fit_sites(site_run.parent / "hospitals", "--output=run", *options) == 2
    assert words in error_line()
    assert not Path("run").exists()


def test_calibrate_and_predict_accept_the_name_of_a_site(
    workdir: Path,
    write_blobs: Callable[..., Path],
    fit_sites: FitSites,
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("sites").mkdir()
    names = ["1", "Zürich (CH) no. 1"]
    for seed, name in enumerate(names):
        write_blobs(Path("sites") / f"{name}.npz", 150, seed=seed)
    assert fit_sites("sites", "--output=run", "--method=SafeKD", "--client.exits=2") == 0
    capsys.readouterr()
    assert main(["calibrate", "run", "--target_risk=0.9", "--confidence=0.5", f"--client={names[1]}"]) == 0
    assert f"site '{names[1]}': target risk" in capsys.readouterr().out
    assert Path("run/exits/client-001.json").exists()
    assert main(["calibrate", "run", "--target_risk=0.9", "--confidence=0.5"]) == 0
    assert names[1] in capsys.readouterr().out
    assert main(["calibrate", "run", "--target_risk=0.9", "--confidence=0.5", "--client=1"]) == 0
    assert "site '1': target risk" in capsys.readouterr().out  # the name comes before the number
    rows = read_rows(Path("run/exits/clients.csv"))
    assert [(row["client"], row["site"]) for row in rows] == [("0", names[0]), ("1", names[1])]
    np.savez("images.npz", images=np.random.default_rng(0).integers(0, 256, (5, 8, 8), np.uint8))
    assert main(["predict", "run", "--input=images.npz", "--client=0", "--output=number.csv"]) == 0
    assert main(["predict", "run", "--input=images.npz", "--client=1", "--output=name.csv"]) == 0
    assert Path("number.csv").read_bytes() == Path("name.csv").read_bytes()
    assert main(["predict", "run", "--input=images.npz", f"--client={names[1]}"]) == 0
    capsys.readouterr()
    assert main(["predict", "run", "--input=images.npz", "--client=Basel"]) == 2
    assert f"--client: expected 0..1 or one of 1, {names[1]}, got 'Basel'" in capsys.readouterr().err
