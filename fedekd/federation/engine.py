"""Where clients run. An engine holds the clients and lets them do what a round asks of them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from fedekd.certificates import Comparison, DoNoHarm
from fedekd.data import ClientSplits, FederatedDataModule, ImageData
from fedekd.federation.exit_tradeoff import ExitTradeoff, exit_tradeoff
from fedekd.federation.observer import Observer, SilentObserver
from fedekd.federation.reference import LocalReference, restore_reference, train_reference
from fedekd.methods import Blueprint, Broadcast, Client, Method, Update
from fedekd.metrics import SCORE_NAME
from fedekd.models import MultiExitNetwork


@dataclass(frozen=True)
class Visit:
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
class Look:
    """What clients compare in a round.

    Attributes:
        rule: How they decide.
        rounds: By client, how many rounds Local was trained for at most: Delta is against no more either.
    """

    rule: DoNoHarm
    rounds: Mapping[int, int]


class Engine(Protocol):
    """Holds the clients of a federation."""

    def references(self, rounds: Mapping[int, int]) -> dict[int, LocalReference]:
        """Local's reference for each client, after so many rounds."""
        ...

    def visit(
        self,
        participants: Sequence[int],
        broadcast: Broadcast,
        round: int,
        upload: bool,
        look: Look | None = None,
    ) -> Iterator[Visit]:
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


class Dealt(Protocol):
    """Images, and which of them are whose: a FederatedDataModule, or what a process is given of one."""

    @property
    def images(self) -> ImageData:
        """All images and targets."""
        ...

    @property
    def clients(self) -> Sequence[ClientSplits] | Mapping[int, ClientSplits]:
        """The samples of each client that may run here, by its number."""
        ...


class Placement(ABC):
    """Where the clients of a federation run, as a configuration says it: `engine: InProcess`.

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
        blueprint: Blueprint,
        reference_folder: Path | None,
        observer: Observer,
    ) -> Engine:
        """An engine for a federation."""


class InProcess(Placement):
    """Clients run one after another in this process."""

    def threads(self, cores: int, clients: int) -> int:
        """All of them."""
        return cores

    def __call__(
        self,
        method: Method,
        data: FederatedDataModule,
        blueprint: Blueprint,
        reference_folder: Path | None,
        observer: Observer,
    ) -> Engine:
        """See `Placement`."""
        return InProcessEngine(method, data, blueprint, reference_folder, observer)


class InProcessEngine:
    """Runs the clients one after another in this process, over one copy of the data set.

    Args:
        method: The method, for its two verbs on the client.
        data: The federation's data, set up.
        blueprint: How networks are built and trained.
        reference_folder: Where Local's references are kept; None trains them anew.
        observer: Is told of each phase.
    """

    def __init__(
        self,
        method: Method,
        data: Dealt,
        blueprint: Blueprint,
        reference_folder: Path | None = None,
        observer: Observer | None = None,
    ) -> None:
        self.method, self.blueprint, self.reference_folder = method, blueprint, reference_folder
        self.observer = observer or SilentObserver()
        device = blueprint.trainer.torch_device
        self.images = replace(data.images, images=data.images.images.to(device), targets=data.images.targets.to(device))
        self.splits = data.clients
        self.clients: dict[int, Client] = {}

    def _new_client(self, number: int) -> Client:
        return Client(number, self.splits[number], self.images, self.blueprint)

    def client(self, number: int) -> Client:
        """A client, as it is now."""
        if number not in self.clients:
            client = self._new_client(number)
            client.learns_from = self.method.learns_from
            self.method.equip(client)
            self.clients[number] = client
        return self.clients[number]

    def release(self, number: int) -> None:
        """Forget a client whose state is kept elsewhere."""
        self.clients.pop(number, None)

    def client_steps(self, number: int) -> int:
        """Training steps of one phase of a client, as the display counts them."""
        batches = -(-len(self.splits[number].train) // self.blueprint.batch_size)
        return batches * self.blueprint.client.local_epochs

    def references(self, rounds: Mapping[int, int]) -> dict[int, LocalReference]:
        """Local's reference for each client; one client's networks are in memory at a time."""
        found = {}
        with self.blueprint.trainer.numerics():
            for number, wanted in rounds.items():
                self.observer.phase_started(number, "local")
                reference = train_reference(self._new_client(number), wanted, self.reference_folder)
                found[number] = LocalReference(reference.scores)  # what it loses on which sample is its own affair
                self.observer.phase_finished(number, "local", wanted * self.client_steps(number))
        return found

    def reference_client(self, number: int, rounds: int) -> Client | None:
        """A client as Local left it after so many rounds; None if that is not kept."""
        client = self._new_client(number)
        return client if restore_reference(client, rounds, self.reference_folder) else None

    def visit(
        self,
        participants: Sequence[int],
        broadcast: Broadcast,
        round: int,
        upload: bool,
        look: Look | None = None,
    ) -> Iterator[Visit]:
        """One participant after the other."""
        with self.blueprint.trainer.numerics():
            for number in participants:
                client = self.client(number)
                self.observer.phase_started(number, "absorb")
                logs = self.method.absorb(client, broadcast.to(number), round)
                trained = client.supervised_rounds
                scores = client.exit_scores() if round else [math.nan]
                score = scores[-1]
                if round and isinstance(client.networks["private"], MultiExitNetwork):
                    name = SCORE_NAME[self.blueprint.task]
                    logs = logs | {f"exit_{place}/{name}": value for place, value in enumerate(scores, start=1)}
                if round and math.isnan(score):
                    self.observer.warn(f"round {round}: client {number} has no score; its outputs are not finite")
                self.observer.phase_finished(number, "absorb", self.client_steps(number) if round else 0)
                comparison = None if look is None else self._compare(client, look, final=not upload)
                update, tradeoff = None, None
                if upload:
                    self.observer.phase_started(number, "upload")
                    update = self.method.upload(client, round)
                    self.observer.phase_finished(number, "upload", self.client_steps(number))
                else:
                    tradeoff = exit_tradeoff(client)
                yield Visit(number, score, trained, logs, update, tradeoff, comparison)

    def _compare(self, client: Client, look: Look, final: bool) -> Comparison:
        """A client's local model and what it has now; in the end it keeps one of them."""
        rounds, split = min(max(client.supervised_rounds, 1), look.rounds[client.number]), look.rule.split
        local = self._new_client(client.number)
        reference = train_reference(local, rounds, self.reference_folder)
        found = look.rule.compare(
            reference.losses_after(rounds, split), client.losses(split).cpu(), self.blueprint.task
        )
        if final and found.kept == "local":
            if local.supervised_rounds != rounds:  # what is kept was trained further: train it again, this far
                local = self._new_client(client.number)
                train_reference(local, rounds, None)
            client.keep_local(local)
        elif final:
            client.keep_local(None)
        return found

    def score(self, number: int) -> float:
        """A client's score as it is now."""
        with self.blueprint.trainer.numerics():
            return self.client(number).score()

    def client_state(self, number: int) -> Any:
        """All that must last of a client."""
        return self.client(number).state_dict()

    def load_client_state(self, number: int, state: Any) -> None:
        """Set a client to a state it had."""
        self.client(number).load_state_dict(state)

    def close(self) -> None:
        """Nothing to give back."""
