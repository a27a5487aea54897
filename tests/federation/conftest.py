"""Small federations."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from fedekd.data import FederatedDataModule
from fedekd.federation import Orchestrator, RoundOptions, SilentObserver
from fedekd.methods import ClientOptions, FedeKD, Method
from fedekd.modules import TrainerFactory

Federate = Callable[..., Orchestrator]


class Recorder(SilentObserver):
    """Records phases, steps and warnings; those of the scores of networks that hardly train are kept apart."""

    def __init__(self) -> None:
        self.phases: list[tuple[int, str]] = []
        self.steps = self.planned_steps = 0
        self.warnings: list[str] = []
        self.score_warnings: list[str] = []

    def started(self, rounds: int, total_steps: int, done_steps: int) -> None:
        self.planned_steps = total_steps

    def phase_started(self, client: int, phase: str) -> None:
        self.phases.append((client, phase))

    def phase_finished(self, client: int, phase: str, steps: int) -> None:
        self.steps += steps

    def warn(self, text: str) -> None:
        (self.score_warnings if text.startswith("scores of") else self.warnings).append(text)


def federation(npz: Path, method: Method | None = None, **parts: Any) -> Orchestrator:
    """An orchestrator over three clients of a small data set; keyword arguments replace its parts."""
    defaults: dict[str, Any] = {
        "data": FederatedDataModule(str(npz), num_clients=3, alpha=1.0, batch_size=8),
        "client": ClientOptions(
            local_epochs=1,
            private_model={"class_path": "fedekd.models.PrivateCNN"},
            proxy_model={"class_path": "fedekd.models.ProxyCNN"},
            optimizer={"class_path": "torch.optim.Adam", "init_args": {"lr": 1e-3}},
        ),
        "trainer": TrainerFactory(accelerator="cpu", precision="32-true", threads=1),
        "rounds": RoundOptions(rounds=2),
    }
    return Orchestrator(method or FedeKD(), **{**defaults, **parts})


@pytest.fixture
def federate(npz: Path, undrawn: None) -> Federate:
    """`federation` of the small data set, without figures."""
    return partial(federation, npz)
