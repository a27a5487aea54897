"""Interface between the round loop and the place where clients run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from fedekd.data import ClientSplits, FederatedDataModule, Samples
from fedekd.do_no_harm.rule import Comparison, DoNoHarm
from fedekd.early_exit.client_tradeoff import ExitTradeoff
from fedekd.federation.local_baseline import LocalBaseline
from fedekd.federation.observer import Observer
from fedekd.federation.references import Reference, ReferenceScores
from fedekd.federation.wire import Dtypes
from fedekd.methods import Broadcast, ClientUpdate, FederationSpec, Method
from fedekd.privacy import GaussianMechanism


@dataclass(frozen=True)
class ComparisonRequest:
    """Request to compare the local model with the federated one.

    Attributes:
        rule: Decision rule.
        rounds: By client, the most rounds for which its local baseline is trained. Delta uses the same limit.
        splits: Splits on whose samples the models are compared.
    """

    rule: DoNoHarm
    rounds: Mapping[int, int]
    splits: tuple[str, ...] = ("holdout",)

    def local_rounds(self, number: int, supervised_rounds: int) -> int:
        """Return the rounds of a client's local model after its supervised rounds."""
        return min(max(supervised_rounds, 1), self.rounds[number])


@dataclass(frozen=True)
class RoundRequest:
    """Work of the participating clients in one round.

    Attributes:
        participants: Client numbers, ascending.
        broadcast: Server message to them.
        round_idx: Round, in 0..R. Clients are scored from round 1 on.
        collect_updates: True in rounds 0..R-1. False after the last aggregate, where clients only receive.
        comparison: Do-no-harm comparison of this round; None if there is none.
        dtypes: For each tensor that is sent in another dtype, by name: the dtype that the client's method gets.
        privacy: Clips each update and adds noise; None sends updates unchanged.
        has_seeded_noise: True repeats the noise, as a simulation needs; False draws it from the operating system.
    """

    participants: Sequence[int]
    broadcast: Broadcast
    round_idx: int
    collect_updates: bool
    comparison: ComparisonRequest | None = None
    dtypes: Dtypes = field(default_factory=dict)
    privacy: GaussianMechanism | None = None
    has_seeded_noise: bool = True


@dataclass(frozen=True)
class ClientResult:
    """Result of one client in one round.

    Attributes:
        client: Client number.
        score: Primary metric on the test split, right after the client received; NaN in round 0.
        supervised_rounds: Rounds of supervised training of its private model so far.
        logs: Scalars that `Method.receive` returned, such as `gate/weight_mean`.
        update: Message to the server; None after the last aggregate.
        tradeoff: Accuracy against cost of a network with exits; only after the last aggregate.
        comparison: Result of the do-no-harm comparison, in rounds that have one.
        metrics: All metrics on the test split by key, including the primary one; empty in round 0.
        deployed_metrics: Those of the candidate that do-no-harm has chosen; empty without one.
    """

    client: int
    score: float
    supervised_rounds: int
    logs: dict[str, float]
    update: ClientUpdate | None
    tradeoff: ExitTradeoff | None = None
    comparison: Comparison | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    deployed_metrics: dict[str, float] = field(default_factory=dict)


class Engine(Protocol):
    """Holder of the clients of a federation.

    Attributes:
        has_seeded_noise: True if the noise of updates is drawn from the seed of the run, which protects nothing; False
            if each client draws it from the operating system.
    """

    has_seeded_noise: bool

    def local_baselines(self, rounds: Mapping[int, int]) -> dict[int, LocalBaseline]:
        """Train the local baseline of each client.

        Args:
            rounds: Rounds of training, by client.

        Returns:
            Test scores and metrics per round, by client.
        """
        ...

    def train_references(self, references: Mapping[int, Reference]) -> dict[int, ReferenceScores]:
        """Train one further reference of each client, such as its control.

        Called only for runs that have one; an engine without them may lack this function.

        Args:
            references: How it is trained, by client.

        Returns:
            Its scores, by client.
        """
        ...

    def run_clients(self, request: RoundRequest) -> Iterator[ClientResult]:
        """Run the participants: receive, score, compare, prepare the update.

        Where updates are collected, a participant that is late or unreachable may be missing from the results. Its
        state is then unchanged, and the observer has been warned.

        After the last aggregate, a comparison also decides which of the two models the client deploys.

        Yields:
            Results in any order.
        """
        ...

    def evaluate(self, number: int) -> dict[str, float]:
        """Return all metrics of a client in its present state, by key."""
        ...

    def client_state(self, number: int) -> Any:
        """Return the state of a client that a checkpoint holds, or its `Packed` bytes."""
        ...

    def load_client_state(self, number: int, state: Any) -> None:
        """Restore a client from a state that `client_state` returned."""
        ...

    def close(self) -> None:
        """Release processes and files; the engine is not used afterwards."""
        ...


class PartitionedData(Protocol):
    """Samples and their partition: a FederatedDataModule, or a worker's part of it."""

    @property
    def samples(self) -> Samples:
        """All images and targets."""
        ...

    @property
    def clients(self) -> Sequence[ClientSplits] | Mapping[int, ClientSplits]:
        """Splits of each client that may run here, by client number."""
        ...


class EngineConfig(ABC):
    """Settings of an engine, as in `engine: Sequential`.

    The choice of engine changes no result, at an equal number of threads per client.
    """

    @abstractmethod
    def threads(self, cores: int, clients: int) -> int:
        """Return the default number of CPU threads of one client's training.

        Args:
            cores: Cores of the machine.
            clients: Number of clients.
        """

    @abstractmethod
    def __call__(
        self,
        method: Method,
        data: FederatedDataModule,
        spec: FederationSpec,
        baseline_dir: Path | None,
        observer: Observer,
    ) -> Engine:
        """Build the engine of a federation."""
