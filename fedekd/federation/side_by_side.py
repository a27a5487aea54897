"""Clients side by side in processes of one machine. Each client lives in one of them, and only updates move."""

from __future__ import annotations

import gc
import multiprocessing
import pickle
import signal
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from fedekd.data import ClientSplits, FederatedDataModule, ImageData
from fedekd.errors import UserError
from fedekd.federation.engine import Engine, InProcessEngine, Placement, Visit
from fedekd.federation.observer import Observer, SilentObserver
from fedekd.federation.reference import LocalReference
from fedekd.methods import Blueprint, Broadcast, Method
from fedekd.processes import die_with_parent


class SideBySide(Placement):
    """Clients run side by side, in processes of this machine.

    Args:
        processes: How many; more than there are clients are not started.
    """

    def __init__(self, processes: int = 2) -> None:
        if processes < 1:
            raise UserError(f"engine.processes is {processes}, and must be at least 1")
        self.processes = processes

    def threads(self, cores: int) -> int:
        """An equal share of the cores."""
        return max(1, cores // self.processes)

    def __call__(
        self,
        method: Method,
        data: FederatedDataModule,
        blueprint: Blueprint,
        reference_folder: Path | None,
        observer: Observer,
    ) -> Engine:
        """See `Placement`."""
        return SideBySideEngine(method, data, blueprint, reference_folder, observer, self.processes)


@dataclass(frozen=True)
class _Share:
    """What a process is given of the data: everything but the pixels, and the file in which they lie."""

    without_pixels: ImageData
    clients: list[ClientSplits]
    pixels: Path
    shape: tuple[int, ...]

    @property
    def images(self) -> ImageData:
        """The images, mapped: the processes of a machine share one copy."""
        size = int(torch.tensor(self.shape).prod())
        mapped = torch.from_file(str(self.pixels), shared=False, size=size, dtype=torch.uint8)
        return replace(self.without_pixels, images=mapped.view(self.shape))


class SideBySideEngine:
    """Runs clients in several processes, with the same numbers as one after another.

    Args:
        method: The method, for its two verbs on the client.
        data: The federation's data, set up.
        blueprint: How networks are built and trained.
        reference_folder: Where Local's references are kept; None trains them anew.
        observer: Is told of each phase.
        processes: How many.
    """

    def __init__(
        self,
        method: Method,
        data: FederatedDataModule,
        blueprint: Blueprint,
        reference_folder: Path | None = None,
        observer: Observer | None = None,
        processes: int = 2,
    ) -> None:
        self.observer = observer or SilentObserver()
        self._make: Callable[[_Share], tuple[Any, ...]] = lambda share: (method, share, blueprint, reference_folder)
        self._data = data
        self._home = _dealt_out([len(splits.train) for splits in data.clients], processes)
        self._workers: list[_Worker] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def references(self, rounds: Mapping[int, int]) -> dict[int, LocalReference]:
        """Local's reference for each client."""
        asked = {place: {n: rounds[n] for n in rounds if self._home[n] == place} for place in self._places(rounds)}
        replies = self._ask({place: ("references", (part,)) for place, part in asked.items()})
        return {number: reference for part in replies for number, reference in part.items()}

    def visit(self, participants: Sequence[int], broadcast: Broadcast, round: int, upload: bool) -> Iterator[Visit]:
        """The participants, as they get ready."""
        asked = {}
        for place in self._places(participants):
            own = [number for number in participants if self._home[number] == place]
            asked[place] = ("visit", (own, broadcast.only(own), round, upload))
        return self._ask(asked)

    def score(self, number: int) -> float:
        """A client's score as it is now."""
        score: float = self._ask_one(number, "score", number)
        return score

    def client_state(self, number: int) -> Any:
        """All that must last of a client."""
        return self._ask_one(number, "client_state", number)

    def load_client_state(self, number: int, state: Any) -> None:
        """Set a client to a state it had."""
        self._ask_one(number, "load_client_state", number, state)

    def close(self) -> None:
        """End the processes, and remove the pixels that they shared."""
        for worker in self._workers:
            worker.end()
        self._workers = []
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def _places(self, numbers: Sequence[int] | Mapping[int, int]) -> list[int]:
        return sorted({self._home[number] for number in numbers})

    def _ask_one(self, number: int, verb: str, *arguments: Any) -> Any:
        (reply,) = self._ask({self._home[number]: (verb, arguments)})
        return reply

    def _ask(self, asked: Mapping[int, tuple[str, tuple[Any, ...]]]) -> Iterator[Any]:
        """Let processes do something at the same time, and give what comes, as it comes.

        Raises:
            UserError: If a process has died.
        """
        if not self._workers:
            self._start()
        for place, request in asked.items():
            self._workers[place].send(request)
        busy = {self._workers[place].connection: self._workers[place] for place in asked}
        while busy:
            for connection in wait(list(busy)):
                worker = busy[connection]  # type: ignore[index]
                kind, content = worker.receive()
                if kind == "done":
                    del busy[worker.connection]
                elif kind == "event":
                    name, arguments = content
                    getattr(self.observer, name)(*arguments)
                elif kind == "error":
                    raise content
                else:
                    yield content

    def _start(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="fedekd-")
        images = self._data.images
        pixels = Path(self._folder.name) / "pixels"
        pixels.write_bytes(images.images.cpu().numpy().tobytes())
        share = _Share(
            replace(images, images=torch.empty(0, *images.images.shape[1:], dtype=torch.uint8)),
            list(self._data.clients),
            pixels,
            tuple(images.images.shape),
        )
        for place in range(max(self._home) + 1):
            own = [number for number, home in enumerate(self._home) if home == place]
            self._workers.append(_Worker(own, pickle.dumps(self._make(share))))


class _Worker:
    """A process, and the way to it."""

    def __init__(self, clients: list[int], parts: bytes) -> None:
        self.clients = clients
        # Forked processes cannot use CUDA, nor the parent's thread pools.
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process: BaseProcess = context.Process(target=_serve, args=(theirs, parts), daemon=True)
        self.process.start()
        theirs.close()

    def send(self, request: Any) -> None:
        try:
            self.connection.send_bytes(pickle.dumps(request))
        except OSError as error:
            raise self._lost() from error

    def receive(self) -> tuple[str, Any]:
        try:
            message: tuple[str, Any] = pickle.loads(self.connection.recv_bytes())
        except (EOFError, OSError) as error:
            raise self._lost() from error
        return message

    def _lost(self) -> UserError:
        self.process.join(5)
        clients = ", ".join(map(str, self.clients))
        return UserError(
            f"the process of the clients {clients} has died (exit code {self.process.exitcode}; out of memory, if it is"
            " -9); what was finished is kept: use fit --resume, or fewer engine.processes"
        )

    def end(self) -> None:
        self.connection.close()
        self.process.terminate()
        self.process.join()


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


class _Forwarder(SilentObserver):
    """Tells the other side."""

    def __init__(self, tell: Callable[[str, Any], None]) -> None:
        self.tell = tell

    def phase_started(self, client: int, phase: str) -> None:
        self.tell("event", ("phase_started", (client, phase)))

    def phase_finished(self, client: int, phase: str, steps: int) -> None:
        self.tell("event", ("phase_finished", (client, phase, steps)))

    def warn(self, text: str) -> None:
        self.tell("event", ("warn", (text,)))


def _serve(connection: Connection, parts: bytes) -> None:
    """What a process does: answer until nobody asks any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all of a terminal's processes; the parent decides
    die_with_parent()

    def tell(kind: str, content: Any = None) -> None:
        connection.send_bytes(pickle.dumps((kind, content)))

    method, share, blueprint, reference_folder = pickle.loads(parts)
    engine: Engine | None = None
    while True:
        try:
            verb, arguments = pickle.loads(connection.recv_bytes())
        except (EOFError, OSError):
            return
        try:
            if engine is None:
                engine = InProcessEngine(method, share, blueprint, reference_folder, _Forwarder(tell))
            reply = getattr(engine, verb)(*arguments)
            if verb == "visit":
                for visit in reply:
                    tell("reply", visit)
                gc.collect()  # as the parent does: Trainers hold on to what they trained
            else:
                tell("reply", reply)
        except UserError as error:
            tell("error", error)
        except Exception:
            tell("error", RuntimeError(f"in the process of a client:\n{traceback.format_exc()}"))
        tell("done")
