"""Clients one at a time, taken up from disk and put down again: what an actor of Ray does, and a site of Flower."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fedekd.data import ClientSplits, ImageData
from fedekd.federation.engines.base import ClientResult, RoundRequest
from fedekd.federation.engines.client_store import ClientStore
from fedekd.federation.engines.gc_frozen import gc_frozen
from fedekd.federation.engines.remote import EventForwarder
from fedekd.federation.engines.sequential import SequentialEngine
from fedekd.federation.local_baseline import LocalBaseline
from fedekd.federation.observer import Observer
from fedekd.methods import Broadcast, FederationSpec, Method, StateDict

Event = tuple[str, tuple[Any, ...]]


@dataclass(frozen=True)
class WorkerSetup:
    """What a host is given of a federation, beside the pixels, of which a machine may hold one copy for all.

    Attributes:
        method: The clients' side of it.
        without_images: All that is known of the images but the images.
        clients: The samples of each client that may come here, by its number.
        spec: How networks are built and trained.
        baseline_dir: Where Local's references are kept.
        store: The folder of the clients' states.
    """

    method: Method
    without_images: ImageData
    clients: Sequence[ClientSplits] | Mapping[int, ClientSplits]
    spec: FederationSpec
    baseline_dir: Path | None
    store: Path


@dataclass(frozen=True)
class _Data:
    images: ImageData
    clients: Sequence[ClientSplits] | Mapping[int, ClientSplits]


class ClientWorker:
    """Runs whichever client it is asked to, from the state that the store has of it.

    Args:
        share: What it needs to know.
        pixels: Of all images, (n, C, H, W), uint8; Ray hands it a view of the machine's one copy.
    """

    def __init__(self, share: WorkerSetup, pixels: npt.NDArray[np.uint8]) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # the view cannot be written to, and nobody does
            images = replace(share.without_images, pixels=torch.from_numpy(pixels))
        self.events: list[Event] = []
        self.store = ClientStore(share.store)
        self.engine = SequentialEngine(
            share.method,
            _Data(images, share.clients),
            share.spec,
            share.baseline_dir,
            EventForwarder(lambda name, arguments: self.events.append((name, arguments))),
        )

    def ready(self) -> bool:
        """Whether it can begin."""
        return True

    def local_baseline(self, number: int, rounds: int) -> tuple[LocalBaseline, list[Event]]:
        """Local's reference for a client."""
        self.events.clear()
        return self.engine.local_baselines({number: rounds})[number], self._told()

    @gc_frozen()
    def run_client(
        self, number: int, version: int, request: RoundRequest, personal: StateDict, becomes: int | None = None
    ) -> tuple[ClientResult, list[Event]]:
        """Run one client, from one version of its state to another.

        Args:
            number: Client number.
            version: Version of the state to start from.
            request: Request of the round, the same object for all clients; its participants are ignored.
            personal: Personal part of the message to this client.
            becomes: Version to write; None is the next one.
        """
        self._take_up(number, version)
        broadcast = Broadcast(request.broadcast.shared, {number: personal} if personal else {})
        [result] = self.engine.run_clients(replace(request, participants=[number], broadcast=broadcast))
        self.store.write(number, version + 1 if becomes is None else becomes, self.engine.client_state(number))
        self._put_down(number)
        if result.update is not None:
            on_cpu = {name: tensor.detach().cpu() for name, tensor in result.update.state.items()}
            result = replace(result, update=replace(result.update, state=on_cpu))
        return result, self._told()

    @gc_frozen()
    def score(self, number: int, version: int) -> tuple[float, list[Event]]:
        """A client's score in a version of its state."""
        self._take_up(number, version)
        score = self.engine.score(number)
        self._put_down(number)
        return score, self._told()

    @gc_frozen()
    def begin(self, number: int) -> tuple[None, list[Event]]:
        """Write version 0 of a client's state: as it is before its first visit."""
        self._take_up(number, 0)
        self.store.write(number, 0, self.engine.client_state(number))
        self._put_down(number)
        return None, self._told()

    def _take_up(self, number: int, version: int) -> None:
        # A visit that has failed may have left the client as it was halfway, and events that nobody was told.
        self.engine.release(number)
        self.events.clear()
        if version:
            self.engine.load_client_state(number, self.store.read(number, version))

    def _put_down(self, number: int) -> None:
        self.engine.release(number)
        gc.collect()  # Trainers hold on to each other, and to what they trained

    def _told(self) -> list[Event]:
        events, self.events[:] = list(self.events), []
        return events


def replay_events(events: Sequence[Event], observer: Observer) -> None:
    """Tell an observer what has happened elsewhere."""
    for name, arguments in events:
        getattr(observer, name)(*arguments)
