"""Pretrained against random initial weights: rows of small runs, frozen bytes, and the table of the docs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from experiments.pretrained import __main__ as experiment
from fedekd.configuration.load_run import open_finished

FROZEN = "pretrained, first group frozen"


def test_main_measures_each_run_once_and_finds_changed_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedekd.federation.RunFolder.write_figures", lambda *arguments: None)
    results = tmp_path / "rows.csv"
    argv = ["--methods", "FedAvg", "--starts", experiment.RANDOM, FROZEN, "--seeds", "1", "--rounds", "1"]
    argv += ["--source", "digits", "--source_samples", "60", "--max_samples", "120"]
    argv += ["--output", str(tmp_path / "runs"), "--results", str(results)]
    experiment.main(argv)
    rows = pd.read_csv(results).set_index("start")
    # Stem and first group: 3 weights, 3 BatchNorms of 5 tensors; 6 clients and their local baselines.
    assert rows["frozen_tensors"].to_dict() == {experiment.RANDOM: 0, FROZEN: 12 * 18}
    assert rows["changed_frozen_tensors"].sum() == 0
    assert rows.loc[FROZEN, "bytes_up"] < rows.loc[experiment.RANDOM, "bytes_up"]

    def fail(*arguments: Any) -> int:
        raise AssertionError("trained again")

    monkeypatch.setattr("experiments.hospital_runs.fedekd", fail)
    before = results.read_bytes()
    experiment.main(argv)
    assert results.read_bytes() == before
    results.unlink()  # killed before the row was stored
    experiment.main(argv)
    assert results.read_bytes() == before

    arguments = experiment.parse(argv)
    [run] = [run for run in experiment.runs(arguments) if run.start == FROZEN]
    weights = experiment.pretrain(run, arguments)
    folder = experiment.train(run, weights, arguments)
    clients = open_finished("fit", folder, in_process=True)[0].load_clients()
    file = torch.load(weights, weights_only=True)
    assert experiment.frozen_tensors(clients, file) == (6 * 18, 0)
    name = next(name for name in file if name.startswith("stem.") and file[name].is_floating_point())
    file[name] = file[name].nextafter(file[name] + 1)
    assert experiment.frozen_tensors(clients, file) == (6 * 18, 6)


def test_table_pairs_gains_by_seed_and_starts_with_random_weights() -> None:
    shared = {"method": "FedAvg", "rounds": 10, "delta": 0.5, "bytes_up": 2e6}
    rows = [
        {**shared, "start": start, "seed": seed, "accuracy": seed / 10 + gain, "local_accuracy": 0.5}
        for start, gain in (("pretrained", 0.03), (experiment.RANDOM, 0.0))
        for seed in ((2, 1) if gain else (1, 2, 3))
    ]
    assert experiment.table(pd.DataFrame(rows)).splitlines()[2:] == [
        "| FedAvg | random | 0.2000 |  | 0.5000 |  | +0.5000 (0.0000) | 2.00 | 3 |",
        "| FedAvg | pretrained | 0.1800 | +0.0300 (0.0000) | 0.5000 | +0.0000 (0.0000) | +0.5000 (0.0000) | 2.00 | 2 |",
    ]


def test_page_has_the_table_of_the_results() -> None:
    results = pd.read_csv(experiment.RESULTS)
    page = (experiment.RESULTS.parents[2] / "docs" / "how-to" / "pretrained.md").read_text(encoding="utf-8")
    assert experiment.table(results) in page
    assert set(results["rounds"]) == {10}
    assert results["changed_frozen_tensors"].sum() == 0
    assert (results["frozen_tensors"] > 0).any()
