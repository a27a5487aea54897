"""Base classes of federated methods, and the messages between server and clients."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fedekd.errors import require
from fedekd.functional import Aggregator, Mean
from fedekd.methods.client import Client
from fedekd.methods.serving import Serving
from fedekd.methods.specification import FederationSpec
from fedekd.models.freezing import exchanged_tensors

StateDict = Mapping[str, Tensor]
"""Tensors by name, as in `torch.nn.Module.state_dict`."""

Candidates = Mapping[str, Callable[[Client], Serving | None]]
"""By name, a function that returns how a client serves the model; None is its private model."""


def state_dict_bytes(state: StateDict) -> int:
    """Return the number of bytes of a state_dict's tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in state.values())


@dataclass(frozen=True)
class Broadcast:
    """Message of the server to the clients of a round.

    Attributes:
        shared: Tensors for every participant.
        personal: Tensors by client number; they override `shared`.
    """

    shared: StateDict = field(default_factory=dict)
    personal: Mapping[int, StateDict] = field(default_factory=dict)

    def to(self, client: int) -> StateDict:
        """Return the tensors for one client."""
        return {**self.shared, **self.personal.get(client, {})}


@dataclass(frozen=True)
class ClientUpdate:
    """Message of a client to the server.

    Attributes:
        client: Number of the client.
        state: Tensors with the names, shapes and dtypes of the message that the client received.
        num_samples: Number of training samples of the client.
    """

    client: int
    state: StateDict
    num_samples: int

    @classmethod
    def of(cls, client: Client, state: StateDict | nn.Module | None = None) -> ClientUpdate:
        """Create a client's update from tensors or a network; None sends no tensors.

        Frozen tensors of a network (`client.freeze`) are not sent.
        """
        tensors = exchanged_tensors(state) if isinstance(state, nn.Module) else state
        return cls(client.number, tensors if tensors is not None else {}, len(client.splits.train))


def is_uniform_mean(aggregator: Aggregator) -> bool:
    """Return True if an aggregator is the unweighted mean."""
    return isinstance(aggregator, Mean) and aggregator.weights == "uniform"


def require_finetuning(epochs: int, lr_factor: float) -> None:
    """Check the options of the local training after the last round."""
    require(epochs >= 0, "method.finetune_epochs", "at least 0", epochs)
    require(0 < lr_factor < math.inf, "method.finetune_lr_factor", "a finite number above 0", lr_factor)


class Method(ABC):
    """Base class of federated methods.

    A round is one message to the clients and one message back. R rounds are R + 1 visits of the clients:

        round   0               1               ...  R - 1           R
        server  init_server     aggregate       ...  aggregate       aggregate
                broadcast       broadcast       ...  broadcast       broadcast
        client  init_client
                receive         receive         ...  receive         receive
                                (score)         ...  (score)         (score)
                prepare_update  prepare_update  ...  prepare_update

    In round 0 nothing has been aggregated: `receive` loads the initial state, and `prepare_update` follows. After the
    last aggregation every client receives once more. With full participation this is Algorithm 1 of FedeKD; with
    partial participation no client starts from an outdated state.

    A method object holds hyper-parameters only, so that it can be copied to other processes and sites. All other state
    is in `server_state` and in the client (`networks`, `optimizer_states`, `method_state`), as plain state_dicts.

    Attributes:
        server_state: State of the server, set by `init_server` and `aggregate`; saved in checkpoints.
    """

    #: True for the local baseline, against which Delta is computed.
    is_local_baseline = False

    #: True if a client serves more than its private model: `baseline.control` null then trains its control.
    serves_more = False

    #: True if clients exchange private models: frozen parts (`client.freeze`) must then be equal at all of them.
    exchanges_private = False

    #: Number of exits of the private model if `client.exits` is null; None keeps the model as it is.
    exits: int | None = None

    #: Splits that training uses, also to fit weights. No guarantee can be calibrated on a split listed here; `tuning`
    #: may be listed, because it only orders the tests of a calibration.
    training_splits: tuple[str, ...] = ("train",)

    #: Splits of which every client needs a sample; checked before anything is trained.
    required_splits: tuple[str, ...] = ()

    def __init__(self) -> None:
        self.server_state: dict[str, Any] = {}

    def init_server(self, spec: FederationSpec) -> None:  # noqa: B027 - optional
        """Check the specification and set `server_state` (server, before round 0)."""

    def restrict_to_one_client(self) -> None:  # noqa: B027 - optional
        """Adapt the method to a run with one client, for a control.

        Called after `init_server`.
        """

    def scheduled_epochs(self, spec: FederationSpec) -> int:
        """Return the most epochs of one network in a run, for `client.scheduler`."""
        return spec.rounds * spec.client.local_epochs

    def init_client(self, client: Client) -> None:  # noqa: B027 - optional
        """Add networks and `method_state` (client, before its first round)."""

    #: Candidates that are trained only in the last round: before, their network is untrained.
    last_round_candidates: ClassVar[tuple[str, ...]] = ()

    def candidates(self) -> Candidates:
        """Return the models that a client can deploy, for `do_no_harm.candidates`.

        Each function gets the client after `receive` and returns how the model is served. The only candidate by default
        is `private`, the model that the method serves. The exits of the private model are candidates without being
        listed.
        """
        return {"private": lambda client: client.serving}

    def broadcast(self, participants: Sequence[int], round_idx: int) -> Broadcast:
        """Return the message to the participants of a round (server)."""
        return Broadcast()

    @property
    def supports_secure_mean(self) -> bool:
        """True if `aggregate` uses only the uniform mean of the updates.

        Replacing every update by that mean must not change the result, so that secure aggregation can hide each one.
        """
        return False

    @property
    def serves_average(self) -> bool:
        """True if a client serves the server's average as it is.

        The client has not trained this average, so its label prior is not that of the client.
        """
        return False

    @abstractmethod
    def receive(self, client: Client, received: StateDict, round_idx: int) -> dict[str, float]:
        """Load the server's message, and possibly train the private model (client).

        Returns:
            Scalars to log for this client.
        """

    def prepare_update(self, client: Client, round_idx: int) -> ClientUpdate:
        """Train the networks to send, and return the update (client, rounds 0..R-1)."""
        return ClientUpdate.of(client)

    def aggregate(self, updates: Sequence[ClientUpdate], round_idx: int) -> None:  # noqa: B027 - optional
        """Set `server_state` from the updates, sorted by client number (server)."""


class ProxyMethod(Method):
    """Base class of methods that exchange a proxy and keep the private model local.

    A subclass implements `prepare_update`: train the networks `private` and `proxy`, return the proxy.

    Args:
        aggregator: Merges the proxies; None is the uniform mean.
    """

    def __init__(self, aggregator: Aggregator | None = None) -> None:
        super().__init__()
        self.merge = aggregator if aggregator is not None else Mean()

    @property
    def supports_secure_mean(self) -> bool:
        """True if proxies are merged by the uniform mean."""
        return type(self).aggregate is ProxyMethod.aggregate and is_uniform_mean(self.merge)

    def init_server(self, spec: FederationSpec) -> None:
        """Build the initial global proxy."""
        self.server_state = dict(spec.build_model("proxy", "server").state_dict())

    def init_client(self, client: Client) -> None:
        """Add the proxy to the client's networks."""
        client.networks["proxy"] = client.spec.build_model("proxy", "server")

    def candidates(self) -> Candidates:
        """Return the private model, and the global proxy that was received."""
        return {**super().candidates(), "proxy": lambda client: client.single("proxy")}

    def broadcast(self, participants: Sequence[int], round_idx: int) -> Broadcast:
        """Return the global proxy."""
        return Broadcast(self.server_state)

    def receive(self, client: Client, received: StateDict, round_idx: int) -> dict[str, float]:
        """Load the global proxy."""
        client.networks["proxy"].load_state_dict(received)
        return {}

    def is_untrained(self, client: Client, received: StateDict) -> bool:
        """Return True if the global proxy is untrained: no round reached its quorum."""
        initial = client.spec.initial_proxy
        return all(_is_initial(value.to(initial[name].device), initial[name]) for name, value in received.items())

    @abstractmethod
    def prepare_update(self, client: Client, round_idx: int) -> ClientUpdate:
        """Train the networks, and return the proxy in a `ClientUpdate`."""

    def aggregate(self, updates: Sequence[ClientUpdate], round_idx: int) -> None:
        """Merge the proxies."""
        self.server_state = self.merge([u.state for u in updates], [u.num_samples for u in updates])


def _is_initial(value: Tensor, initial: Tensor) -> bool:
    """Return True for an initial tensor, as it is or rounded by `wire_dtype`."""
    if torch.equal(value, initial):
        return True
    return initial.is_floating_point() and torch.equal(value, initial.to(torch.float16).to(initial.dtype))
