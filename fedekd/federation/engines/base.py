"""Where clients run. An engine holds the clients and lets them do what a round asks of them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from fedekd.data import ClientSplits, FederatedDataModule, ImageData
from fedekd.do_no_harm.rule import Comparison, DoNoHarm
from fedekd.early_exit.client_tradeoff import ExitTradeoff, exit_tradeoff
from fedekd.federation.local_baseline import LocalBaseline, restore_local_baseline, train_local_baseline
from fedekd.federation.observer import Observer, SilentObserver
from fedekd.methods import Broadcast, Client, FederationSpec, Method, Update
from fedekd.metrics import primary_metric
from fedekd.models import MultiExitNetwork


@dataclass(frozen=True)
class ClientResult:
    """What a client has to show for one round.

    Attributes:
        client: Its number.
        score: Accuracy or RMSE on its test split, right after it absorbed; NaN before the first aggregation.
        supervised_rounds: Rounds of supervised training that its private model has had.
        logs: What absorbing recorded, such as `gate/weight_mean`.
        update: What it sends; None after the last aggregate.
        tradeoff: Accuracy against cost of a network with exits; only after the last aggregate.
        comparison: Of its local model and the federated one, where clients look in this round.
    """

    client: int
    score: float
    supervised_rounds: int
    logs: dict[str, float]
    update: Update | None
    tradeoff: ExitTradeoff | None = None
    comparison: Comparison | None = None


@dataclass(frozen=True)
class ComparisonRequest:
    """What clients compare in a round.

    Attributes:
        rule: How they decide.
        rounds: By client, how many rounds Local was trained for at most: Delta is against no more either.
    """

    rule: DoNoHarm
    rounds: Mapping[int, int]


class Engine(Protocol):
    """Holds the clients of a federation."""

    def local_baselines(self, rounds: Mapping[int, int]) -> dict[int, LocalBaseline]:
        """Local's reference for each client, after so many rounds."""
        ...

    def run_clients(
        self,
        participants: Sequence[int],
        broadcast: Broadcast,
        round_idx: int,
        upload: bool,
        look: ComparisonRequest | None = None,
    ) -> Iterator[ClientResult]:
        """Let each participant absorb, score it, and if asked let it upload.

        Where something is uploaded, a participant that is late or out of reach may be missing from what comes; it is
        then as it was before, and the observer has been told why.

        Where there is a `look`, each of them compares its local model with what it has now; after the last aggregate,
        when nothing is uploaded, it keeps the one or the other.
        """
        ...

    def score(self, number: int) -> float:
        """A client's score as it is now."""
        ...

    def client_state(self, number: int) -> Any:
        """All that must last of a client."""
        ...

    def load_client_state(self, number: int, state: Any) -> None:
        """Set a client to a state it had."""
        ...

    def close(self) -> None:
        """Give back what the engine holds beyond memory; it is not used afterwards."""
        ...


class PartitionedData(Protocol):
    """Images, and which of them are whose: a FederatedDataModule, or what a process is given of one."""

    @property
    def images(self) -> ImageData:
        """All images and targets."""
        ...

    @property
    def clients(self) -> Sequence[ClientSplits] | Mapping[int, ClientSplits]:
        """The samples of each client that may run here, by its number."""
        ...


class EngineConfig(ABC):
    """Where the clients of a federation run, as a configuration says it: `engine: Sequential`.

    Where they run changes no number, at an equal number of threads a client.
    """

    @abstractmethod
    def threads(self, cores: int, clients: int) -> int:
        """CPU threads for one client's training, of a machine's cores, where nobody has said a number."""

    @abstractmethod
    def __call__(
        self,
        method: Method,
        data: FederatedDataModule,
        spec: FederationSpec,
        baseline_dir: Path | None,
        observer: Observer,
    ) -> Engine:
        """An engine for a federation."""


class Sequential(EngineConfig):
    """Clients run one after another in this process."""

    def threads(self, cores: int, clients: int) -> int:
        """All of them."""
        return cores

    def __call__(
        self,
        method: Method,
        data: FederatedDataModule,
        spec: FederationSpec,
        baseline_dir: Path | None,
        observer: Observer,
    ) -> Engine:
        """See `EngineConfig`."""
        return SequentialEngine(method, data, spec, baseline_dir, observer)


class SequentialEngine:
    """Runs the clients one after another in this process, over one copy of the data set.

    Args:
        method: The method, for its two verbs on the client.
        data: The federation's data, set up.
        spec: How networks are built and trained.
        baseline_dir: Where Local's references are kept; None trains them anew.
        observer: Is told of each phase.
    """

    def __init__(
        self,
        method: Method,
        data: PartitionedData,
        spec: FederationSpec,
        baseline_dir: Path | None = None,
        observer: Observer | None = None,
    ) -> None:
        self.method, self.spec, self.baseline_dir = method, spec, baseline_dir
        self.observer = observer or SilentObserver()
        device = spec.trainer.torch_device
        self.images = replace(data.images, pixels=data.images.pixels.to(device), targets=data.images.targets.to(device))
        self.splits = data.clients
        self.clients: dict[int, Client] = {}

    def _new_client(self, number: int) -> Client:
        return Client(number, self.splits[number], self.images, self.spec)

    def client(self, number: int) -> Client:
        """A client, as it is now."""
        if number not in self.clients:
            client = self._new_client(number)
            client.training_splits = self.method.training_splits
            self.method.init_client(client)
            self.clients[number] = client
        return self.clients[number]

    def release(self, number: int) -> None:
        """Forget a client whose state is kept elsewhere."""
        self.clients.pop(number, None)

    def client_steps(self, number: int) -> int:
        """Training steps of one phase of a client, as the display counts them."""
        batches = -(-len(self.splits[number].train) // self.spec.batch_size)
        return batches * self.spec.client.local_epochs

    def local_baselines(self, rounds: Mapping[int, int]) -> dict[int, LocalBaseline]:
        """Local's reference for each client; one client's networks are in memory at a time."""
        found = {}
        with self.spec.trainer.numerics():
            for number, wanted in rounds.items():
                self.observer.phase_started(number, "local")
                reference = train_local_baseline(self._new_client(number), wanted, self.baseline_dir)
                found[number] = LocalBaseline(reference.scores)  # what it loses on which sample is its own affair
                self.observer.phase_finished(number, "local", wanted * self.client_steps(number))
        return found

    def baseline_client(self, number: int, rounds: int) -> Client | None:
        """A client as Local left it after so many rounds; None if that is not kept."""
        client = self._new_client(number)
        return client if restore_local_baseline(client, rounds, self.baseline_dir) else None

    def run_clients(
        self,
        participants: Sequence[int],
        broadcast: Broadcast,
        round_idx: int,
        upload: bool,
        look: ComparisonRequest | None = None,
    ) -> Iterator[ClientResult]:
        """One participant after the other."""
        with self.spec.trainer.numerics():
            for number in participants:
                client = self.client(number)
                self.observer.phase_started(number, "receive")
                logs = self.method.receive(client, broadcast.to(number), round_idx)
                trained = client.supervised_rounds
                scores = client.exit_scores() if round_idx else [math.nan]
                score = scores[-1]
                if round_idx and isinstance(client.networks["private"], MultiExitNetwork):
                    name = primary_metric(self.spec.task).name
                    logs = logs | {f"exit_{place}/{name}": value for place, value in enumerate(scores, start=1)}
                if round_idx and math.isnan(score):
                    self.observer.warn(f"round {round_idx}: client {number} has no score; its outputs are not finite")
                self.observer.phase_finished(number, "receive", self.client_steps(number) if round_idx else 0)
                comparison = None if look is None else self._compare(client, look, final=not upload)
                update, tradeoff = None, None
                if upload:
                    self.observer.phase_started(number, "upload")
                    update = self.method.prepare_update(client, round_idx)
                    self.observer.phase_finished(number, "upload", self.client_steps(number))
                else:
                    tradeoff = exit_tradeoff(client)
                yield ClientResult(number, score, trained, logs, update, tradeoff, comparison)

    def _compare(self, client: Client, look: ComparisonRequest, final: bool) -> Comparison:
        """A client's local model and what it has now; in the end it keeps one of them."""
        rounds, split = min(max(client.supervised_rounds, 1), look.rounds[client.number]), look.rule.split
        local = self._new_client(client.number)
        reference = train_local_baseline(local, rounds, self.baseline_dir)
        found = look.rule.compare(reference.losses_after(rounds, split), client.losses(split).cpu(), self.spec.task)
        if final and found.kept == "local":
            if local.supervised_rounds != rounds:  # what is kept was trained further: train it again, this far
                local = self._new_client(client.number)
                train_local_baseline(local, rounds, None)
            client.use_local_model(local)
        elif final:
            client.use_local_model(None)
        return found

    def score(self, number: int) -> float:
        """A client's score as it is now."""
        with self.spec.trainer.numerics():
            return self.client(number).score()

    def client_state(self, number: int) -> Any:
        """All that must last of a client."""
        return self.client(number).state_dict()

    def load_client_state(self, number: int, state: Any) -> None:
        """Set a client to a state it had."""
        self.client(number).load_state_dict(state)

    def close(self) -> None:
        """Nothing to give back."""
