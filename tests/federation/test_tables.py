"""Runs on tables: the same numbers from CSV and Parquet, and sites that do not fit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from fedekd.cli import main
from fedekd.data.sources import SOURCES

HEART = Path(str(SOURCES["heart_disease"].load))
OPTIONS = [
    *("--config=heart_disease.yaml", "--logger=null", "--quiet", "--rounds=1", "--trainer.loop=lean"),
    *("--data.batch_size=64", "--client.local_epochs=1"),
]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undrawn: None) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_sites(suffix: str, change: Callable[[pd.DataFrame], pd.DataFrame] = lambda table: table) -> str:
    """Write one file per hospital, the last one changed, and return the folder."""
    folder = Path(f"sites{suffix}")
    folder.mkdir()
    table = pd.read_csv(HEART)
    for name in ("cleveland", "hungarian"):
        part = table[table["site"] == name].drop(columns="site")
        part = change(part) if name == "hungarian" else part
        write = part.to_csv if suffix == ".csv" else part.to_parquet
        write(folder / f"{name}{suffix}", index=False)
    return str(folder)


def test_fit_csv_and_parquet_give_the_same_bytes() -> None:
    pytest.importorskip("pyarrow")
    table = pd.read_csv(HEART)
    table.to_parquet("heart.parquet", index=False)
    table.to_csv("heart.csv", index=False)
    for name in ("heart.csv", "heart.parquet", "heart_disease"):
        run = f"run-{name}"
        assert main(["fit", *OPTIONS, f"--data.dataset={name}", f"--output={run}", f"--baseline_dir={run}/local"]) == 0
    metrics = {Path(f"run-{name}/metrics.csv").read_bytes() for name in ("heart.csv", "heart.parquet", "heart_disease")}
    assert len(metrics) == 1


def test_fit_sites_of_csv_and_parquet_give_the_same_bytes() -> None:
    pytest.importorskip("pyarrow")
    for suffix in (".csv", ".parquet"):
        folder = write_sites(suffix)
        data = ["--data.dataset=null", "--data.site_column=null", f"--data.sites={folder}"]
        assert main(["fit", *OPTIONS, *data, f"--output=run{suffix}", f"--baseline_dir=local{suffix}"]) == 0
    assert Path("run.csv/metrics.csv").read_bytes() == Path("run.parquet/metrics.csv").read_bytes()


def test_fit_columns_of_a_site_in_another_order_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_sites(".csv", lambda table: table.iloc[:, ::-1])
    assert main(["fit", *OPTIONS, "--data.dataset=null", "--data.site_column=null", f"--data.sites={folder}"]) == 2
    text = capsys.readouterr().err
    assert text.startswith(
        "error: data.sites: site 'hungarian': expected the columns in the order of site 'cleveland', 'age'"
    )
    assert text.count("\n") == 1
