"""Test sets of another class mix, and rows of a finished run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import Tensor

from experiments.label_shift.__main__ import SIZES, class_mixes, draw, evaluate, rows_of, summary
from fedekd.cli import main
from fedekd.configuration.load_run import open_finished


def test_class_mixes_reverse_the_order_of_frequencies() -> None:
    mixes = class_mixes(torch.tensor([6, 0, 3, 1]), torch.tensor([1, 1, 0, 0]))
    assert mixes["own"].tolist() == [0.6, 0.0, 0.3, 0.1]
    assert mixes["uniform"].tolist() == [0.25] * 4
    assert mixes["reversed"].tolist() == [0.0, 0.6, 0.1, 0.3]
    assert mixes["other client"].tolist() == [0.5, 0.5, 0.0, 0.0]


def test_draw_has_the_class_mix_and_leaves_out_missing_classes() -> None:
    targets = torch.tensor([0] * 10 + [1] * 100 + [2] * 3)
    mix = torch.tensor([0.6, 0.1, 0.1, 0.2], dtype=torch.float64)
    positions, possible = draw(targets, mix, 20_000, torch.Generator().manual_seed(0))
    torch.testing.assert_close(possible, torch.tensor([0.75, 0.125, 0.125, 0.0], dtype=torch.float64))
    shares = torch.bincount(targets[positions], minlength=4) / 20_000
    torch.testing.assert_close(shares.double(), possible, rtol=0, atol=0.015)
    assert len(positions.unique()) == len(targets)
    again, _ = draw(targets, mix, 20_000, torch.Generator().manual_seed(0))
    assert torch.equal(positions, again)


def shifted_problem() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Exact source posteriors of samples drawn from another prior."""
    generator = torch.Generator().manual_seed(0)
    source, true = torch.tensor([0.8, 0.15, 0.05]).double(), torch.tensor([0.05, 0.15, 0.8]).double()
    targets = torch.multinomial(true, 3000, replacement=True, generator=generator)
    x = 1.5 * targets + torch.randn(3000, dtype=torch.float64, generator=generator)
    density = -((x[:, None] - 1.5 * torch.arange(3)) ** 2) / 2
    return density + source.log(), targets, source, true


def test_evaluate_true_and_estimated_priors_recover_accuracy() -> None:
    logits, targets, source, true = shifted_problem()
    rows = {row["served"]: row for row in evaluate(logits, targets, source, source, true)}
    assert rows["true"]["prior_error"] == 0
    assert rows["train"]["prior_error"] == pytest.approx(0.75)
    assert rows["uniform"]["prior_error"] == pytest.approx(float((1 / 3 - true).abs().sum() / 2))
    assert rows["estimated"]["prior_error"] < 0.05
    assert rows["true"]["accuracy"] > rows["train"]["accuracy"] + 0.1
    assert rows["estimated"]["accuracy"] == pytest.approx(rows["true"]["accuracy"], abs=0.02)
    assert rows["train"]["accuracy"] == pytest.approx(float((logits.argmax(1) == targets).double().mean()))
    for served in ("true", "estimated"):  # a calibrated network has the training prior
        assert rows[f"{served}, from training prior"] == rows[served] | {"served": f"{served}, from training prior"}


def test_evaluate_network_prior_starts_the_correction() -> None:
    logits, targets, source, true = shifted_problem()
    exact = {row["served"]: row for row in evaluate(logits, targets, source, source, true)}
    other = {row["served"]: row for row in evaluate(logits, targets, source, torch.ones(3) / 3, true)}
    for served in ("true", "uniform", "estimated"):
        assert other[served] == exact[served]
    assert other["true, from training prior"]["accuracy"] != exact["true"]["accuracy"]


@pytest.mark.parametrize("method", ["Local", "FedeKD"])
def test_label_shift_rows_of_finished_run(
    method: str, write_blobs: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    npz = write_blobs(tmp_path / "blobs.npz", num_samples=300)
    monkeypatch.setattr("fedekd.federation.RunFolder.write_figures", lambda *arguments: None)
    assert main([
        "fit", f"--method={method}", f"--data.dataset={npz}", "--data.num_clients=2", "--data.alpha=1.0",
        "--data.batch_size=16", "--client.local_epochs=1", "--trainer.accelerator=cpu", "--trainer.threads=1",
        "--logger=null", "--quiet", "--rounds=1", f"--output={tmp_path / 'run'}", f"--baseline_dir={tmp_path}/local",
    ]) == 0  # fmt: skip
    clients = open_finished("fit", tmp_path / "run", in_process=True)[0].load_clients()
    tests = [client.splits.test.clone() for client in clients]
    rows = pd.DataFrame(rows_of(clients, seed=3))
    assert all(torch.equal(client.splits.test, test) for client, test in zip(clients, tests, strict=True))
    assert len(rows) == 2 * 4 * len(SIZES) * 6
    assert rows["accuracy"].between(0, 1).all()
    pd.testing.assert_frame_equal(rows, pd.DataFrame(rows_of(clients, seed=3)))
    assert not rows.equals(pd.DataFrame(rows_of(clients, seed=4)))
    table = summary(rows.assign(dataset="blobs", alpha=1.0, method=method, seed=3))
    assert list(table["mix"].unique()) == ["own", "uniform", "reversed", "other client"]
