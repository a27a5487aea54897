"""What a method is: four verbs, so that it runs alike in one process, on a cluster and between real sites."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fedekd.functional import Aggregator, Mean
from fedekd.methods.client import Client
from fedekd.methods.specification import FederationSpec

StateDict = Mapping[str, Tensor]


def num_bytes(state: StateDict) -> int:
    """Bytes of the tensors of a state_dict, as they travel."""
    return sum(tensor.numel() * tensor.element_size() for tensor in state.values())


@dataclass(frozen=True)
class Broadcast:
    """What the server sends: a part for all and, where a method needs it, a part for each client.

    Attributes:
        shared: For every participant.
        personal: By client number; laid over `shared`.
    """

    shared: StateDict = field(default_factory=dict)
    personal: Mapping[int, StateDict] = field(default_factory=dict)

    def to(self, client: int) -> StateDict:
        """All that one client is sent."""
        return {**self.shared, **self.personal.get(client, {})}

    def only(self, clients: Sequence[int]) -> Broadcast:
        """What these clients are sent, and nothing for the others."""
        return Broadcast(self.shared, {number: self.personal[number] for number in clients if number in self.personal})


@dataclass(frozen=True)
class Update:
    """What a client sends.

    Attributes:
        client: Its number.
        state: Tensors, with the names, shapes and dtypes of what the client was sent.
        num_samples: Samples of its training split.
    """

    client: int
    state: StateDict
    num_samples: int


def is_uniform_mean(merge: Aggregator) -> bool:
    """Whether an aggregator takes the mean of what clients send, and counts them alike."""
    return isinstance(merge, Mean) and merge.weights == "uniform"


class Method(ABC):
    """A federated method in four verbs.

    A round is numbered by how many aggregations have happened. In round r the participants absorb the r-th
    aggregate, are scored, and upload; the server aggregates. In round 0 nothing has been aggregated, and absorb
    only loads. After the last aggregation every client absorbs once more. With full participation this is the order
    of Algorithm 1; with partial participation nobody works from a stale model; and it is one message each way.

    State that must last is in the client and in `server_state`, both plain state_dicts; the object itself holds
    only hyperparameters, so that it can be copied to wherever clients run.
    """

    #: True for the method that Delta is measured against.
    is_local_baseline = False

    #: How many exits the private model has where `client.exits` is not said; None leaves it as it is.
    exits: int | None = None

    #: The splits that training looks at; of one that includes validation nothing can be certified on a part of it.
    training_splits: tuple[str, ...] = ("train",)

    def __init__(self) -> None:
        self.server_state: dict[str, Any] = {}

    def init_server(self, spec: FederationSpec) -> None:  # noqa: B027 - a method without a server state has nothing to start
        """On the server, before the first round: set `server_state`."""

    def init_client(self, client: Client) -> None:  # noqa: B027 - a method with private models alone adds none
        """On the client, before its first round: add the networks it needs besides `private`."""

    def broadcast(self, participants: Sequence[int], round_idx: int) -> Broadcast:
        """On the server: what each participant is sent."""
        return Broadcast()

    @property
    def supports_secure_mean(self) -> bool:
        """Whether `aggregate` asks no more of the updates than their uniform mean.

        If each update were replaced by that mean, it would come to the same: so each may stay hidden (secure
        aggregation).
        """
        return False

    @abstractmethod
    def receive(self, client: Client, received: StateDict, round_idx: int) -> dict[str, float]:
        """On the client: take in what was received; returns what is worth logging of it."""

    def prepare_update(self, client: Client, round_idx: int) -> Update:
        """On the client: what it sends."""
        return Update(client.number, {}, len(client.splits.train))

    def aggregate(self, updates: Sequence[Update], round_idx: int) -> None:  # noqa: B027 - nothing to renew
        """On the server: renew `server_state` from the updates, ordered by client."""
