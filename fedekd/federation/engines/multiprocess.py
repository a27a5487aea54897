"""Clients side by side in processes of one machine. Each client lives in one of them, and only updates move."""

from __future__ import annotations

import gc
import multiprocessing
import pickle
import signal
import tempfile
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from fedekd.data import ClientSplits, FederatedDataModule, ImageData
from fedekd.errors import UserError
from fedekd.federation.engines.base import ClientResult, Engine, EngineConfig, RoundRequest
from fedekd.federation.engines.remote import EventForwarder, without_images, without_server_state
from fedekd.federation.engines.sequential import SequentialEngine
from fedekd.federation.local_baseline import LocalBaseline
from fedekd.federation.observer import Observer, SilentObserver
from fedekd.federation.storage import pack, unpack
from fedekd.methods import FederationSpec, Method
from fedekd.processes import die_with_parent


class MultiProcess(EngineConfig):
    """Clients run side by side, in processes of this machine.

    Args:
        processes: How many; more than there are clients are not started.
    """

    def __init__(self, processes: int = 2) -> None:
        if processes < 1:
            raise UserError(f"engine.processes is {processes}, and must be at least 1")
        self.processes = processes

    def threads(self, cores: int, clients: int) -> int:
        """An equal share of the cores."""
        return max(1, cores // max(1, min(self.processes, clients)))  # no clients: the data say so in a moment

    def __call__(
        self,
        method: Method,
        data: FederatedDataModule,
        spec: FederationSpec,
        baseline_dir: Path | None,
        observer: Observer,
    ) -> Engine:
        """See `EngineConfig`."""
        return MultiProcessEngine(method, data, spec, baseline_dir, observer, self.processes)


@dataclass(frozen=True)
class _Share:
    """What a process is given of the data: everything but the pixels, and the file in which they lie."""

    without_images: ImageData
    clients: list[ClientSplits]
    pixels: Path
    shape: tuple[int, ...]

    @cached_property
    def images(self) -> ImageData:
        """The images, mapped: processes that train on the CPU share one copy."""
        size = int(torch.tensor(self.shape).prod())
        mapped = torch.from_file(str(self.pixels), shared=False, size=size, dtype=torch.uint8)
        return replace(self.without_images, pixels=mapped.view(self.shape))


class MultiProcessEngine:
    """Runs clients in several processes, with the same numbers as one after another.

    The processes start with the first request and end with `close`; with them end the clients.

    Args:
        method: The method, for its two verbs on the client; like the rest it must be picklable.
        data: The federation's data, set up.
        spec: How networks are built and trained.
        baseline_dir: Where Local's references are kept; None trains them anew.
        observer: Is told of each phase.
        processes: How many.
    """

    def __init__(
        self,
        method: Method,
        data: FederatedDataModule,
        spec: FederationSpec,
        baseline_dir: Path | None = None,
        observer: Observer | None = None,
        processes: int = 2,
    ) -> None:
        self.observer = observer or SilentObserver()
        self._method, self._data, self._spec, self._references = method, data, spec, baseline_dir
        self._home = _dealt_out([len(splits.train) for splits in data.clients], processes)
        self._workers: list[_Worker] = []
        self._closed = False

    def local_baselines(self, rounds: Mapping[int, int]) -> dict[int, LocalBaseline]:
        """Local's reference for each client."""
        asked = {place: {n: rounds[n] for n in rounds if self._home[n] == place} for place in self._places(rounds)}
        replies = self._ask({place: ("local_baselines", (part,)) for place, part in asked.items()})
        return {number: reference for part in replies for number, reference in part.items()}

    def run_clients(self, request: RoundRequest) -> Iterator[ClientResult]:
        """The participants, as they get ready."""
        asked = {}
        for place in self._places(request.participants):
            own = [number for number in request.participants if self._home[number] == place]
            asked[place] = ("run_clients", (request.only(own),))
        return self._ask(asked)

    def score(self, number: int) -> float:
        """A client's score as it is now."""
        score: float = self._ask_one(number, "score", number)
        return score

    def client_state(self, number: int) -> Any:
        """All that must last of a client, on the CPU."""
        return self._ask_one(number, "client_state", number)

    def load_client_state(self, number: int, state: Any) -> None:
        """Set a client to a state it had."""
        self._ask_one(number, "load_client_state", number, state)

    def close(self) -> None:
        """End the processes."""
        self._closed = True
        for worker in self._workers:
            worker.end()
        self._workers = []

    def _places(self, numbers: Sequence[int] | Mapping[int, int]) -> list[int]:
        return sorted({self._home[number] for number in numbers})

    def _ask_one(self, number: int, verb: str, *arguments: Any) -> Any:
        (reply,) = self._ask({self._home[number]: (verb, arguments)})
        return reply

    def _ask(self, asked: Mapping[int, tuple[str, tuple[Any, ...]]]) -> Iterator[Any]:
        """Let processes do something at the same time, and give what comes, as it comes.

        Raises:
            UserError: If a process has died, or has found something wrong; the engine is then closed.
        """
        if self._closed:
            raise RuntimeError("the engine is closed, and its clients are gone; their states are in the checkpoint")
        try:
            if not self._workers:
                self._start()
            for place, request in asked.items():
                self._workers[place].send(request)
            yield from self._replies({self._workers[place].connection: self._workers[place] for place in asked})
        except BaseException:
            self.close()  # what the others were about to say would be taken for an answer to the next question
            raise

    def _replies(self, busy: dict[Connection, _Worker]) -> Iterator[Any]:
        while busy:
            for connection in wait(list(busy)):
                assert isinstance(connection, Connection)
                kind, content = busy[connection].receive()
                if kind == "done":
                    del busy[connection]
                elif kind == "event":
                    name, arguments = content
                    getattr(self.observer, name)(*arguments)
                elif kind == "error":
                    raise content
                else:
                    yield content

    def _start(self) -> None:
        """Start all processes at once, and give each its part of the federation."""
        with tempfile.TemporaryDirectory(prefix="fedekd-", ignore_cleanup_errors=True) as folder:
            images = self._data.images
            pixels = Path(folder) / "pixels"
            images.pixels.cpu().numpy().tofile(pixels)
            share = _Share(without_images(images), list(self._data.clients), pixels, tuple(images.pixels.shape))
            parts = pickle.dumps((without_server_state(self._method), share, self._spec, self._references))
            for place in range(max(self._home) + 1):
                self._workers.append(_Worker([n for n, home in enumerate(self._home) if home == place]))
            for worker in self._workers:
                worker.send_bytes(parts)
            # Once all have mapped the pixels, their file may go: a killed run leaves nothing behind.
            for _ in self._replies({worker.connection: worker for worker in self._workers}):
                pass


class _Worker:
    """A process, and the way to it."""

    def __init__(self, clients: list[int]) -> None:
        self.clients, self.answered = clients, False
        # Forked processes cannot use CUDA, nor the parent's thread pools.
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs,), daemon=True)
        with _signals_held_back():
            self.process.start()
        theirs.close()

    def send(self, request: Any) -> None:
        self.send_bytes(pickle.dumps(request))

    def send_bytes(self, message: bytes) -> None:
        try:
            self.connection.send_bytes(message)
        except OSError as error:
            raise self._lost() from error

    def receive(self) -> tuple[str, Any]:
        try:
            message: tuple[str, Any] = pickle.loads(self.connection.recv_bytes())
        except (EOFError, OSError) as error:
            raise self._lost() from error
        self.answered = True
        return message

    def _lost(self) -> UserError:
        self.process.join(5)
        code = self.process.exitcode
        if not self.answered and code == 1:
            return UserError(
                "a process for clients could not start (its error stands above); a script that uses MultiProcess needs"
                " `if __name__ == '__main__':` around what it does"
            )
        clients = ", ".join(map(str, self.clients))
        why = "killed, perhaps for want of memory: try fewer engine.processes" if code == -9 else f"exit code {code}"
        return UserError(
            f"the process of the clients {clients} has died ({why}); what was finished is kept: use fit --resume"
        )

    def end(self) -> None:
        self.connection.close()  # which an idle process takes for the end
        self.process.join(0.2)
        self.process.kill()
        self.process.join()


@contextmanager
def _signals_held_back() -> Iterator[None]:
    """A process that is started inside is never reached by Ctrl-C or SIGTERM: only its parent decides when it ends."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _dealt_out(sizes: Sequence[int], processes: int) -> list[int]:
    """Which process each client goes to: the largest first, each to where least work is.

    Example:
        >>> _dealt_out([10, 70, 20, 50], 2)
        [0, 0, 1, 1]
    """
    work = [0] * min(processes, len(sizes))
    homes = [0] * len(sizes)
    for number in sorted(range(len(sizes)), key=lambda number: -sizes[number]):
        homes[number] = work.index(min(work))
        work[homes[number]] += sizes[number]
    return homes


class _Unasked(BaseException):
    """Nobody is there any more to be told anything."""


def _serve(connection: Connection) -> None:
    """What a process does: answer until nobody asks any more."""
    die_with_parent()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # a library's thread may not hold it back

    def tell(kind: str, content: Any = None) -> None:
        message = pickle.dumps((kind, content))
        try:
            connection.send_bytes(message)
        except OSError as error:
            raise _Unasked from error

    def asked() -> Any:
        try:
            message = connection.recv_bytes()
        except (EOFError, OSError) as error:
            raise _Unasked from error
        return message

    with suppress(_Unasked):
        engine: SequentialEngine | None = None
        while True:
            message = asked()
            try:
                if engine is None:
                    method, share, spec, references = pickle.loads(message)
                    observer = EventForwarder(lambda name, arguments: tell("event", (name, arguments)))
                    engine = SequentialEngine(method, share, spec, references, observer)
                    gc.collect()
                    gc.freeze()  # what has been imported stays: collections need not walk it
                else:
                    for answer in _answers(engine, *pickle.loads(message)):
                        tell("reply", answer)
            except (UserError, OSError) as error:
                tell("error", error)
            except (AttributeError, ImportError, pickle.UnpicklingError) as error:
                hint = f"{error}; what runs in another process must be importable there: put it into a module"
                tell("error", UserError(hint) if engine is None else _told_whole())
            except Exception:
                tell("error", _told_whole())
            tell("done")
    gc.unfreeze()  # extension modules complain at exit of what is still frozen


def _told_whole() -> RuntimeError:
    return RuntimeError(f"in the process of a client:\n{traceback.format_exc()}")


def _answers(engine: SequentialEngine, verb: str, arguments: tuple[Any, ...]) -> Iterator[Any]:
    """One for each visit; one for anything else."""
    if verb == "run_clients":
        yield from engine.run_clients(*arguments)
        gc.collect()  # as the round loop does: Trainers hold on to each other, and to what they trained
    elif verb == "client_state":
        yield unpack(pack(engine.client_state(*arguments)))  # on the CPU
    else:
        yield getattr(engine, verb)(*arguments)
