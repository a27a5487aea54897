"""Runs of `fit` on a small data set, in this process."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from fedekd.cli import main
from fedekd.federation import RunFolder

Fit = Callable[..., int]

OPTIONS = [
    *("--client.local_epochs=1", "--trainer.accelerator=cpu", "--trainer.threads=1", "--logger=null"),
    *("--data.num_clients=3", "--data.alpha=1.0", "--data.batch_size=16"),
]


@pytest.fixture
def workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undrawn: None) -> Path:
    """An empty working folder, in which runs draw no figures."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture(scope="session")
def fit() -> Fit:
    """Run `fit` on a data set of three clients and return the exit code."""

    def run(npz: Path, *options: str, rounds: int = 1) -> int:
        return main(["fit", f"--data.dataset={npz}", *OPTIONS, f"--rounds={rounds}", *options])

    return run


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory: pytest.TempPathFactory, write_blobs: Callable[..., Path], fit: Fit) -> Path:
    """A finished run of two rounds; tests that change it take `finished_run`."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(RunFolder, "write_figures", lambda *arguments: None)
        npz = write_blobs(folder / "blobs.npz")
        options = (
            "--quiet",
            "--checkpoint_every=0",
            f"--output={folder}/run",
            f"--baseline_dir={folder}/local",
            "--data.download=false",
        )
        assert fit(npz, *options, rounds=2) == 0
    return folder / "run"


@pytest.fixture
def finished_run(trained_run: Path, workdir: Path) -> Path:
    """A copy of the finished run, as folder `a` of the working folder."""
    return Path(shutil.copytree(trained_run, "a"))
