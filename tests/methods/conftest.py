"""Fixtures: small federated runs of any method."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedekd.data import FederatedDataModule
from fedekd.federation import Orchestrator, RoundOptions
from fedekd.methods import ClientOptions, ClientUpdate, FederationSpec, Method
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


def client_of(run: Orchestrator, number: int = 0) -> Any:
    """Return one client of a run in this process."""
    engine: Any = run.engine
    return engine.client(number)


def one_round(run: Orchestrator, participants: Sequence[int], round_idx: int) -> list[ClientUpdate]:
    """Run one round step by step, and return copies of the updates."""
    broadcast, updates = run.method.broadcast(participants, round_idx), []
    for number in participants:
        client = client_of(run, number)
        run.method.receive(client, broadcast.to(number), round_idx)
        update = run.method.prepare_update(client, round_idx)
        updates.append(replace(update, state={name: tensor.clone() for name, tensor in update.state.items()}))
    run.method.aggregate(updates, round_idx)
    return updates


def differ(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> bool:
    """Return whether at least one tensor differs."""
    return any(not torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
