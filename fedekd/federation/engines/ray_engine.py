"""Engine settings and executor for a Ray cluster."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy.typing as npt

from fedekd.data import FederatedDataModule
from fedekd.errors import UserError
from fedekd.federation.engines.base import Engine, EngineConfig
from fedekd.federation.engines.pool import PoolEngine, WorkerLostError
from fedekd.federation.engines.worker import ClientWorker, WorkerSetup
from fedekd.federation.interrupts import block_signals
from fedekd.federation.observer import Observer
from fedekd.methods import FederationSpec, Method
from fedekd.modules.trainer_factory import usable_cores


class Ray(EngineConfig):
    """Clients run in actors of a Ray cluster; requires `fedekd[ray]`.

    Client states are on disk between rounds, so that there may be many more clients than fit into memory. If an actor
    is lost, another one repeats the client's task from the last state, with equal results.

    Args:
        address: Running cluster, such as auto or 10.0.0.1:6379; null starts one on this machine.
        actors: Number of actors, at least 1; null fills the cluster.
        cpus: Processors per actor, at least 1; also its threads if trainer.threads is auto.
        gpus: GPUs per actor: a fraction of one, such as 0.25, or a whole number.
        folder: Folder of the client states, visible to all machines; null is a temporary folder of this machine.
        timeout: Seconds per client and round, above 0; a late client is left out of the round. Null waits.
        retries: Repetitions of a client's task after lost actors, at least 0.
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
        expected = {
            "actors": ("at least 1, or null", actors, actors is None or actors >= 1),
            "cpus": ("at least 1", cpus, cpus >= 1),
            "gpus": ("a fraction in [0, 1] or a whole number", gpus, gpus >= 0 and (gpus <= 1 or gpus % 1 == 0)),
            "timeout": ("a number above 0, or null", timeout, timeout is None or timeout > 0),
            "retries": ("at least 0", retries, retries >= 0),
        }
        for name, (allowed, value, is_valid) in expected.items():
            if not is_valid:
                raise UserError(f"engine.{name}: expected {allowed}, got {value}.")
        self.address, self.actors, self.cpus, self.gpus = address, actors, cpus, gpus
        self.folder, self.timeout, self.retries = folder, timeout, retries

    def threads(self, cores: int, clients: int) -> int:
        """Return the processors of an actor."""
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
        executor = RayExecutor(self, len(data.clients))
        return PoolEngine(method, data, spec, baseline_dir, observer, executor, self.timeout, self.retries)


class RayExecutor:
    """Starts workers as actors of a Ray cluster, which is joined at first use.

    Args:
        options: Cluster, and resources per actor.
        clients: Number of clients, the largest number of actors.
    """

    def __init__(self, options: Ray, clients: int) -> None:
        self.options, self.clients = options, clients
        self._ray = _import_ray()
        self._setup: tuple[Any, ...] = ()
        self._owns_connection = False

    def state_folder(self) -> Path | None:
        """Return `engine.folder`.

        Raises:
            UserError: If it is null and the cluster has several machines.
        """
        self.connect()
        if self.options.folder is not None:
            return Path(self.options.folder)
        if len(self._machines()) > 1:
            raise UserError("engine.folder: expected a folder that all machines of the cluster see, got null.")
        return None

    @block_signals()
    def open(self, setup: WorkerSetup, inputs: npt.NDArray[Any] | None) -> int:
        """See `Executor`."""
        actors = self._count_actors()
        self._setup = self._ray.put(setup), self._ray.put(inputs)  # one copy per machine
        return actors

    @block_signals()
    def share(self, content: Any) -> Any:
        """Store an object once per machine."""
        self.connect()
        return self._ray.put(content)

    @block_signals()
    def start(self) -> tuple[Any, Any]:
        """See `Executor`; Ray chooses the machine."""
        options = {"num_cpus": self.options.cpus, "num_gpus": self.options.gpus, "max_restarts": 0}
        actor = self._ray.remote(ClientWorker).options(**options).remote(*self._setup)
        return actor, actor.ready.remote()

    @block_signals()
    def submit(self, worker: Any, task: str, *arguments: Any) -> Any:
        """See `Executor`."""
        return getattr(worker, task).remote(*arguments)

    @block_signals()
    def wait(self, calls: Sequence[Any], count: int, timeout: float) -> list[Any]:
        """See `Executor`."""
        return list(self._ray.wait(list(calls), num_returns=count, timeout=timeout)[0])

    @block_signals()
    def result(self, call: Any) -> Any:
        """See `Executor`."""
        try:
            return self._ray.get(call)
        except self._ray.exceptions.RayTaskError as error:
            cause = getattr(error, "cause", error)
            if isinstance(cause, UserError | OSError):
                raise cause from error
            raise RuntimeError(f"in a Ray actor:\n{error}") from error
        except self._ray.exceptions.RayError as error:
            raise WorkerLostError(_reason(error)) from error

    def kill(self, worker: Any) -> None:
        """See `Executor`."""
        if self._ray.is_initialized():
            self._ray.kill(worker)

    def close(self) -> None:
        """Leave the cluster, or end it if it was started here."""
        if self._owns_connection and self._ray.is_initialized():
            self._ray.shutdown()

    def connect(self) -> None:
        """Start a cluster on this machine, or join one.

        Raises:
            UserError: If there is no cluster at the address.
        """
        ray, address = self._ray, self.options.address
        if ray.is_initialized():
            return
        quiet = {"log_to_driver": False, "configure_logging": False}
        if address is None:
            cpus = max(usable_cores(), self.options.cpus * (self.options.actors or 1))
            with block_signals():
                ray.init(address="local", num_cpus=cpus, include_dashboard=False, **quiet)
        else:
            try:
                self._require_listener(address)
                with block_signals():
                    ray.init(address=address, **quiet)
            except (ConnectionError, ValueError, RuntimeError) as error:
                raise UserError(
                    f"engine.address: expected auto, host:port or ray://host:port of a running cluster, or null to"
                    f" start one, got {address!r} ({_reason(error)})."
                ) from error
        self._owns_connection = True

    def _require_listener(self, address: str) -> None:
        """Check that a server accepts connections at host:port.

        Ray itself would retry for 12 minutes.

        Raises:
            ConnectionError: If none does.
        """
        host, _, port = address.rpartition(":")
        if "/" in host or not port.isdecimal():
            return
        host = host.strip("[]")
        if host in ("localhost", "127.0.0.1", "::1"):
            host = self._ray.util.get_node_ip_address()  # as in Ray: a cluster need not listen on the loopback
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
        except OSError as error:
            raise ConnectionError(error.strerror or str(error)) from error

    def _count_actors(self) -> int:
        """Return the number of actors: as requested or as fit, at most one per client."""
        machines, wanted, options = self._machines(), self.options.actors, self.options
        capacity = sum(map(self._capacity, machines))
        if capacity < (wanted or 1):
            cpus, gpus = (sum(machine.get(name, 0) for machine in machines) for name in ("CPU", "GPU"))
            raise UserError(
                f"engine.actors: expected at most {capacity} actors of engine.cpus {options.cpus} and engine.gpus"
                f" {options.gpus:g} on a cluster of {cpus:g} processors and {gpus:g} GPUs, got"
                f" {'null' if wanted is None else wanted}."
            )
        return min(wanted or capacity, self.clients)

    def _capacity(self, machine: Mapping[str, float]) -> int:
        """Return how many actors fit on a machine; a fraction of a GPU is of one GPU."""
        cpus, gpus = self.options.cpus, self.options.gpus
        capacity = int(machine.get("CPU", 0) // cpus)
        if gpus:
            capacity = min(capacity, int(machine.get("GPU", 0) // max(1, gpus)) * max(1, int(1 / gpus)))
        return capacity

    def _machines(self) -> list[Mapping[str, float]]:
        """Return the resources of each machine that is alive."""
        return [node["Resources"] for node in self._ray.nodes() if node["Alive"]]


def _reason(error: Exception) -> str:
    """Return the line of a Ray error that states the reason.

    It is the first line, or the last one of a trace of the actor's constructor.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return lines[-1 if "creation task" in lines[0] else 0].rstrip(".")


def _import_ray() -> ModuleType:
    # Ray's future default: an actor without GPUs still sees those of its machine.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
        import ray.exceptions
    except ImportError as error:
        raise UserError("engine: Ray is not installed. Run: pip install 'fedekd[ray]'") from error
    module: ModuleType = ray
    return module
