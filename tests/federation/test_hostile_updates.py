"""The guard of updates in one process, against seeded hostile updates; `hostile` has the full count."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedekd.data import FederatedDataModule
from fedekd.federation import ClientResult, Orchestrator, RoundOptions, RoundRequest, SequentialEngine
from fedekd.federation.aggregate_validation import is_finite
from fedekd.methods import Client, ClientOptions, ClientUpdate, FedAvg, FedeKD, StateDict

from .conftest import Federate, Recorder
from .hostile import COUNT, MALFORMED, WELL_FORMED, Tally, harm_of_mean, hostile_state

CLIENTS = 6


class NormCNN(nn.Module):
    """A small network with the buffers that training changes, and with one that it does not."""

    def __init__(self, in_channels: int = 1, image_size: Any = 8, num_classes: int = 3) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(in_channels, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.register_buffer("order", torch.tensor([3, 1, 0, 2]))
        self.head = nn.Linear(4, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.norm(self.convolution(x)).relu().mean(dim=(2, 3))
        logits: Tensor = self.head(features[:, self.order])  # type: ignore[index]
        return logits


class HostileEngine(SequentialEngine):
    """Trains once; then every round repeats the updates of the clients, with one in place of client 0's."""

    hostile: Any = None
    results: tuple[ClientResult, ...] = ()

    def run_clients(self, request: RoundRequest) -> Iterator[ClientResult]:
        if not self.results:
            self.results = tuple(super().run_clients(request))
        for result in self.results:
            if result.client == 0 and self.hostile is not None:
                yield ClientResult(**{**vars(result), "update": ClientUpdate(0, *self.hostile)})
            else:
                yield result


class Guard:
    """A federation in round 0, whose guard is tried with one hostile update at a time."""

    def __init__(self, orchestrator: Orchestrator, recorder: Recorder) -> None:
        self.orchestrator, self.recorder = orchestrator, recorder
        self.method, self.engine = orchestrator.method, orchestrator.engine
        self.method.init_server(orchestrator.spec)
        self.initial = dict(self.method.server_state)
        self.sent = self.method.broadcast(range(CLIENTS), 0).to(0)
        self.network = orchestrator.spec.build_model("private", 0)
        self.images = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        orchestrator._run_round(0)
        updates = [result.update for result in self.engine.results]  # type: ignore[attr-defined]
        self.honest: list[Mapping[str, Tensor]] = [update.state for update in updates]
        self.sizes = [update.num_samples for update in updates]

    def is_accepted(self, state: Any, num_samples: Any) -> bool:
        """Run round 0 again; the server state must be finite whatever happens."""
        self.method.server_state = dict(self.initial)
        self.recorder.warnings.clear()
        self.engine.hostile = state, num_samples  # type: ignore[attr-defined]
        self.orchestrator._run_round(0)
        assert is_finite(self.method.server_state)
        assert all(len(text) < 300 for text in self.recorder.warnings)
        kept = any("keeps its state" in text for text in self.recorder.warnings)
        if not kept and not self.recorder.warnings:
            assert self.orchestrator.progress.traffic.updates == CLIENTS
        return not self.recorder.warnings


@pytest.fixture
def guard(federate: Federate, npz: Any) -> Guard:
    recorder = Recorder()
    orchestrator = federate(
        FedAvg(weights="samples"),
        data=FederatedDataModule(str(npz), num_clients=CLIENTS, alpha=5.0, batch_size=8, min_samples=6),
        client=ClientOptions(local_epochs=1, private_model={"class_path": f"{NormCNN.__module__}.NormCNN"}),
        rounds=RoundOptions(rounds=1),
        engine=HostileEngine,
        observer=recorder,
    )
    return Guard(orchestrator, recorder)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_orchestrator_hostile_updates_leave_everything_finite_and_in_range(guard: Guard) -> None:
    draw, tally = random.Random(0), Tally()
    assert guard.is_accepted(guard.honest[0], guard.sizes[0])
    for _ in range(COUNT):
        names, state = hostile_state(draw, guard.honest[0], guard.sent, (*WELL_FORMED, *MALFORMED))
        num_samples = guard.sizes[0] if draw.random() < 0.9 else draw.choice((0, 1, 2**53 - 1, -1, None, 0.5, 10**30))
        if not guard.is_accepted(state, num_samples):
            tally.rejected += 1
            continue
        tally.accepted[names] = tally.accepted.get(names, 0) + 1
        assert num_samples == guard.sizes[0]
        if harm := harm_of_mean([state, *guard.honest[1:]], guard.network, guard.images):
            tally.harmful.append(f"{names}: {harm}")
    print(f"\n{COUNT} hostile updates in one process: {tally.text()}; accepted: {tally.accepted}")
    assert tally.harmful == []
    assert tally.rejected > COUNT / 2


class Rotating(FedeKD):
    """In each round another client sends a hostile update, of the right names, shapes and dtypes."""

    def receive(self, client: Client, received: StateDict, round_idx: int) -> dict[str, float]:
        self.sent = received
        return super().receive(client, received, round_idx)

    def prepare_update(self, client: Client, round_idx: int) -> ClientUpdate:
        update = super().prepare_update(client, round_idx)
        if client.number != round_idx % CLIENTS:
            return update
        _, state = hostile_state(random.Random(f"0/{round_idx}"), update.state, self.sent, WELL_FORMED)
        return replace(update, state=state)


@pytest.mark.slow
def test_federation_with_one_hostile_client_per_round_scores_as_an_honest_one(federate: Federate) -> None:
    means = []
    for method in (FedeKD(), Rotating()):
        run = federate(
            method,
            data=FederatedDataModule("digits", num_clients=CLIENTS, alpha=0.1, batch_size=16, eval_batch_size=128),
            client=ClientOptions(
                local_epochs=2, optimizer={"class_path": "torch.optim.Adam", "init_args": {"lr": 1e-3}}
            ),
            rounds=RoundOptions(rounds=5),
        )
        means.append(run.run()["mean"])
    assert abs(means[1] - means[0]) <= 0.02
