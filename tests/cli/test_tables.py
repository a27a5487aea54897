"""Commands on runs of tables."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from fedekd.cli import main
from fedekd.data.sources import SOURCES
from fedekd.federation import RunFolder

HEART = Path(str(SOURCES["heart_disease"].load))
FAST = [
    *("--config=heart_disease.yaml", "--logger=null", "--quiet", "--rounds=1", "--trainer.loop=lean"),
    *("--data.batch_size=64", "--data.download=false"),
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Finished runs: `exits` with three exits, and `age` with real-valued targets."""
    folder = tmp_path_factory.mktemp("tables")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(RunFolder, "write_figures", lambda *arguments: None)
        exits = ["--method=SafeKD", "--client.private_model.hidden=[8,8,4]"]
        assert main(["fit", *FAST, *exits, "--output=exits"]) == 0
        age = ["--task=regression", "--metrics=[rmse]", "--data.target_column=age", "--client.local_epochs=5"]
        assert main(["fit", *FAST, *age, "--method=Local", "--client.exits=2", "--output=age"]) == 0
        pd.read_csv(HEART).head(60).drop(columns=["disease", "site"]).iloc[:, ::-1].to_csv("new.csv", index=False)
    return folder


@pytest.fixture
def here(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(runs, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def rows() -> list[dict[str, str]]:
    with Path("predictions.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_predict_table_without_targets_in_any_order_of_columns(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(Path.cwd()))
    assert main(["predict", "exits", "--input", "~/new.csv", "--client", "0"]) == 0
    assert list(rows()[0]) == ["row", "label", "class", "exit", "score"]
    assert [row["row"] for row in rows()] == [str(number) for number in range(1, 61)]
    written = Path("predictions.csv").read_bytes()
    assert main(["predict", "exits", "--input", str(HEART), "--client", "0"]) == 0
    assert Path("predictions.csv").read_bytes().startswith(written)


def test_predict_real_targets_are_in_their_unit(here: Path) -> None:
    table = pd.read_csv(HEART).drop(columns="age")
    table.to_csv("new.csv", index=False)
    assert main(["predict", "age", "--input", "new.csv", "--client", "0"]) == 0
    values = [float(row["value"]) for row in rows()]
    assert 45 < sum(values) / len(values) < 65


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda table: table.drop(columns="chol"), ["new.csv", "chol"]),
        (lambda table: table.assign(chol=["high", *[None] * 59]), ["new.csv", "'chol'", "'high'", "row 1"]),
        (lambda table: table.assign(cp=9), ["new.csv", "'cp'", "'9'", "row 1"]),
    ],
)
def test_predict_invalid_table_is_one_line_with_column_and_row(
    change: Callable[[pd.DataFrame], pd.DataFrame],
    words: list[str],
    here: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    change(pd.read_csv("new.csv")).to_csv("new.csv", index=False)
    assert main(["predict", "exits", "--input", "new.csv", "--client", "0"]) == 2
    text = capsys.readouterr().err
    assert text.startswith("error: --input: ")
    assert text.count("\n") == 1
    assert all(word in text for word in words)


def test_calibrate_and_report_run_on_a_table(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["calibrate", "exits", "--target_risk", "0.4", "--confidence", "0.6"]) == 0
    assert Path("exits/exits/client-003.json").is_file()
    assert main(["report", "exits", "--client", "0", "--draws", "2", "--output", "page"]) == 0
    assert main(["test", "exits"]) == 0
    assert main(["test", "age"]) == 0
    assert "error" not in capsys.readouterr().err


def test_report_regression_with_exits_has_no_part_on_error_rates(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", "age", "--output", "page"]) == 0
    assert "error rate" not in capsys.readouterr().out
    assert main(["report", "age", "--exits=true", "--output", "page"]) == 2
    assert "expected a classification run" in capsys.readouterr().err


def test_fit_real_targets_write_figures_without_a_partition_by_class(here: Path) -> None:
    options = [
        *FAST,
        "--task=regression",
        "--metrics=[rmse]",
        "--data.target_column=age",
        "--method=Local",
        "--output=drawn",
    ]
    assert main(["fit", *options]) == 0
    assert Path("drawn/figures/delta_per_client.png").is_file()
    assert not Path("drawn/figures/partition.png").exists()
