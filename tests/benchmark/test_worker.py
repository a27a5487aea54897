"""One cell of a grid in a worker: its row, its coverage, and what happens when it is repeated or was killed."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from fedekd.benchmark import Block, Cell, cells, worker
from fedekd.benchmark.provenance import code_digest, data_digest
from fedekd.benchmark.results import COVERAGE, Row
from fedekd.benchmark.worker import run_cell
from fedekd.early_exit.guarantee_coverage import CoverageOptions
from fedekd.federation import Orchestrator, RunFolder

METHOD = {"FedeKD": {"class_path": "FedeKD"}}
OPTIONS = CoverageOptions(target_risks=[0.1, 0.3], confidence=0.8, modes=["ltt", "empirical"], draws=5)
SMALL = {
    **{"client.exits": 3, "client.local_epochs": 3, "data.num_clients": 3, "data.batch_size": 32, "rounds": 1},
    "client.private_model": {"class_path": "fedekd.models.PrivateCNN", "init_args": {"width": 0.25}},
}
TRAINER = {"accelerator": "cpu", "precision": "32-true", "threads": 1}


def small_cell() -> Cell:
    return cells([Block(["digits"], [2.0], [1], METHOD, SMALL, coverage=OPTIONS)])[0]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Row, list[Any]]:
    """Return the folder of a finished cell, its row, and the arguments of its calibrations."""
    folder = tmp_path_factory.mktemp("finished")
    calls = []
    real = worker.federation_coverage

    def spy(*arguments: Any) -> Any:
        calls.append(arguments)
        return real(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFolder, "write_figures", lambda *arguments: None)
        patch.setattr(worker, "federation_coverage", spy)
        row = run_cell(small_cell(), folder / "runs", TRAINER, folder / "local", "abc")
    return folder, row, calls


def run_folder(folder: Path) -> Path:
    [only] = (folder / "runs").iterdir()
    return only


def fail(*arguments: Any) -> Any:
    raise AssertionError("called twice")


@pytest.mark.slow
def test_run_cell_with_coverage_keeps_it_and_no_checkpoints(finished: tuple[Path, Row, list[Any]]) -> None:
    folder, row, [(clients, options, seed)] = finished
    assert (len(clients), options, seed) == (3, OPTIONS, 1)
    kept = json.loads((run_folder(folder) / "coverage.json").read_text())["results"]
    assert json.loads(row[COVERAGE]) == kept
    assert [(entry["target_risk"], entry["mode"], entry["draws"]) for entry in kept] == [
        *((0.1, "ltt", 5), (0.1, "empirical", 5), (0.3, "ltt", 5), (0.3, "empirical", 5)),
    ]
    accuracies = [client["report"]["full_accuracy"] for client in kept[0]["clients"]]
    # Also in float32 and on the same images: the clients are those after the last round.
    summary = json.loads((run_folder(folder) / "summary.json").read_text())
    assert accuracies == pytest.approx([client["score"] for client in summary["clients"]], abs=1e-6)
    assert sum(client["violations"] for entry in kept for client in entry["clients"]) > 0
    assert (run_folder(folder) / "summary.json").is_file()
    assert not (run_folder(folder) / "checkpoints").exists()
    assert (row["key"], row["configuration"]) == (run_folder(folder).name, small_cell().configuration)
    assert row["code"] == code_digest(small_cell().values)
    assert row["data"] == data_digest(small_cell().values)


def test_run_cell_finished_is_not_repeated(
    finished: tuple[Path, Row, list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, row, _ = finished
    for name in ("run", "load_clients"):
        monkeypatch.setattr(Orchestrator, name, fail)
    monkeypatch.setattr(worker, "federation_coverage", fail)
    # The row states what made the run, not this call.
    again = run_cell(small_cell(), folder / "runs", TRAINER | {"precision": "bf16-mixed"}, folder / "local", "def")
    assert (row["precision"], row["commit"]) == ("32-true", "abc")
    assert {**again, "seconds": ""} == {**row, "seconds": ""}
    # A cell without coverage options gets no such column.
    plain = run_cell(replace(small_cell(), coverage=None), folder / "runs", TRAINER, folder / "local", "abc")
    assert {**plain, "seconds": "", COVERAGE: row[COVERAGE]} == {**row, "seconds": ""}
    assert COVERAGE not in plain


def test_run_cell_waits_for_another_grid_with_the_same_cell(finished: tuple[Path, Row, list[Any]]) -> None:
    folder, row, _ = finished
    arguments = small_cell(), folder / "runs", TRAINER, folder / "local", "abc"
    with ThreadPoolExecutor(1) as pool:
        with FileLock(run_folder(folder) / "cell.lock"):
            waiting = pool.submit(run_cell, *arguments)
            with pytest.raises(TimeoutError):
                waiting.result(timeout=1.0)
        assert waiting.result()["key"] == row["key"]


@pytest.mark.slow
def test_run_cell_killed_before_calibration_ends_with_the_same_row(
    finished: tuple[Path, Row, list[Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, row, _ = finished
    monkeypatch.setattr(RunFolder, "write_figures", lambda *arguments: None)
    real = worker.federation_coverage

    def kill(*arguments: Any) -> Any:
        real(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(worker, "federation_coverage", kill)
    with pytest.raises(KeyboardInterrupt):
        run_cell(small_cell(), tmp_path / "runs", TRAINER, folder / "local", "abc")
    assert (run_folder(tmp_path) / "summary.json").is_file()
    assert (run_folder(tmp_path) / "checkpoints").is_dir()
    assert not (run_folder(tmp_path) / "coverage.json").exists()
    monkeypatch.setattr(worker, "federation_coverage", real)
    monkeypatch.setattr(Orchestrator, "run", fail)
    late = run_cell(small_cell(), tmp_path / "runs", TRAINER, folder / "local", "abc")
    assert late[COVERAGE] == row[COVERAGE]
    assert {**late, "seconds": ""} == {**row, "seconds": ""}
    assert not (run_folder(tmp_path) / "checkpoints").exists()
