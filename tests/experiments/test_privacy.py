"""The membership experiment on a small federation: rows, resume, and what is attacked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from experiments.privacy import __main__ as experiment
from experiments.privacy.federations import Federation

OPTIONS = [
    *("--config=digits.yaml", "--rounds=1", "--client.local_epochs=1", "--data.num_clients=2", "--data.alpha=5"),
    *("--data.max_samples=200", "--trainer.threads=1", "--trainer.accelerator=cpu", "--logger=null"),
]


@pytest.mark.parametrize("method", ["FedeKD", "ProxyEnsemble", "FedAvg"])
def test_shadow_uses_complementary_halves_and_attacks_all_samples(method: str) -> None:
    federation = Federation([*OPTIONS, f"--method={method}"])
    (first, confidences), (second, others) = (federation.run_shadow(number) for number in (0, 1))
    for client, splits in enumerate(federation.data.clients):
        assert (first[client] ^ second[client]).all()
        assert abs(int(first[client].sum()) * 2 - len(splits.train)) <= 1
        assert confidences.train[client].shape == (2, 2, len(splits.train))
        assert confidences.test[client].shape == (2, 2, len(splits.test))
        assert not np.array_equal(confidences.train[client], others.train[client])
        # The update and the mean of updates are different networks, and so are the outputs with the prior.
        assert len({confidences.train[client][i, j].tobytes() for i in range(2) for j in range(2)}) == 4
    # The next pair has other halves.
    assert (federation._half(federation.data.clients[0], 2) != first[0]).any()


@pytest.mark.parametrize("clients", [1, 2])
def test_run_attacks_the_update_that_the_server_got(clients: int, tmp_path: Path) -> None:
    """With one client the mean of the updates is its update; with two it is another network."""
    options = [*OPTIONS, f"--data.num_clients={clients}", "--method=FedeKD"]
    summary, confidences = Federation(options).run(str(tmp_path))
    assert summary["rounds"] == 1
    for client in range(clients):
        assert np.allclose(*confidences.train[client], rtol=1e-6) == (clients == 1)


def test_experiment_writes_each_cell_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results, calls = tmp_path / "membership.csv", []
    original = experiment.run

    def run(cell: experiment.Cell, *arguments: Any) -> Any:
        calls.append(cell.shadows)
        return original(cell, *arguments)

    monkeypatch.setattr(experiment, "run", run)
    argv = ["privacy", "--datasets", "digits", "--seeds", "1", "--methods", "FedeKD", "--shadows", "0", "6"]
    argv += [*OPTIONS[1:], "--output", str(tmp_path), "--results", str(results)]
    monkeypatch.setattr("sys.argv", argv)
    for _ in range(2):
        experiment.main()
        assert calls == [0, 6]
    rows = pd.read_csv(results)
    assert len(rows) == 3 * 4 + 2 * 3 * 4  # pooled and 2 clients; 4 outputs; online and offline
    assert set(rows["attack"]) == {"loss_threshold", "lira_online", "lira_offline"}
    pooled = rows[rows["client"] == -1].set_index(["attack", "target", "adjustment"]).sort_index()
    for _, row in pooled.iterrows():
        assert row["auc_low"] <= row["auc"] <= row["auc_high"]
    assert (pooled.loc["lira_online", "members"] == pooled.loc["lira_online", "others"]).all()
    assert rows.loc[rows["attack"] == "loss_threshold", "score"].notna().all()
    assert len(list(tmp_path.glob("digits-*/shadow-*.npz"))) == 6


def test_cells_with_other_options_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results, names = tmp_path / "membership.csv", []

    def run(cell: experiment.Cell, output: Path, extra: list[str]) -> list[dict[str, Any]]:
        assert cell.arguments(extra)[-1] == extra[-1]
        names.append(cell.name)
        return [{"attack": "none", "client": -1}]

    monkeypatch.setattr(experiment, "run", run)
    for code, option in (("1234567", "1"), ("1234567", "1"), ("1234567", "2"), ("12e4567", "2"), ("12e4567", "2")):
        monkeypatch.setattr(experiment, "commit", lambda code=code: code)
        argv = ["privacy", "--seeds", "1", "--methods", "FedeKD", "--results", str(results), f"--rounds={option}"]
        monkeypatch.setattr("sys.argv", argv)
        experiment.main()
    assert len(names) == len(set(names)) == 2
    assert sorted(pd.read_csv(results)["options"]) == ["--rounds=1", "--rounds=2"]
    cell = experiment.Cell("digits", 0.1, 0, "FedeKD", np.nan, np.nan, 6, "default")
    folders = set()
    for code in ("1234567", "12e4567"):
        monkeypatch.setattr(experiment, "commit", lambda code=code: code)
        folders.add(cell.name)
    assert len(folders) == 2


def test_confidence_finds_the_samples_of_an_overfitted_network() -> None:
    """Random labels can only be learnt by heart."""
    options = [*OPTIONS, "--client.local_epochs=60", "--client.optimizer.lr=1e-3", "--method=FedAvg"]
    federation = Federation(options)
    samples = federation.data.samples
    generator = torch.Generator().manual_seed(0)
    samples.targets[:] = torch.randint(0, 10, samples.targets.shape, generator=generator)
    used, confidences = federation.run_shadow(0)
    assert experiment.figures(confidences.train[0][0, 0], used[0], 0.0)["auc"] > 0.9
