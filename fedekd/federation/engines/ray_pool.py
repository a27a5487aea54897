"""Actors of a Ray cluster that work tasks off: who is idle, who is busy, who was lost, and who takes too long."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from fedekd.errors import UserError
from fedekd.federation.engines.worker import ClientWorker, Event, replay_events
from fedekd.federation.interrupts import deferred
from fedekd.federation.observer import Observer


@dataclass(frozen=True)
class Task:
    """Something that an actor is to do for a client.

    Attributes:
        client: The client's number.
        verb: A method of `ClientWorker`.
        arguments: Of it, beside the number.
        anew: Gives the last argument, another one for each attempt; None where all attempts are alike.
    """

    client: int
    verb: str
    arguments: tuple[Any, ...] = ()
    anew: Callable[[], Any] | None = None


@dataclass(frozen=True)
class Room:
    """What an actor takes up, and what is borne of it.

    Attributes:
        cpus: Processors of an actor.
        gpus: Of an actor.
        timeout: Seconds after which a task is given up; None waits on.
        retries: How often a task is done again because its actor was lost.
    """

    cpus: int
    gpus: float
    timeout: float | None
    retries: int

    def on(self, machine: Mapping[str, float]) -> int:
        """How many actors fit on a machine that has so many `CPU` and `GPU`; a share of a GPU is of one GPU."""
        fitting = int(machine.get("CPU", 0) // self.cpus)
        if self.gpus:
            fitting = min(fitting, int(machine.get("GPU", 0) // max(1, self.gpus)) * max(1, int(1 / self.gpus)))
        return fitting


class ActorPool:
    """Actors, all alike, that do any client's tasks.

    Args:
        ray: The module, in a cluster.
        actors: How many.
        room: What each of them takes up.
        parts: What each is made of: references to the arguments of `ClientWorker`.
        observer: Is told what happens, when a task is over, and what goes wrong.
    """

    def __init__(self, ray: ModuleType, actors: int, room: Room, parts: Sequence[Any], observer: Observer) -> None:
        self._ray, self._room, self._parts, self._observer = ray, room, tuple(parts), observer
        self._starting: dict[Any, Any] = {}  # by the word that they are ready
        self._idle: list[Any] = []
        self._busy: dict[Any, tuple[Task, Any, float]] = {}  # by what will come: what it is, from whom, since when
        for _ in range(actors):
            self._start()

    def work_off(self, tasks: Sequence[Task], may_be_late: bool = False) -> Iterator[tuple[Task, Any]]:
        """Let the actors work off tasks, and give each with its result, as it comes.

        Args:
            tasks: In the order in which they begin.
            may_be_late: Leave a task out that takes longer than `timeout`, instead of failing.

        Raises:
            UserError: If a client has found something wrong, or a task was lost or late too often.
        """
        waiting, lost = deque(tasks), dict.fromkeys((task.client for task in tasks), 0)
        while waiting or self._busy:
            while waiting and self._idle:
                self._hand_out(waiting.popleft())
            for reply in self._replies():
                if reply in self._starting:
                    self._arrived(reply)
                    continue
                task, actor, _ = self._busy.pop(reply)
                why, result, events = self._result(reply)
                if why:
                    with deferred():
                        self._ray.kill(actor)  # it may be alive, and only out of reach
                    self._start()
                    lost[task.client] += 1
                    self._tell_lost(task.client, lost[task.client], why)
                    waiting.appendleft(task)
                else:
                    self._idle.append(actor)
                    replay_events(events, self._observer)
                    yield task, result
            for task in self._overdue():
                told = f"client {task.client} has not answered within engine.timeout, {self._room.timeout:g} s"
                if not may_be_late:
                    raise UserError(f"{told}; without it this cannot go on: raise it and use fit --resume")
                self._observer.warn(f"{told}, and is missing from this round")

    def end(self) -> None:
        """Let the actors go, whatever they do."""
        with deferred():
            for actor in (*self._idle, *self._starting.values(), *(actor for _, actor, _ in self._busy.values())):
                self._ray.kill(actor)
        self._idle.clear()
        self._starting.clear()
        self._busy.clear()

    def _start(self) -> None:
        """Another actor; Ray finds a place for it, perhaps on another machine."""
        options = {"num_cpus": self._room.cpus, "num_gpus": self._room.gpus, "max_restarts": 0}
        with deferred():
            actor = self._ray.remote(ClientWorker).options(**options).remote(*self._parts)
            self._starting[actor.ready.remote()] = actor

    def _hand_out(self, task: Task) -> None:
        with deferred():
            actor = self._idle.pop()
            own = () if task.anew is None else (task.anew(),)
            reply = getattr(actor, task.verb).remote(task.client, *task.arguments, *own)
            self._busy[reply] = task, actor, time.monotonic()

    def _replies(self) -> list[Any]:
        """Those that have come, after a moment's wait."""
        with deferred():
            replies, _ = self._ray.wait([*self._busy, *self._starting], num_returns=1, timeout=0.5)
        return list(replies)

    def _result(self, reply: Any) -> tuple[str, Any, list[Event]]:
        """Why an actor was lost, or an empty text, its result and what happened meanwhile."""
        try:
            with deferred():
                result, events = self._ray.get(reply)
        except self._ray.exceptions.RayTaskError as error:
            raise _told(error) from error
        except self._ray.exceptions.RayError as error:
            return reason(error), None, []
        return "", result, events

    def _tell_lost(self, number: int, times: int, why: str) -> None:
        if times > self._room.retries:
            raise UserError(
                f"client {number} has lost {times} actors ({why}), and engine.retries is {self._room.retries}; what"
                " was finished is kept: use fit --resume"
            )
        self._observer.warn(f"the actor of client {number} was lost ({why}); another one does its work again")

    def _arrived(self, reply: Any) -> None:
        """An actor can begin."""
        actor = self._starting.pop(reply)
        try:
            with deferred():
                self._ray.get(reply)
        except self._ray.exceptions.RayError as error:
            raise UserError(f"an actor for clients could not start: {reason(error)}") from error
        self._idle.append(actor)

    def _overdue(self) -> list[Task]:
        """Tasks that take too long; their actors are ended and replaced."""
        if self._room.timeout is None:
            return []
        late = [reply for reply, (_, _, since) in self._busy.items() if time.monotonic() - since > self._room.timeout]
        if not late:
            return []
        found = []
        with deferred():
            # What has come while others were taken in is not late.
            _, late = self._ray.wait(late, num_returns=len(late), timeout=0)
        for reply in late:
            task, actor, _ = self._busy.pop(reply)
            self._ray.kill(actor)
            self._start()
            found.append(task)
        return found


def reason(error: Exception) -> str:
    """The line of what Ray says that names a reason: the first, or where its own code failed the last of the trace."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return lines[-1 if "creation task" in lines[0] else 0].rstrip(".")


def _told(error: Any) -> Exception:
    """What a client has found wrong, as if it had run here; a fault of ours with its whole trace."""
    cause = getattr(error, "cause", error)
    if isinstance(cause, UserError | OSError):
        return cause
    return RuntimeError(f"in an actor for clients:\n{error}")
