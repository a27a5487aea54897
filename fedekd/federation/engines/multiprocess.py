"""Engine settings and executor for processes of this machine."""

from __future__ import annotations

import gc
import multiprocessing
import pickle
import signal
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedekd.atomic import name_in_errors
from fedekd.child_process import die_with_parent
from fedekd.data import FederatedDataModule, StoredInputs
from fedekd.errors import UserError, describe_error
from fedekd.federation.engines.base import Engine, EngineConfig
from fedekd.federation.engines.pool import PoolEngine, WorkerLostError
from fedekd.federation.engines.worker import ClientWorker, WorkerSetup, replay_events
from fedekd.federation.observer import Observer
from fedekd.methods import FederationSpec, Method


class MultiProcess(EngineConfig):
    """Clients run in parallel processes of this machine.

    Args:
        processes: Number of processes, at least 1; no more start than there are clients.
    """

    def __init__(self, processes: int = 2) -> None:
        if processes < 1:
            raise UserError(f"engine.processes: expected at least 1, got {processes}.")
        self.processes = processes

    def threads(self, cores: int, clients: int) -> int:
        """Return an equal share of the cores."""
        return max(1, cores // max(1, min(self.processes, clients)))  # 0 clients is an error of the data module

    def __call__(
        self,
        method: Method,
        data: FederatedDataModule,
        spec: FederationSpec,
        baseline_dir: Path | None,
        observer: Observer,
    ) -> Engine:
        """See `EngineConfig`."""
        executor = ProcessExecutor(min(self.processes, len(data.clients)), observer)
        return PoolEngine(method, data, spec, baseline_dir, observer, executor)


class ProcessExecutor:
    """Starts workers as processes of this machine.

    Args:
        processes: Number of processes.
        observer: Called with the events of clients as they happen.
    """

    def __init__(self, processes: int, observer: Observer) -> None:
        self.processes, self.observer = processes, observer
        self._setup, self._folder = b"", Path()

    def state_folder(self) -> None:
        """See `Executor`."""

    def open(self, setup: WorkerSetup, inputs: npt.NDArray[Any] | None) -> int:
        """Write resident inputs to a file that all processes map.

        On the CPU they share one copy.
        """
        self._folder = setup.store
        layout = None
        if inputs is not None:
            path = self._folder / "inputs"
            with name_in_errors(path), path.open("wb") as file:
                file.write(inputs.data)
            layout = inputs.shape, inputs.dtype
        self._setup = _pickled(setup, layout)
        return self.processes

    def share(self, content: Any) -> Any:
        """See `Executor`."""
        return content

    def start(self) -> tuple[_Process, _Process]:
        """See `Executor`; a process has at most one pending call, and stands for it."""
        process = _Process(self._folder, self._setup)
        return process, process

    def submit(self, worker: _Process, task: str, *arguments: Any) -> _Process:
        """See `Executor`."""
        worker.send(pickle.dumps((task, arguments)))
        return worker

    def wait(self, calls: Sequence[_Process], count: int, timeout: float) -> list[_Process]:
        """See `Executor`; events are passed on as they arrive."""
        by_connection = {call.connection: call for call in calls}
        finished = []
        for connection in wait(list(by_connection), timeout):
            call = by_connection[connection]  # type: ignore[index]
            if (event := call.receive()) is None:
                finished.append(call)
            else:
                replay_events([event], self.observer)
        return finished

    def result(self, call: _Process) -> Any:
        """See `Executor`."""
        kind, content = call.answer
        if kind == "error":
            raise content
        return content

    def kill(self, worker: _Process) -> None:
        """See `Executor`."""
        worker.connection.close()  # an idle process then ends by itself
        worker.process.join(0.2)
        worker.process.kill()
        worker.process.join()

    def close(self) -> None:
        """See `Executor`."""


def _pickled(setup: WorkerSetup, layout: Any) -> bytes:
    try:
        return pickle.dumps((setup, layout))
    except Exception as error:  # a user's data set may raise anything
        if not isinstance(setup.samples.inputs, StoredInputs):
            raise
        raise UserError(
            "engine: expected a data set that can be pickled for other processes, without open files and lambda"
            f" functions, got one that fails with {describe_error(error, 120)}. Use --engine Sequential"
        ) from error


class _Process:
    """A worker process and its connection."""

    def __init__(self, folder: Path, setup: bytes) -> None:
        self.answer: tuple[str, Any] = ("", None)
        self.has_answered = False
        # A forked process could use neither CUDA nor the thread pools of its parent.
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, folder), daemon=True)
        with _signals_masked():
            self.process.start()
        theirs.close()
        self.send(setup)

    def send(self, message: bytes) -> None:
        with suppress(OSError):  # the process has ended: `receive` reports it
            self.connection.send_bytes(message)

    def receive(self) -> Any:
        """Receive one message: return an event, or store the answer and return None."""
        try:
            kind, content = pickle.loads(self.connection.recv_bytes())
        except (EOFError, OSError):
            kind, content = "error", WorkerLostError(self._reason())
        if kind == "event":
            return content
        self.answer, self.has_answered = (kind, content), True
        return None

    def _reason(self) -> str:
        self.process.join(5)
        code = self.process.exitcode
        if not self.has_answered and code == 1:
            return "its error is printed above; a script that uses MultiProcess needs `if __name__ == '__main__':`"
        return "killed, perhaps for lack of memory: reduce engine.processes" if code == -9 else f"exit code {code}"


@contextmanager
def _signals_masked() -> Iterator[None]:
    """Context manager: processes started inside receive neither SIGINT nor SIGTERM.

    Their parent ends them.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _ParentGoneError(BaseException):
    """Raised in a worker process when its parent has ended."""


def _serve(connection: Connection, folder: Path) -> None:
    """Build the worker, then answer calls until the connection closes."""
    die_with_parent(folder)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the mask does not hold in threads that libraries start

    def send(kind: str, content: Any) -> None:
        message = pickle.dumps((kind, content))
        try:
            connection.send_bytes(message)
        except OSError as error:
            raise _ParentGoneError from error

    def receive() -> bytes:
        try:
            return connection.recv_bytes()
        except (EOFError, OSError) as error:
            raise _ParentGoneError from error

    with suppress(_ParentGoneError):
        worker: ClientWorker | None = None
        while True:
            message = receive()
            try:
                if worker is None:
                    setup, layout = pickle.loads(message)
                    inputs = None
                    if layout is not None:
                        shape, dtype = layout
                        inputs = np.asarray(np.memmap(folder / "inputs", dtype, "r", shape=shape))
                    worker = ClientWorker(setup, inputs, forward=lambda event: send("event", event))
                    gc.collect()
                    gc.freeze()  # as `gc_frozen`, for the life of the process
                    send("result", True)
                else:
                    task, arguments = pickle.loads(message)
                    send("result", getattr(worker, task)(*arguments))
            except (UserError, OSError) as error:
                send("error", error)
            except (AttributeError, ImportError, pickle.UnpicklingError) as error:
                hint = f"{error}. Classes that run in another process must be importable: move them to a module."
                send("error", UserError(hint) if worker is None else _with_trace(error))
            except Exception as error:
                send("error", _with_trace(error))
    gc.unfreeze()  # extension modules warn at exit about frozen objects


def _with_trace(error: Exception) -> RuntimeError:
    """Return an exception that can be sent, with the notes and the traceback."""
    trace = "".join(traceback.format_exception(error))
    sent = RuntimeError(f"{type(error).__name__}: {error}, in a worker process:\n{trace}")
    for note in getattr(error, "__notes__", []):
        sent.add_note(note)
    return sent
