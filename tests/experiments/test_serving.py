"""Weights at serving time: combinations against literal transcriptions, and rows of a finished run."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import Tensor

from experiments.hospital_runs import Run, is_stored, store
from experiments.serving.__main__ import MEMBERS, member_log_probabilities, rows_of, summary
from experiments.serving.combiners import EQUAL, FITTED, FITTED_ENTROPY, SHUFFLES, combiners
from fedekd.cli import main
from fedekd.configuration.load_run import open_finished

CLASSES = 4


def members(samples: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(CLASSES, (samples,), generator=generator)
    logits = torch.randn(3, samples, CLASSES, dtype=torch.float64, generator=generator)
    logits[1:, torch.arange(samples), targets] += 1.5
    return logits.log_softmax(2), targets


def literal(log_p: Tensor, weights: list[list[float]]) -> list[int]:
    """Most likely class under weights of each sample, one row per sample."""
    result = []
    for i, row in enumerate(weights):
        scores = [sum(w * float(log_p[m, i, c]) for m, w in enumerate(row)) for c in range(CLASSES)]
        result.append(scores.index(max(scores)))
    return result


def literal_energy(p: list[float], q: list[float]) -> float:
    kl = lambda a, b: sum(x * math.log(x / y) for x, y in zip(a, b, strict=True))  # noqa: E731
    entropy = lambda a: -sum(x * math.log(x) for x in a)  # noqa: E731
    return (kl(p, q) + kl(q, p)) / 2 / (entropy(p) + entropy(q))


def literal_gate(log_p: Tensor, proxy: int) -> list[float]:
    p = log_p.exp().tolist()
    energies = [literal_energy(a, b) for a, b in zip(p[0], p[proxy], strict=True)]
    mean = sum(energies) / len(energies)
    spread = math.sqrt(sum((e - mean) ** 2 for e in energies) / len(energies))
    return [1 / (1 + math.exp((e - mean) / spread)) for e in energies]


def test_combiners_match_literal_equations() -> None:
    tuning, labels = members(30, seed=1)
    log_p, _ = members(200)
    found = {name: labels.tolist() for name, labels in combiners(tuning, labels, log_p).items()}
    p = log_p.exp().tolist()
    samples = range(200)
    assert found[EQUAL] == literal(log_p, [[1 / 3] * 3] * 200)
    mean = [[sum(p[m][i][c] for m in range(3)) for c in range(CLASSES)] for i in samples]
    assert found["mean of probabilities"] == [row.index(max(row)) for row in mean]
    entropy = [[-sum(x * math.log(x) for x in p[m][i]) for m in range(3)] for i in samples]
    assert found["weights by exp(-entropy)"] == literal(log_p, [[math.exp(-h) for h in row] for row in entropy])
    best = [max(range(3), key=lambda m, i=i: max(p[m][i])) for i in samples]
    assert found["most confident member"] == [p[m][i].index(max(p[m][i])) for i, m in enumerate(best)]
    gates = [literal_gate(log_p, 1), literal_gate(log_p, 2)]
    assert found["FedeKD's gate"] == literal(log_p, [[1, 2 * gates[0][i], 2 * gates[1][i]] for i in samples])
    assert found["gate, reversed"] == literal(
        log_p, [[1, 2 * (1 - gates[0][i]), 2 * (1 - gates[1][i])] for i in samples]
    )
    assert len({tuple(map(str, each)) for each in found.values()}) == len(found)


def test_combiners_shuffled_gate_has_the_gates_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    tuning, labels = members(30, seed=1)
    log_p, _ = members(50)
    with monkeypatch.context() as patch:
        patch.setattr("torch.randperm", lambda count, generator: torch.arange(count))
        found = combiners(tuning, labels, log_p)
    assert torch.equal(found["gate, shuffled"], found["FedeKD's gate"].expand(SHUFFLES, 50))
    shuffled = combiners(tuning, labels, log_p)["gate, shuffled"]
    assert torch.equal(shuffled, combiners(tuning, labels, log_p)["gate, shuffled"])
    assert not torch.equal(shuffled, combiners(tuning, labels, log_p, seed=1)["gate, shuffled"])
    assert len(shuffled.unique(dim=0)) > 1


def test_combiners_have_equal_weights_below_ten_held_out_samples() -> None:
    tuning, labels = members(10, seed=1)
    log_p, _ = members(200)
    few, enough = (combiners(tuning[:, :count], labels[:count], log_p) for count in (9, 10))
    for name in (FITTED, FITTED_ENTROPY):
        assert torch.equal(few[name], few[EQUAL])
        assert not torch.equal(enough[name], enough[EQUAL])


def test_combiners_fitted_weights_depend_on_tuning_labels_only() -> None:
    tuning, labels = members(60, seed=1)
    log_p, _ = members(200)
    found = combiners(tuning, labels, log_p)
    other = combiners(tuning, (labels + 1) % CLASSES, log_p)
    assert {name for name in found if not torch.equal(found[name], other[name])} == {FITTED, FITTED_ENTROPY}
    for name in (FITTED, FITTED_ENTROPY):  # each sample by itself: no other test sample has an effect
        assert torch.equal(combiners(tuning, labels, log_p[:, :7])[name], found[name][:7])


@pytest.fixture(scope="module")
def finished(write_blobs: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("serving")
    npz = write_blobs(folder / "blobs.npz", num_samples=300)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedekd.federation.RunFolder.write_figures", lambda *arguments: None)
        assert main([
            "fit", "--method=ProxyEnsemble", f"--data.dataset={npz}", "--data.num_clients=2", "--data.alpha=1.0",
            "--data.batch_size=16", "--client.local_epochs=1", "--trainer.accelerator=cpu", "--trainer.threads=1",
            "--logger=null", "--quiet", "--rounds=1", f"--output={folder / 'run'}",
            f"--baseline_dir={folder / 'local'}",
        ]) == 0  # fmt: skip
    return folder / "run"


def test_serving_rows_of_finished_run(finished: Path) -> None:
    clients = open_finished("fit", finished, in_process=True)[0].load_clients()
    rows = pd.DataFrame(rows_of(clients, seed=0))
    counts = rows.groupby("client")["combination"].nunique()
    assert counts.tolist() == [3 + 9 + 2] * 2
    table = rows.set_index(["client", "combination"])["accuracy"]
    for client in clients:
        assert table[client.number, "private"] == pytest.approx(client.score(role="private"))
        assert client.serving is not None
        # The method's own fit on the tuning split is the same one.
        assert table[client.number, FITTED] == pytest.approx(client.score())
        offsets = dict(zip(client.serving.members, client.serving.offsets, strict=True))
        output = client.predict("tuned", "test", mixed=False).output.double() + offsets["tuned"]
        torch.testing.assert_close(
            member_log_probabilities(client, "test")[MEMBERS.index("tuned")],
            output.log_softmax(1), rtol=1e-5, atol=1e-5,
        )  # fmt: skip


def test_serving_results_are_stored_once_and_summarised(tmp_path: Path) -> None:
    path = tmp_path / "deep/serving.csv"
    for seed, gain in ((10, 0.01), (11, 0.03)):
        run = Run("cifar10", 0.1, "ProxyEnsemble", seed)
        assert not is_stored(run._asdict(), path)
        rows = [
            {"client": k, "combination": name, "accuracy": 0.5 + k / 10 + (name == FITTED) * gain}
            for k in range(2) for name in (EQUAL, FITTED)
        ]  # fmt: skip
        store(run._asdict(), rows, path)
        assert is_stored(run._asdict(), path)
        assert not is_stored(run._replace(alpha=0.5)._asdict(), path)
    table = summary(pd.read_csv(path))
    assert table.loc[EQUAL, "cifar10, 0.1 (2 seeds)"] == "0.5500"
    assert table.loc[FITTED, "cifar10, 0.1 (2 seeds)"] == "+0.0200 (0.0100)"
