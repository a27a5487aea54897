"""Fixtures of the tests on a CUDA device; FEDEKD_GPU_REHEARSAL=1 runs their logic on the CPU."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision

from fedekd.data import FederatedDataModule
from fedekd.federation import Orchestrator, RoundOptions
from fedekd.methods import ClientOptions, FedeKD, Method
from fedekd.modules import TrainerFactory, lean_loop, trainer_factory
from tests.modules.recorded_graph import RecordedGraph

# cuBLAS is deterministic over several streams only with this, and reads it when the CUDA context is created.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

REHEARSAL = os.environ.get("FEDEKD_GPU_REHEARSAL") == "1"

Federate = Callable[..., Orchestrator]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Append a test's outcome to the file FEDEKD_GPU_TEST_LOG, which outlives a run that is stopped at its limit."""
    path = os.environ.get("FEDEKD_GPU_TEST_LOG")
    if path and "PYTEST_XDIST_WORKER" not in os.environ and (report.when == "call" or not report.passed):
        crash = getattr(report.longrepr, "reprcrash", None)
        outcome = {
            "name": report.nodeid.rpartition("::")[2],
            "outcome": report.outcome,
            "seconds": round(report.duration, 2),
            "message": getattr(crash, "message", "")[:300],
            "place": f"{getattr(crash, 'path', '')}:{getattr(crash, 'lineno', '')}"[-200:],
        }
        with Path(path).open("a") as file:
            file.write(json.dumps(outcome) + "\n")


@pytest.fixture(autouse=True)
def accelerator(monkeypatch: pytest.MonkeyPatch) -> str:
    """`cuda`; in a rehearsal `cpu`, with a loss scaler of the CPU in 16-mixed and recorded operators as CUDA graphs."""
    monkeypatch.setattr(lean_loop, "MIN_CAPTURED_STEPS", 2)  # the phases of small data sets have few steps
    if not REHEARSAL:
        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device; FEDEKD_GPU_REHEARSAL=1 runs the logic on the CPU")
        return "cuda"
    resolve, trainer = TrainerFactory.resolve, trainer_factory.Trainer

    def resolved(factory: TrainerFactory) -> TrainerFactory:
        if factory.precision != "16-mixed":
            return resolve(factory)
        return replace(resolve(replace(factory, precision="32-true")), precision="16-mixed")

    def scaled(*, precision: Any, **options: Any) -> Any:
        if precision != "16-mixed":
            return trainer(precision=precision, **options)
        scaler = torch.amp.GradScaler("cpu")
        return trainer(plugins=[MixedPrecision("16-mixed", "cpu", scaler)], **options)

    monkeypatch.setattr(lean_loop, "supports_graphs", lambda device: True)
    monkeypatch.setattr(lean_loop, "_latest_graph", {})
    monkeypatch.setattr(torch.cuda, "CUDAGraph", RecordedGraph)
    monkeypatch.setattr(RecordedGraph, "made", [])
    monkeypatch.setattr(TrainerFactory, "resolve", resolved)
    monkeypatch.setattr(trainer_factory, "Trainer", scaled)
    return "cpu"


@pytest.fixture
def deterministic() -> Iterator[None]:
    """PyTorch uses deterministic algorithms where it has them, and warns of the others."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def federate(npz: Path, undrawn: None, accelerator: Any) -> Federate:
    """Build an orchestrator over three clients of a small data set; keyword arguments replace its parts."""

    def make(method: Method | None = None, precision: Any = "32-true", **parts: Any) -> Orchestrator:
        defaults: dict[str, Any] = {
            "data": FederatedDataModule(str(npz), num_clients=3, alpha=5.0, batch_size=8),
            "client": ClientOptions(
                local_epochs=1,
                private_model={"class_path": "fedekd.models.PrivateCNN"},
                optimizer={"class_path": "torch.optim.Adam", "init_args": {"lr": 1e-3}},
            ),
            "trainer": TrainerFactory(accelerator=accelerator, precision=precision, threads=1, loop="lean"),
            "rounds": RoundOptions(rounds=2),
        }
        return Orchestrator(method or FedeKD(), **{**defaults, **parts})

    return make
