"""Engine that runs clients on a pool of workers.

Workers are processes of this machine or actors of a Ray cluster.

The state of a client is on disk between its rounds, so that any worker can run any client. The executor decides where
the workers are; everything else is here.
"""

from __future__ import annotations

import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

import numpy.typing as npt

from fedekd.data import FederatedDataModule
from fedekd.errors import UserError
from fedekd.federation.engines.base import ClientResult, RoundRequest
from fedekd.federation.engines.worker import DamagedStateError, StateStore, WorkerSetup, replay_events, resident_array
from fedekd.federation.interrupts import block_signals
from fedekd.federation.local_baseline import LocalBaseline
from fedekd.federation.observer import Observer, SilentObserver
from fedekd.federation.references import Reference, ReferenceScores
from fedekd.methods import Broadcast, FederationSpec, Method, StateDict

#: End of an error message after which the run can continue.
RESUME = "Saved rounds are kept; continue with fit --resume."


class WorkerLostError(Exception):
    """A worker ended before it returned a result; the message is the reason."""


class Executor(Protocol):
    """Starts workers and calls their methods.

    Workers and pending calls are opaque, hashable objects.
    """

    def state_folder(self) -> Path | None:
        """Return a folder visible to all workers; None is this machine's temporary one."""
        ...

    def open(self, setup: WorkerSetup, inputs: npt.NDArray[Any] | None) -> int:
        """Store the arguments of `ClientWorker`, and return the number of workers."""
        ...

    def share(self, content: Any) -> Any:
        """Return an argument for many calls, if possible stored once per machine."""
        ...

    def start(self) -> tuple[Any, Any]:
        """Start a worker, and return it with the pending call of `ClientWorker.ready`."""
        ...

    def submit(self, worker: Any, task: str, *arguments: Any) -> Any:
        """Call a method of a worker, and return the pending call."""
        ...

    def wait(self, calls: Sequence[Any], count: int, timeout: float) -> list[Any]:
        """Return finished calls, as soon as there are `count` or after `timeout` seconds."""
        ...

    def result(self, call: Any) -> Any:
        """Return the result of a finished call.

        Raises:
            WorkerLostError: If the worker ended.
        """
        ...

    def kill(self, worker: Any) -> None:
        """End a worker in any state."""
        ...

    def close(self) -> None:
        """Release everything except the workers, which the pool has killed."""
        ...


@dataclass(frozen=True)
class Task:
    """Call of a `ClientWorker` method for one client.

    Attributes:
        client: Client number.
        name: Method of `ClientWorker`.
        arguments: Its arguments after the client number.
        per_attempt: Returns the last argument, a new one for each attempt; None if attempts do not differ.
    """

    client: int
    name: str
    arguments: tuple[Any, ...] = ()
    per_attempt: Callable[[], Any] | None = None


class WorkerPool:
    """Runs tasks on equal workers: assigns, repeats and drops them.

    Args:
        executor: Starts workers and calls them.
        workers: Number of workers.
        timeout: Seconds after which a task is dropped and its worker replaced; None waits without limit.
        retries: How often the task of a client is repeated because its worker was lost.
        observer: Called with the events of a task when the task is finished, and with warnings.
        labels: Each client in words, such as `site 'cleveland'`. Default: `client 0` etc.
    """

    def __init__(
        self,
        executor: Executor,
        workers: int,
        timeout: float | None,
        retries: int,
        observer: Observer,
        labels: Sequence[str] | None = None,
    ) -> None:
        self._labels = labels
        self._executor, self._timeout, self._retries, self._observer = executor, timeout, retries, observer
        self._starting: dict[Any, Any] = {}  # by pending call: worker
        self._idle: list[Any] = []
        self._busy: dict[Any, tuple[Task, Any, float]] = {}  # by pending call: task, worker, time of the call
        for _ in range(workers):
            self._start()

    def run(self, tasks: Sequence[Task], may_be_late: bool = False) -> Iterator[tuple[Task, Any]]:
        """Run tasks in order on idle workers.

        Args:
            tasks: The tasks; those of lost workers are repeated before all others.
            may_be_late: Drop a task that exceeds the timeout, with a warning, instead of raising an error.

        Yields:
            Each task with its result, as it finishes.

        Raises:
            UserError: If a client exceeded the retries or, unless it may be late, the timeout.
        """
        waiting, losses = deque(tasks), dict.fromkeys((task.client for task in tasks), 0)
        while waiting or self._busy:
            while waiting and self._idle:
                self._assign(waiting.popleft())
            for call in self._executor.wait([*self._busy, *self._starting], 1, 0.5):
                if call in self._starting:
                    self._finish_start(call)
                    continue
                task, worker, _ = self._busy.pop(call)
                try:
                    result, events = self._executor.result(call)
                except WorkerLostError as error:
                    self._replace(worker)  # it may be alive and only unreachable
                    losses[task.client] += 1
                    self._report_loss(task.client, losses[task.client], str(error))
                    waiting.appendleft(task)
                except Exception:
                    # The worker has answered, and is closed with the others: the interpreter waits for it at exit.
                    self._idle.append(worker)
                    raise
                else:
                    self._idle.append(worker)
                    replay_events(events, self._observer)
                    yield task, result
            for task in self._drop_overdue():
                reason = f"{self._label(task.client)} exceeded engine.timeout, {self._timeout:g} s"
                if not may_be_late:
                    raise UserError(f"{reason}. The last round needs every client: raise it. {RESUME}")
                self._observer.warn(f"{reason}, and is missing from this round")

    def close(self) -> None:
        """Kill all workers."""
        with block_signals():
            for worker in (*self._idle, *self._starting.values(), *(worker for _, worker, _ in self._busy.values())):
                self._executor.kill(worker)
        self._idle.clear()
        self._starting.clear()
        self._busy.clear()

    def _start(self) -> None:
        with block_signals():
            worker, call = self._executor.start()
            self._starting[call] = worker

    def _finish_start(self, call: Any) -> None:
        try:
            self._executor.result(call)
        except WorkerLostError as error:
            raise UserError(f"a worker could not start: {error}") from error
        self._idle.append(self._starting.pop(call))

    def _assign(self, task: Task) -> None:
        with block_signals():
            worker = self._idle.pop()
            last = () if task.per_attempt is None else (task.per_attempt(),)
            call = self._executor.submit(worker, task.name, task.client, *task.arguments, *last)
            self._busy[call] = task, worker, time.monotonic()

    def _replace(self, worker: Any) -> None:
        with block_signals():
            self._executor.kill(worker)
        self._start()

    def _report_loss(self, client: int, losses: int, reason: str) -> None:
        if losses > self._retries:
            raise UserError(
                f"{self._label(client)}: {losses} workers lost ({reason}), expected at most {self._retries}. {RESUME}"
            )
        self._observer.warn(f"the worker of {self._label(client)} was lost ({reason}); another worker repeats its task")

    def _label(self, client: int) -> str:
        return f"client {client}" if self._labels is None else self._labels[client]

    def _drop_overdue(self) -> list[Task]:
        """Remove tasks that exceeded the timeout, and replace their workers."""
        if self._timeout is None:
            return []
        late = [call for call, (_, _, since) in self._busy.items() if time.monotonic() - since > self._timeout]
        if late:  # a call that finished while another result was processed is not late
            finished = self._executor.wait(late, len(late), 0.0)
            late = [call for call in late if call not in finished]
        dropped = []
        for call in late:
            task, worker, _ = self._busy.pop(call)
            self._replace(worker)
            dropped.append(task)
        return dropped


class PoolEngine:
    """Runs clients on a pool of workers, with the results of `SequentialEngine`.

    Workers start with the first request and end with `close`.

    Args:
        method: The method; like the data and the specification it must be picklable.
        data: Data and partition.
        spec: Specification of networks and training.
        baseline_dir: Folder of the local baselines, visible to all workers; None stores none.
        observer: Receives events and warnings.
        executor: Where the workers run.
        timeout: See `WorkerPool`.
        retries: See `WorkerPool`.
    """

    has_seeded_noise = True

    def __init__(
        self,
        method: Method,
        data: FederatedDataModule,
        spec: FederationSpec,
        baseline_dir: Path | None,
        observer: Observer | None,
        executor: Executor,
        timeout: float | None = None,
        retries: int = 0,
    ) -> None:
        self.observer, self.executor = observer or SilentObserver(), executor
        self._method, self._data, self._spec, self._baseline_dir = method, data, spec, baseline_dir
        self._timeout, self._retries = timeout, retries
        self._versions: dict[int, int] = {}  # by client: version of its state; 0 is the initial state
        self._assigned: dict[int, int] = {}  # by client: newest version that any worker was given to write
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._pool: WorkerPool | None = None
        self._closed = False

    def local_baselines(self, rounds: Mapping[int, int]) -> dict[int, LocalBaseline]:
        """See `Engine`."""
        tasks = [Task(number, "local_baseline", (wanted,)) for number, wanted in rounds.items()]
        return {task.client: baseline for task, baseline in self._run(tasks)}

    def train_references(self, references: Mapping[int, Reference]) -> dict[int, ReferenceScores]:
        """See `Engine`."""
        tasks = [Task(number, "reference", (reference,)) for number, reference in references.items()]
        return {task.client: scores for task, scores in self._run(tasks)}

    def run_clients(self, request: RoundRequest) -> Iterator[ClientResult]:
        """Yield the results as the clients finish."""
        with self._open():
            shared = self.executor.share(replace(request, broadcast=Broadcast(_on_cpu(request.broadcast.shared))))
        tasks = []
        for number in request.participants:
            arguments = self._versions.get(number, 0), shared, _on_cpu(request.broadcast.personal.get(number, {}))
            tasks.append(Task(number, "run_client", arguments, per_attempt=partial(self._new_version, number)))
        for task, result in self._run(tasks, may_be_late=request.collect_updates):
            self._advance(task.client)
            yield result

    def evaluate(self, number: int) -> dict[str, float]:
        """See `Engine`."""
        [(_, metrics)] = self._run([Task(number, "evaluate", (self._versions.get(number, 0),))])
        return dict(metrics)

    def client_state(self, number: int) -> Any:
        """Return the serialized state of a client."""
        if number not in self._versions:
            list(self._run([Task(number, "write_initial_state")]))
            self._versions[number] = 0
        with self._open():
            return self._store.read_packed(number, self._versions[number])

    def load_client_state(self, number: int, state: Any) -> None:
        """See `Engine`."""
        with self._open():
            self._store.write(number, self._new_version(number), state)
            self._advance(number)

    def close(self) -> None:
        """Kill the workers, and remove the states."""
        self._closed = True
        with block_signals():
            if self._pool is not None:
                self._pool.close()
                self._pool = None
            self.executor.close()
        if self._temporary is not None:
            self._temporary.cleanup()
            self._temporary = None

    def _new_version(self, number: int) -> int:
        """Return a version that no other worker writes.

        A worker that was given up may still write its own.
        """
        self._assigned[number] = self._assigned.get(number, 0) + 1
        return self._assigned[number]

    def _advance(self, number: int) -> None:
        """Make the newest version the state of a client, and drop older ones."""
        before, self._versions[number] = self._versions.get(number, 0), self._assigned[number]
        for version in range(before, self._assigned[number]):
            self._store.drop(number, version)

    def _run(self, tasks: Iterable[Task], may_be_late: bool = False) -> Iterator[tuple[Task, Any]]:
        """Run tasks, the largest clients first, so that the last worker finishes early."""
        with self._open():
            order = sorted(tasks, key=lambda task: -len(self._data.clients[task.client].train))
            yield from self._started().run(order, may_be_late)

    @contextmanager
    def _open(self) -> Iterator[None]:
        """Context manager: require an open engine, and close it on an error.

        An error leaves pending calls, whose results would be read as those of the next request.
        """
        if self._closed:
            raise RuntimeError("the engine is closed; the states of its clients are in the checkpoint")
        try:
            yield
        except DamagedStateError as error:
            self.close()
            raise UserError(f"{error}. {RESUME}") from error
        except BaseException:
            self.close()
            raise

    def _started(self) -> WorkerPool:
        if self._pool is None:
            samples, clients = self._data.samples, list(self._data.clients)
            baseline_dir = None if self._baseline_dir is None else self._baseline_dir.resolve()
            setup = WorkerSetup.build(self._method, samples, clients, self._spec, baseline_dir, self._store.folder)
            workers = self.executor.open(setup, resident_array(samples.inputs))
            labels = [splits.label for splits in clients]
            self._pool = WorkerPool(self.executor, workers, self._timeout, self._retries, self.observer, labels)
        return self._pool

    @cached_property
    def _store(self) -> StateStore:
        """Temporary store of this engine; the checkpoint of the run is what lasts."""
        folder = self.executor.state_folder()
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        self._temporary = tempfile.TemporaryDirectory(prefix="fedekd-", dir=folder, ignore_cleanup_errors=True)
        return StateStore(Path(self._temporary.name).resolve())


def _on_cpu(state: StateDict) -> StateDict:
    return {name: tensor.detach().cpu() for name, tensor in state.items()}
