"""Worker that loads the state of a client, runs the client and saves its state."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch

from fedekd.atomic import atomic_file, seal, unseal
from fedekd.data import ClientSplits, Inputs, Samples, StoredInputs
from fedekd.errors import UserError
from fedekd.federation.checkpoint import Packed, pack, unpack
from fedekd.federation.engines.base import ClientResult, RoundRequest
from fedekd.federation.engines.performance import gc_frozen
from fedekd.federation.engines.sequential import SequentialEngine
from fedekd.federation.local_baseline import LocalBaseline
from fedekd.federation.observer import Observer, SilentObserver
from fedekd.federation.references import Reference, ReferenceScores
from fedekd.global_state import exclusive
from fedekd.methods import Broadcast, FederationSpec, Method, StateDict
from fedekd.modules.trainer_factory import collect_trainers

#: Name of an observer's method, and its arguments.
Event = tuple[str, tuple[Any, ...]]


class DamagedStateError(UserError):
    """Raised for a client state that does not match its checksum."""


class StateStore:
    """Client states on disk: memory holds only the clients that run.

    Each version of a state is a file. The next version does not overwrite the last, so that lost work can be
    repeated from there.

    Args:
        folder: Existing folder, visible to all machines that run clients.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self, number: int, version: int) -> Any:
        """Return a state, on the CPU; see `read_packed`."""
        return unpack(self.read_packed(number, version).content)

    def read_packed(self, number: int, version: int) -> Packed:
        """Return a serialized state.

        Raises:
            DamagedStateError: If the file does not match its checksum.
        """
        path = self._path(number, version)
        content = path.read_bytes()
        try:
            return Packed(unseal(content))
        except ValueError as error:
            raise DamagedStateError(f"{path}: the state of client {number} is damaged: {error}") from error

    def write(self, number: int, version: int, state: Any) -> None:
        """Write a state atomically, replacing the same version.

        Raises:
            FileNotFoundError: If the folder was removed, as when a late worker writes after its engine closed.
        """
        self.folder.stat()  # raises, where `atomic_file` would create the folder again
        with atomic_file(self._path(number, version)) as file:
            file.write(seal(pack(state)))

    def has(self, number: int, version: int) -> bool:
        """Return whether a version of a client's state exists."""
        return self._path(number, version).is_file()

    def versions(self, number: int) -> list[int]:
        """Return the versions of a client's state, ascending."""
        return sorted(int(path.stem.rpartition("-")[2]) for path in self.folder.glob(f"client-{number:05d}-*.pt"))

    def drop(self, number: int, version: int) -> None:
        """Remove a version if it exists."""
        self._path(number, version).unlink(missing_ok=True)

    def _path(self, number: int, version: int) -> Path:
        return self.folder / f"client-{number:05d}-{version:06d}.pt"


class EventForwarder(SilentObserver):
    """Observer that passes the events of clients to a function, for `replay_events`.

    Args:
        forward: Called with each event.
    """

    def __init__(self, forward: Callable[[Event], None]) -> None:
        self.forward = forward

    def phase_started(self, client: int, phase: str) -> None:
        """See `Observer`."""
        self.forward(("phase_started", (client, phase)))

    def phase_finished(self, client: int, phase: str, steps: int) -> None:
        """See `Observer`."""
        self.forward(("phase_finished", (client, phase, steps)))

    def warn(self, text: str) -> None:
        """See `Observer`."""
        self.forward(("warn", (text,)))


def replay_events(events: Sequence[Event], observer: Observer) -> None:
    """Call an observer with events of another process."""
    for name, arguments in events:
        getattr(observer, name)(*arguments)


@dataclass(frozen=True)
class WorkerSetup:
    """Everything that a worker needs, except resident inputs.

    A machine holds one copy of resident inputs for all its workers. Stored inputs are part of the setup: each worker
    reads them.

    Attributes:
        method: The method without its server state.
        samples: The data set without its resident inputs.
        clients: Splits of each client that may run on the worker, by client number.
        spec: Specification of networks and training.
        baseline_dir: Folder of the local baselines; None stores none.
        store: Folder of the client states.
    """

    method: Method
    samples: Samples
    clients: Sequence[ClientSplits] | Mapping[int, ClientSplits]
    spec: FederationSpec
    baseline_dir: Path | None
    store: Path

    @classmethod
    def build(
        cls,
        method: Method,
        samples: Samples,
        clients: Sequence[ClientSplits] | Mapping[int, ClientSplits],
        spec: FederationSpec,
        baseline_dir: Path | None,
        store: Path,
    ) -> Self:
        """Build a setup from a whole method and a whole data set."""
        method = copy.copy(method)
        method.server_state = {}
        if not isinstance(samples.inputs, StoredInputs):
            samples = replace(samples, inputs=samples.inputs[:0].cpu().clone())
        return cls(method, samples, clients, spec, baseline_dir, store)


def resident_array(inputs: Inputs) -> npt.NDArray[Any] | None:
    """Return inputs as an array that workers can share; None for stored inputs."""
    return None if isinstance(inputs, StoredInputs) else np.ascontiguousarray(inputs.cpu().numpy())


@dataclass(frozen=True)
class _Data:
    samples: Samples
    clients: Sequence[ClientSplits] | Mapping[int, ClientSplits]


class ClientWorker:
    """Runs any client from a version of its stored state, one client at a time.

    Every task returns its result and the events of the client.

    Args:
        setup: Method, splits, specification and folders.
        inputs: All resident inputs, (N, C, H, W) or (N, F); a read-only view of the machine's copy. None for stored
            inputs.
        forward: Called with each event as it happens; None returns them with the result of the task.
    """

    def __init__(
        self, setup: WorkerSetup, inputs: npt.NDArray[Any] | None, forward: Callable[[Event], None] | None = None
    ) -> None:
        samples = setup.samples
        if inputs is not None:
            with exclusive(), warnings.catch_warnings():  # the filters belong to the process
                # PyTorch warns of the read-only view; nothing writes to it.
                warnings.simplefilter("ignore", UserWarning)
                samples = replace(samples, inputs=torch.from_numpy(inputs))
        self.events: list[Event] = []
        self.store = StateStore(setup.store)
        observer = EventForwarder(forward or self.events.append)
        data = _Data(samples, setup.clients)
        self.engine = SequentialEngine(setup.method, data, setup.spec, setup.baseline_dir, observer)

    def ready(self) -> bool:
        """Return True once the worker is built."""
        return True

    def local_baseline(self, number: int, rounds: int) -> tuple[LocalBaseline, list[Event]]:
        """Train the local baseline of a client."""
        self.events.clear()
        return self.engine.local_baselines({number: rounds})[number], list(self.events)

    def reference(self, number: int, reference: Reference) -> tuple[ReferenceScores, list[Event]]:
        """Train a reference of a client."""
        self.events.clear()
        return self.engine.train_references({number: reference})[number], list(self.events)

    def run_client(
        self, number: int, version: int, request: RoundRequest, personal: StateDict, becomes: int | None = None
    ) -> tuple[ClientResult, list[Event]]:
        """Run one client, from one version of its state to another.

        Args:
            number: Client number.
            version: Version of the state to start from; 0 is the initial state.
            request: Request of the round, the same object for all clients; its participants are ignored.
            personal: Personal part of the message to this client.
            becomes: Version to write; None is `version` + 1.
        """
        broadcast = Broadcast(request.broadcast.shared, {number: personal} if personal else {})
        with self.loaded(number, version):
            [result] = self.engine.run_clients(replace(request, participants=[number], broadcast=broadcast))
            self._save(number, version + 1 if becomes is None else becomes)
        if result.update is not None:
            on_cpu = {name: tensor.detach().cpu() for name, tensor in result.update.state.items()}
            result = replace(result, update=replace(result.update, state=on_cpu))
        return result, list(self.events)

    def evaluate(self, number: int, version: int) -> tuple[dict[str, float], list[Event]]:
        """Compute all metrics of a client in a version of its state."""
        with self.loaded(number, version):
            return self.engine.evaluate(number), list(self.events)

    def write_initial_state(self, number: int) -> tuple[None, list[Event]]:
        """Write version 0 of a client's state."""
        with self.loaded(number, 0):
            self._save(number, 0)
        return None, list(self.events)

    def _save(self, number: int, version: int) -> None:
        self.store.write(number, version, self.engine.client_state(number))

    @contextmanager
    def loaded(self, number: int, version: int) -> Iterator[None]:
        """Context manager: load a client into the engine, and free its memory on exit.

        Args:
            number: Client number.
            version: Version of the state; 0 is the initial state.
        """
        # A task that failed may have left the client half trained, and its events behind.
        self.engine.release(number)
        self.events.clear()
        with gc_frozen():
            if version:
                self.engine.load_client_state(number, self.store.read(number, version))
            yield
            self.engine.release(number)
            collect_trainers()
