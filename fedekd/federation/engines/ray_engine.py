"""Clients on a Ray cluster: hundreds of them, on the processors and GPUs that it has; only updates move."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from fedekd.data import FederatedDataModule
from fedekd.errors import UserError
from fedekd.federation.engines.base import ClientResult, Engine, EngineConfig, RoundRequest
from fedekd.federation.engines.client_store import ClientStore
from fedekd.federation.engines.ray_pool import ActorPool, Room, Task, reason
from fedekd.federation.engines.remote import without_images, without_server_state
from fedekd.federation.engines.worker import WorkerSetup
from fedekd.federation.interrupts import deferred
from fedekd.federation.local_baseline import LocalBaseline
from fedekd.federation.observer import Observer, SilentObserver
from fedekd.methods import Broadcast, FederationSpec, Method, StateDict
from fedekd.modules.trainer_factory import usable_cores


class Ray(EngineConfig):
    """Clients run in actors of a Ray cluster; needs `fedekd[ray]`.

    A client's state is on disk between its visits, so that there may be many more clients than fit into memory. If an
    actor is lost, its client's visit is made again by another one, from the state before it: the numbers stay the same.

    Args:
        address: Of a running cluster, such as auto or 10.0.0.1:6379; null starts one on this machine.
        actors: How many work at a time; null takes as many as the cluster has room for.
        cpus: Processors of an actor, at least 1; also its threads, where trainer.threads does not say it.
        gpus: Of an actor, such as 1 or 0.25.
        folder: Where the clients' states lie between visits; on several machines a folder that all of them see. Null
            takes a temporary one on this machine.
        timeout: Seconds after which a visit is given up; the client is then missing from the round. Null waits on.
        retries: How often a visit is made again because its actor was lost.
    """

    def __init__(
        self,
        address: str | None = None,
        actors: int | None = None,
        cpus: int = 1,
        gpus: float = 0.0,
        folder: str | None = None,
        timeout: float | None = None,
        retries: int = 3,
    ) -> None:
        if actors is not None and actors < 1:
            raise UserError(f"engine.actors is {actors}, and must be at least 1, or null")
        if cpus < 1:
            raise UserError(f"engine.cpus is {cpus}, and must be at least 1")
        if not gpus >= 0:
            raise UserError(f"engine.gpus is {gpus}, and must be at least 0")
        if gpus > 1 and gpus != int(gpus):
            raise UserError(f"engine.gpus is {gpus}, and must be a share of one, or a whole number")
        if timeout is not None and not timeout > 0:
            raise UserError(f"engine.timeout is {timeout}, and must be above 0, or null")
        if retries < 0:
            raise UserError(f"engine.retries is {retries}, and must be at least 0")
        self.address, self.actors, self.cpus, self.gpus = address, actors, cpus, gpus
        self.folder, self.timeout, self.retries = folder, timeout, retries

    def threads(self, cores: int, clients: int) -> int:
        """As many as an actor has processors."""
        return self.cpus

    def __call__(
        self,
        method: Method,
        data: FederatedDataModule,
        spec: FederationSpec,
        baseline_dir: Path | None,
        observer: Observer,
    ) -> Engine:
        """See `EngineConfig`."""
        return RayEngine(method, data, spec, baseline_dir, observer, self)


class RayEngine:
    """Runs clients in actors of a Ray cluster, with the same numbers as one after another.

    The cluster is started or joined with the first request and left with `close`.

    Args:
        method: The method, for its two verbs on the client.
        data: The federation's data, set up.
        spec: How networks are built and trained.
        baseline_dir: Where Local's references are kept, seen by all machines; None trains them anew.
        observer: Is told of each phase, when it is over.
        options: Where, how many, and what happens if something fails.
    """

    def __init__(
        self,
        method: Method,
        data: FederatedDataModule,
        spec: FederationSpec,
        baseline_dir: Path | None = None,
        observer: Observer | None = None,
        options: Ray | None = None,
    ) -> None:
        self.observer, self.options = observer or SilentObserver(), options or Ray()
        self._ray = _imported()
        self._method, self._data, self._spec, self._references = method, data, spec, baseline_dir
        self._versions: dict[int, int] = {}  # of each client's state; 0, or none, is before its first visit
        self._begun: dict[int, int] = {}  # the newest that anybody was told to write
        self._own_cluster = self._closed = False
        self._pool: ActorPool | None = None
        self._temporary: tempfile.TemporaryDirectory[str] | None = None

    def local_baselines(self, rounds: Mapping[int, int]) -> dict[int, LocalBaseline]:
        """Local's reference for each client."""
        tasks = [Task(number, "local_baseline", (wanted,)) for number, wanted in rounds.items()]
        return {task.client: reference for task, reference in self._done(tasks)}

    def run_clients(self, request: RoundRequest) -> Iterator[ClientResult]:
        """The participants, as they get ready."""
        self._join()
        # One copy a machine, however many clients take part.
        with deferred():
            shared = self._ray.put(replace(request, broadcast=Broadcast(_on_cpu(request.broadcast.shared))))
        tasks = []
        for number in request.participants:
            arguments = self._versions.get(number, 0), shared, _on_cpu(request.broadcast.personal.get(number, {}))
            tasks.append(Task(number, "run_client", arguments, anew=partial(self._new_version, number)))
        for task, result in self._done(tasks, may_be_late=request.collect_updates):
            self._advance(task.client)
            yield result

    def score(self, number: int) -> float:
        """A client's score as it is now."""
        [(_, score)] = self._done([Task(number, "score", (self._versions.get(number, 0),))])
        return float(score)

    def client_state(self, number: int) -> Any:
        """All that must last of a client, on the CPU."""
        self._join()
        if number not in self._versions:
            list(self._done([Task(number, "begin")]))
            self._versions[number] = 0
        return self._store.read(number, self._versions[number])

    def load_client_state(self, number: int, state: Any) -> None:
        """Set a client to a state it had."""
        self._join()
        self._store.write(number, self._new_version(number), state)
        self._advance(number)

    def close(self) -> None:
        """Let the actors go, and leave the cluster, or end it if it was started here."""
        self._closed = True
        with deferred():
            if self._ray.is_initialized():
                if self._pool is not None:
                    self._pool.end()
                self._pool = None
                if self._own_cluster:
                    self._ray.shutdown()
        if self._temporary is not None:
            self._temporary.cleanup()
            self._temporary = None

    def _new_version(self, number: int) -> int:
        """One that nobody else writes: an actor that was given up may be alive, and write its own at any time."""
        self._begun[number] = self._begun.get(number, 0) + 1
        return self._begun[number]

    def _advance(self, number: int) -> None:
        """The version begun last is on disk, and a client's state; those before it are of no more use."""
        before, self._versions[number] = self._versions.get(number, 0), self._begun[number]
        for version in range(before, self._begun[number]):
            self._store.drop(number, version)

    def _done(self, tasks: Iterable[Task], may_be_late: bool = False) -> Iterator[tuple[Task, Any]]:
        """Each task with its result, as it comes; those that take longest begin first, so that nobody waits for them.

        Raises:
            UserError: If something has gone wrong that cannot be put right; the engine is then closed.
        """
        order = sorted(tasks, key=lambda task: -len(self._data.clients[task.client].train))
        try:
            yield from self._started().work_off(order, may_be_late)
        except BaseException:
            self.close()  # what the others were about to say would be taken for an answer to the next question
            raise

    def _started(self) -> ActorPool:
        """The actors, started once."""
        self._join()
        if self._pool is None:
            share = WorkerSetup(
                without_server_state(self._method),
                without_images(self._data.images),
                list(self._data.clients),
                self._spec,
                None if self._references is None else self._references.resolve(),
                self._store.folder,
            )
            pixels = np.ascontiguousarray(self._data.images.pixels.cpu().numpy())
            with deferred():
                parts = self._ray.put(share), self._ray.put(pixels)  # one copy a machine
            options = self.options
            room = Room(options.cpus, options.gpus, options.timeout, options.retries)
            self._pool = ActorPool(self._ray, self._actors(room), room, parts, self.observer)
        return self._pool

    def _join(self) -> None:
        """Start a cluster on this machine, or join one."""
        if self._closed:
            raise RuntimeError("the engine is closed, and its clients are gone; their states are in the checkpoint")
        ray, address = self._ray, self.options.address
        if ray.is_initialized():
            return
        quiet = {"log_to_driver": False, "configure_logging": False}
        if address is None:
            wanted = self.options.cpus * (self.options.actors or 1)
            with deferred():
                ray.init(address="local", num_cpus=max(usable_cores(), wanted), include_dashboard=False, **quiet)
        else:
            try:
                self._knock(address)
                with deferred():
                    ray.init(address=address, **quiet)
            except (ConnectionError, ValueError, RuntimeError) as error:
                raise UserError(
                    f"engine.address is {address!r}: no cluster is there ({reason(error)}); give auto, host:port or"
                    " ray://host:port of one that runs, or null to start one"
                ) from error
        self._own_cluster = True

    def _knock(self, address: str) -> None:
        """See whether anybody listens at host:port; Ray itself would try again for twelve minutes.

        Raises:
            ConnectionError: If nobody does.
        """
        host, _, port = address.rpartition(":")
        if "/" in host or not port.isdecimal():
            return
        host = host.strip("[]")
        if host in ("localhost", "127.0.0.1", "::1"):
            host = self._ray.util.get_node_ip_address()  # as Ray does: a cluster need not listen at the loopback
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
        except OSError as error:
            raise ConnectionError(error.strerror or str(error)) from error

    def _actors(self, room: Room) -> int:
        """How many there are to be: as many as asked, or as fit, but no more than clients."""
        machines, asked = self._machines(), self.options.actors
        fitting = sum(room.on(machine) for machine in machines)
        if fitting < (asked or 1):
            cpus, gpus = (sum(machine.get(name, 0) for machine in machines) for name in ("CPU", "GPU"))
            self.close()
            raise UserError(
                f"the cluster has {cpus:g} processors and {gpus:g} GPUs: room for {fitting} actors of engine.cpus"
                f" {room.cpus} and engine.gpus {room.gpus:g}, each on one machine, and engine.actors is"
                f" {'null' if asked is None else asked}"
            )
        return min(asked or fitting, len(self._data.clients))

    def _machines(self) -> list[Mapping[str, float]]:
        """What each machine of the cluster has; those that Ray remembers as lost are left out."""
        return [node["Resources"] for node in self._ray.nodes() if node["Alive"]]

    @cached_property
    def _store(self) -> ClientStore:
        """A folder of this engine's own; the checkpoint of the run is what lasts."""
        self._join()
        if self.options.folder is None and len(self._machines()) > 1:
            self.close()
            raise UserError(
                "engine.folder is null, and the cluster has several machines: name one that all of them see"
            )
        if self.options.folder is not None:
            Path(self.options.folder).mkdir(parents=True, exist_ok=True)
        self._temporary = tempfile.TemporaryDirectory(
            prefix="fedekd-", dir=self.options.folder, ignore_cleanup_errors=True
        )
        return ClientStore(Path(self._temporary.name).resolve())


def _on_cpu(state: StateDict) -> StateDict:
    return {name: tensor.detach().cpu() for name, tensor in state.items()}


def _imported() -> ModuleType:
    # As Ray will do by itself: an actor that has asked for no GPU is not made blind to those that are there.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
        import ray.exceptions
    except ImportError as error:
        raise UserError("engine Ray needs Ray: pip install 'fedekd[ray]'") from error
    module: ModuleType = ray
    return module
