"""Helpers of tests that stop federated runs and compare them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fedekd.federation import ClientResult, Orchestrator, RoundRequest, SequentialEngine, SilentObserver
from fedekd.federation.checkpoint import CheckpointStore


class StoppedError(Exception):
    """Raised by observers to stop a run."""


class StopAfter(SilentObserver):
    """Observer that stops a run after a number of phases or rounds."""

    def __init__(self, phases: int = 0, rounds: int = 0) -> None:
        self.phases, self.rounds = phases, rounds

    def phase_finished(self, client: int, phase: str, steps: int) -> None:
        self.phases -= 1
        if self.phases == 0:
            raise StoppedError

    def round_finished(self, row: Any) -> None:
        self.rounds -= 1
        if self.rounds == 0:
            raise StoppedError


class StopBeforeRound(SilentObserver):
    """Observer that stops a run at the start of a round."""

    def __init__(self, round_idx: int) -> None:
        self.round_idx = round_idx

    def round_started(self, round_idx: int) -> None:
        if round_idx == self.round_idx:
            raise StoppedError


class BackwardsEngine(SequentialEngine):
    """Engine that runs the clients in reverse order."""

    def run_clients(self, request: RoundRequest) -> Iterator[ClientResult]:
        yield from super().run_clients(replace(request, participants=request.participants[::-1]))


def repeatable(summary: dict[str, Any]) -> dict[str, Any]:
    """Return a summary without values that differ between equal runs."""
    return {key: value for key, value in summary.items() if key not in ("seconds", "versions")}


def contents(run: Path) -> dict[str, str]:
    """Return rows and states of a run folder, which must not depend on the engine."""
    return CheckpointStore(run / "checkpoints").digests() | {"rows": (run / "metrics.csv").read_text()}


def weights(run: Orchestrator, role: str = "private") -> dict[str, Any]:
    """Return all clients' weights of one network, by client and name."""
    engine: Any = run.engine
    return {
        f"{number}/{name}": tensor
        for number, client in sorted(engine.clients.items())
        for name, tensor in client.networks[role].state_dict().items()
    }


def assert_equal_weights(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    """Assert that both have the same names, at least one, and bit-identical tensors."""
    assert ours.keys() == theirs.keys()
    assert ours
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
