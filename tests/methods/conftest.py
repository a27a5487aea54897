"""Fixtures: small federated runs of any method."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedekd.data import FederatedDataModule
from fedekd.federation import Orchestrator, RoundOptions
from fedekd.federation.observer import SilentObserver
from fedekd.methods import ClientOptions, FederationSpec, Method
from fedekd.modules import TrainerFactory

Federate = Callable[..., Orchestrator]


@pytest.fixture
def federate(npz: Path, undrawn: None) -> Federate:
    """Factory of orchestrators with three clients; keyword arguments replace parts."""

    def make(method: Method, task: str | None = None, precision: str = "32-true", **parts: Any) -> Orchestrator:
        defaults: dict[str, Any] = {
            "data": FederatedDataModule(str(npz), num_clients=3, alpha=5.0, batch_size=8, task=task),  # type: ignore[arg-type]
            "client": ClientOptions(
                local_epochs=2,
                private_model={"class_path": "fedekd.models.ProxyCNN"},
                optimizer={"class_path": "torch.optim.Adam", "init_args": {"lr": 1e-3}},
            ),
            "trainer": TrainerFactory(accelerator="cpu", precision=precision, threads=1),  # type: ignore[arg-type]
            "rounds": RoundOptions(rounds=2),
        }
        return Orchestrator(method, **{**defaults, **parts})

    return make


class StoppedError(Exception):
    """Raised to stop a run in the middle."""


class StopAfter(SilentObserver):
    """Observer that stops a run after a number of phases."""

    def __init__(self, phases: int) -> None:
        self.left = phases

    def phase_finished(self, client: int, phase: str, steps: int) -> None:
        self.left -= 1
        if self.left == 0:
            raise StoppedError


def make_spec(**values: Any) -> FederationSpec:
    """Create a small specification; keyword arguments replace values."""
    defaults: dict[str, Any] = {
        "task": "classification",
        "input_shape": (1, 8, 8),
        "num_outputs": 3,
        "batch_size": 8,
        "eval_batch_size": 16,
        "seed": 0,
        "client": ClientOptions(),
        "trainer": TrainerFactory(accelerator="cpu", precision="32-true", threads=1),
        "num_clients": 3,
        "rounds": 5,
    }
    return FederationSpec(**{**defaults, **values})


def weights(run: Orchestrator, role: str = "private") -> dict[str, Any]:
    """Return all clients' weights of one network."""
    engine: Any = run.engine
    return {
        f"{number}/{name}": tensor
        for number, client in sorted(engine.clients.items())
        for name, tensor in client.networks[role].state_dict().items()
    }
