"""What the engine Ray does without Ray: the states on disk, the actors' work in a play of its own, and the options."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedekd.cli import main
from fedekd.errors import UserError
from fedekd.federation import Orchestrator, Ray, RoundRequest
from fedekd.federation.engines import client_store, ray_pool
from fedekd.federation.engines.client_store import ClientStore
from fedekd.federation.engines.ray_pool import ActorPool, Room, Task
from fedekd.federation.engines.remote import without_images, without_server_state
from fedekd.federation.engines.worker import ClientWorker, Event, WorkerSetup
from fedekd.federation.storage import pack
from fedekd.methods import Broadcast, StateDict

from .conftest import Federate
from .test_side_by_side import Watch

pytestmark = pytest.mark.timeout(60)


def state(value: float) -> dict[str, Any]:
    return {"networks": {"private": {"weight": torch.full((2,), value)}}, "memory": {}, "supervised_epochs": 3}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_every_version_of_a_state_is_a_file_of_its_own(tmp_path: Path) -> None:
    store = ClientStore(tmp_path)
    written = {(1, 11): 0.5, (11, 1): 1.5, (1, 1): 2.5, (111, 1): 3.5, (123456, 1): 4.5, (1, 23456): 5.5}
    for (number, version), value in written.items():
        store.write(number, version, state(value))
    assert len(names(tmp_path)) == len(written)
    for (number, version), value in written.items():
        found = ClientStore(tmp_path).read(number, version)
        assert found["networks"]["private"]["weight"].tolist() == [value] * 2
        assert found["supervised_epochs"] == 3
    store.write(1, 11, state(6.5))
    assert store.read(1, 11)["networks"]["private"]["weight"].tolist() == [6.5] * 2
    assert [store.versions(number) for number in (1, 11, 2)] == [[1, 11, 23456], [1], []]
    store.drop(1, 1)
    store.drop(7, 7)  # never written
    assert store.versions(1) == [11, 23456]
    assert len(names(tmp_path)) == len(written) - 1
    with pytest.raises(FileNotFoundError):
        store.read(1, 1)
    assert store.read(1, 11)["supervised_epochs"] == 3


def test_a_state_is_wholly_there_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ClientStore(tmp_path)
    store.write(0, 1, state(0.5))
    before = names(tmp_path)
    during: list[list[str]] = []

    def full(state: Any) -> bytes:
        during.append(names(tmp_path))
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(client_store, "pack", full)
    for version in (1, 2):
        with pytest.raises(OSError, match="No space"):
            store.write(0, version, state(1.5))
    assert len(during[0]) == 2  # it was in the midst of it
    assert names(tmp_path) == before
    assert store.read(0, 1)["networks"]["private"]["weight"].tolist() == [0.5] * 2


def test_a_folder_that_was_removed_stays_so(tmp_path: Path) -> None:
    """Its engine is closed, and whoever still writes is an actor on its way out."""
    store = ClientStore(tmp_path / "states")
    with pytest.raises(FileNotFoundError, match="states"):
        store.write(0, 1, state(0.5))
    assert names(tmp_path) == []


def make_host(run: Orchestrator, folder: Path) -> ClientWorker:
    """With all clients of a federation, and their states in a new folder."""
    run.method.init_server(run.spec)
    folder.mkdir()
    method, images = without_server_state(run.method), without_images(run.data.images)
    share = WorkerSetup(method, images, list(run.data.clients), run.spec, None, folder)
    return ClientWorker(share, np.ascontiguousarray(run.data.images.pixels.numpy()))


def fail_halfway(host: ClientWorker, version: int, shared: StateDict) -> None:
    """A visit of client 1 that fails when it is nearly over."""
    method: Any = host.engine.method

    def broken(client: Any, round_idx: int) -> Any:
        type(method).prepare_update(method, client, round_idx)
        raise OSError("halfway")

    method.prepare_update = broken
    with pytest.raises(OSError, match="halfway"):
        host.run_client(1, version, RoundRequest([1], Broadcast(shared), 0, True), {})
    del method.prepare_update


def phases(events: Sequence[Event], *names: str) -> bool:
    """Whether events tell of these phases of client 1, and of nothing else."""
    told = [(name, arguments[:2]) for name, arguments in events]
    return told == [(f"phase_{what}", (1, name)) for name in names for what in ("started", "finished")]


def test_a_visit_can_be_made_again_from_the_state_before_it(federate: Federate, tmp_path: Path) -> None:
    run = federate()
    host = make_host(run, tmp_path / "states")
    shared = run.method.broadcast([1], 0).shared
    states, updates = [], []
    for version in (0, 0, 1):
        fail_halfway(host, version, shared)
        visit, events = host.run_client(1, version, RoundRequest([1], Broadcast(shared), 0, True), {})
        assert phases(events, "receive", "update")
        assert not host.engine.clients  # put down: what a client needs in memory is given back
        assert visit.update is not None
        updates.append(visit.update.state)
        states.append((tmp_path / "states" / f"client-00001-{version + 1:06d}.pt").read_bytes())
    assert names(tmp_path / "states") == ["client-00001-000001.pt", "client-00001-000002.pt"]
    assert states[0] == states[1]
    for name, tensor in updates[0].items():
        assert torch.equal(tensor, updates[1][name]), name


def test_what_a_failed_visit_leaves_behind_is_forgotten(federate: Federate, tmp_path: Path) -> None:
    run = federate()
    host = make_host(run, tmp_path / "states")
    host.begin(1)
    before = host.store.read(1, 0)
    for verb, arguments, told in (("begin", (), ()), ("score", (0,), ()), ("local_baseline", (1,), ("local",))):
        fail_halfway(host, 0, run.method.broadcast([1], 0).shared)
        _, events = getattr(host, verb)(1, *arguments)
        assert phases(events, *told), verb
    assert pack(host.store.read(1, 0)) == pack(before)


class RayError(Exception):
    """As Ray's: an actor is lost."""


class RayTaskError(RayError):
    """As Ray's: what an actor ran has raised."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(f"ray::ClientWorker.run_client()\n  in prepare_update\n{type(cause).__name__}: {cause}")
        self.cause = cause


class Actor:
    """Does one thing after another, and says when it will have done it."""

    def __init__(self, ray: Play, number: int) -> None:
        self.ray, self.number, self.free, self.lost = ray, number, 0.0, False

    def __getattr__(self, verb: str) -> Any:
        return SimpleNamespace(remote=lambda *arguments: self.ray.ask(self, verb, arguments))


class Reply:
    """What will come, and when."""

    def __init__(self, actor: Actor, due: float, content: Any) -> None:
        self.actor, self.due, self.content = actor, due, content


#: What an actor does when it is asked, by its number, the verb and the arguments: how long it takes, and what comes.
Does = Callable[[int, str, Any], tuple[float, Any]]


class Play:
    """As much of Ray as the pool asks for, with a clock of its own: what its actors do is written down beforehand."""

    exceptions = SimpleNamespace(RayError=RayError, RayTaskError=RayTaskError)

    def __init__(self, does: Does) -> None:
        self.does, self.now = does, 0.0
        self.actors: list[Actor] = []
        self.killed: list[int] = []
        self.options: list[dict[str, Any]] = []
        self.parts: list[Any] = []
        self.asked: list[tuple[int, int]] = []  # the actor and the client of each task

    def monotonic(self) -> float:
        return self.now

    def remote(self, kind: Any) -> Any:
        assert kind is ClientWorker

        def options(**options: Any) -> Any:
            self.options.append(options)
            return SimpleNamespace(remote=self.start)

        return SimpleNamespace(options=options)

    def start(self, *parts: Any) -> Actor:
        self.parts.append(parts)
        self.actors.append(Actor(self, len(self.actors)))
        return self.actors[-1]

    def ask(self, actor: Actor, verb: str, arguments: Any) -> Reply:
        assert actor.number not in self.killed, "a killed actor is asked"
        assert not actor.lost, "a lost actor is asked"
        assert actor.free <= self.now, "an actor is asked that is at work"
        if verb != "ready":
            self.asked.append((actor.number, arguments[0]))
        seconds, content = self.does(actor.number, verb, arguments)
        actor.free = self.now + seconds
        return Reply(actor, actor.free, content)

    def wait(self, replies: list[Reply], num_returns: int, timeout: float) -> tuple[list[Reply], list[Reply]]:
        assert len(set(replies)) == len(replies) > 0, "Ray refuses to wait for nothing, or for one thing twice"
        assert self.now < 10_000, "it waits for ever"
        order = sorted(replies, key=lambda reply: reply.due)
        self.now = max(self.now, min(self.now + timeout, order[num_returns - 1].due))
        come = [reply for reply in order[:num_returns] if reply.due <= self.now]
        return come, [reply for reply in replies if reply not in come]

    def get(self, reply: Reply) -> Any:
        assert reply.due <= self.now
        if isinstance(reply.content, Exception):
            reply.actor.lost = not isinstance(reply.content, RayTaskError)
            raise reply.content
        return reply.content

    def kill(self, actor: Actor) -> None:
        self.killed.append(actor.number)


Begin = Callable[..., tuple[ActorPool, Play, Watch]]


def make_pool(
    monkeypatch: pytest.MonkeyPatch, does: Does, actors: int = 1, **room: Any
) -> tuple[ActorPool, Play, Watch]:
    play, watch = Play(does), Watch()
    monkeypatch.setattr(ray_pool, "time", play)
    options = {"cpus": 1, "gpus": 0.0, "timeout": None, "retries": 3} | room
    pool = ActorPool(play, actors, Room(**options), ("share", "pixels"), watch)  # type: ignore[arg-type]
    return pool, play, watch


@pytest.fixture
def begin(monkeypatch: pytest.MonkeyPatch) -> Begin:
    """Makes a pool over a play; keyword arguments replace what is in its room."""
    return lambda does, **parts: make_pool(monkeypatch, does, **parts)


def takes(seconds: Mapping[int, float] | float = 1.0, ready: Mapping[int, float] | float = 1.0) -> Does:
    """Tasks that take so many seconds by client, and actors that take so many to start, and nothing goes wrong."""

    def does(actor: int, verb: str, arguments: Any) -> tuple[float, Any]:
        if verb == "ready":
            return ready if isinstance(ready, int | float) else ready[actor], True
        client = arguments[0]
        events: list[Event] = [("phase_started", (client, verb)), ("phase_finished", (client, verb, 10))]
        return seconds if isinstance(seconds, int | float) else seconds[client], ((verb, *arguments), events)

    return does


def tasks(*clients: int) -> list[Task]:
    return [Task(client, "visit", ("version", client)) for client in clients]


def done(pool: ActorPool, clients: Sequence[int], **options: Any) -> list[int]:
    """The clients in the order in which their results come; each is its own."""
    order = []
    for task, result in pool.work_off(tasks(*clients), **options):
        assert result == ("visit", task.client, "version", task.client)
        order.append(task.client)
    return order


def test_tasks_begin_in_their_order_and_come_as_they_are_done(begin: Begin) -> None:
    pool, play, watch = begin(takes({0: 9, 1: 3, 2: 2, 3: 2, 4: 5}), actors=2, cpus=2, gpus=0.5)
    assert play.options == [{"num_cpus": 2, "num_gpus": 0.5, "max_restarts": 0}] * 2
    assert play.parts == [("share", "pixels")] * 2
    assert done(pool, [0, 1, 2, 3, 4]) == [1, 2, 3, 0, 4]
    assert play.asked == [(0, 0), (1, 1), (1, 2), (1, 3), (1, 4)]
    assert play.now == 1 + 3 + 2 + 2 + 5
    assert watch.begun == [(client, "visit") for client in (1, 2, 3, 0, 4)]
    assert watch.steps == 50
    assert done(pool, [0]) == [0]
    assert len(play.actors) == 2
    assert (play.killed, watch.warnings) == ([], [])


def test_work_begins_with_the_first_actor_and_the_others_join_in(begin: Begin) -> None:
    pool, play, _ = begin(takes(10, ready={0: 30, 1: 1, 2: math.inf}), actors=3)
    assert done(pool, [0, 1, 2, 3, 4, 5]) == [0, 1, 2, 3, 4, 5]
    assert play.asked == [(1, 0), (1, 1), (1, 2), (0, 3), (1, 4), (0, 5)]
    assert play.now == 30 + 10 + 10
    assert done(pool, []) == []
    pool.end()
    assert sorted(play.killed) == [0, 1, 2]
    pool.end()
    assert len(play.killed) == 3


def test_those_at_work_are_ended_too(begin: Begin) -> None:
    pool, play, _ = begin(takes({0: 1, 1: 100}), actors=2)
    results = pool.work_off(tasks(0, 1))
    assert next(results)[0].client == 0
    pool.end()
    assert sorted(play.killed) == [0, 1]


def losing(*attempts: tuple[int, int], also: Does | None = None) -> Does:
    """Actors are lost after 2 s in the n-th attempt at a client: (client, n), from 1 on."""
    tried: dict[int, int] = {}
    usual = also or takes()

    def does(actor: int, verb: str, arguments: Any) -> tuple[float, Any]:
        if verb != "ready":
            tried[arguments[0]] = tried.get(arguments[0], 0) + 1
            if (arguments[0], tried[arguments[0]]) in attempts:
                return 2.0, RayError("The actor died.\n\tclass_name: ClientWorker")
        return usual(actor, verb, arguments)

    return does


def test_what_a_lost_actor_did_is_done_again_before_all_else(begin: Begin) -> None:
    pool, play, watch = begin(losing((1, 1), (1, 2)))
    assert done(pool, [0, 1, 2]) == [0, 1, 2]
    assert play.asked == [(0, 0), (0, 1), (1, 1), (2, 1), (2, 2)]
    said = "the actor of client 1 was lost (The actor died); another one does its work again"
    assert watch.warnings == [said] * 2
    assert watch.begun == [(0, "visit"), (1, "visit"), (2, "visit")]  # what the lost ones began was never told
    assert len(play.actors) == 3


def test_every_attempt_is_told_what_is_its_own(begin: Begin) -> None:
    pool, _, _ = begin(losing((0, 2), (1, 1), (1, 2)))
    attempts = iter("abcdefg")
    for expected in ([(0, "a"), (1, "d")], [(0, "f"), (1, "g")]):
        renewed = [replace(task, anew=lambda: next(attempts)) for task in tasks(0, 1)]
        found = list(pool.work_off(renewed))
        assert [result for _, result in found] == [("visit", n, "version", n, own) for n, own in expected]
        assert [task for task, _ in found] == renewed


def test_too_many_losses_of_one_client_are_an_error(begin: Begin) -> None:
    pool, _, watch = begin(losing((0, 1), (0, 2), (1, 1), (1, 2), (1, 3)), retries=2)
    with pytest.raises(UserError, match=r"client 1 has lost 3 actors \(The actor died\), and engine\.retries is 2; .*"):
        done(pool, [0, 1, 2])
    assert len(watch.warnings) == 4  # client 0 is not client 1
    pool, _, _ = begin(losing((0, 1)), retries=0)
    with pytest.raises(UserError, match=r"client 0 has lost 1 actors .* engine\.retries is 0; .* use fit --resume$"):
        done(pool, [0])


def test_losses_are_counted_anew_in_every_round(begin: Begin) -> None:
    pool, _, watch = begin(losing((0, 1), (0, 3), (0, 5)), retries=1)
    assert [done(pool, [0]) for _ in range(3)] == [[0]] * 3
    assert len(watch.warnings) == 3


def test_a_lost_actor_is_ended_for_it_may_be_alive_and_out_of_reach(begin: Begin) -> None:
    """Ray says ActorUnavailableError when the network fails for a moment: the actor then still has its processors."""
    pool, play, _ = begin(losing((0, 1)))
    assert done(pool, [0]) == [0]
    assert play.killed == [0]


def test_who_is_late_is_left_out_and_the_actor_replaced(begin: Begin) -> None:
    pool, play, watch = begin(takes({0: 1000, 1: 15, 2: 20, 3: 1000}, ready=100), actors=1, timeout=20.0)
    assert done(pool, [0, 1, 2, 3], may_be_late=True) == [1, 2]
    said = "client {} has not answered within engine.timeout, 20 s, and is missing from this round"
    assert watch.warnings == [said.format(0), said.format(3)]
    assert play.killed == [0, 1]
    assert play.asked == [(0, 0), (1, 1), (1, 2), (1, 3)]
    assert watch.begun == [(1, "visit"), (2, "visit")]
    assert 100 + 20 + 100 + 15 + 20 + 20 <= play.now < 100 + 20 + 100 + 15 + 20 + 20 + 3  # starting does not count
    assert done(pool, [1]) == [1]
    assert play.asked[-1] == (2, 1)


def test_who_may_not_be_late_is_an_error(begin: Begin) -> None:
    pool, play, watch = begin(takes({0: 1, 1: 1000}), actors=2, timeout=0.25)
    with pytest.raises(UserError, match=r"client 0 .* engine\.timeout, 0\.25 s; .* raise it and use fit --resume$"):
        done(pool, [0])
    assert not watch.warnings
    pool.end()
    assert sorted(play.killed) == [0, 1, 2]  # the late one, and those that are there


def test_an_answer_that_has_come_in_time_is_not_late(begin: Begin) -> None:
    """Of many large updates that come together, the driver takes in one at a time."""
    pool, play, watch = begin(takes({0: 10, 1: 10, 2: 10, 3: 1000}), actors=4, timeout=20.0)
    found = []
    for task, _ in pool.work_off(tasks(0, 1, 2, 3), may_be_late=True):
        found.append(task.client)
        play.now += 30
    assert found == [0, 1, 2]
    assert watch.warnings == ["client 3 has not answered within engine.timeout, 20 s, and is missing from this round"]
    assert play.killed == [3]


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("The actor died.\n\tclass_name: ClientWorker", "The actor died"),
        ("It died of an error in its creation task, ray::\n  in born\nImportError: nowhere\n", "ImportError: nowhere"),
        ("", "RayError"),
    ],
)
def test_an_actor_that_cannot_start_is_told(said: str, told: str, begin: Begin) -> None:
    pool, _, _ = begin(lambda *asked: (1.0, RayError(said)))
    with pytest.raises(UserError, match=f"^an actor for clients could not start: {told}$"):
        done(pool, [0])


@pytest.mark.parametrize(
    ("raised", "told"),
    [
        (UserError("something is wrong"), UserError("something is wrong")),
        (NotADirectoryError(20, "Not a directory", "local"), NotADirectoryError(20, "Not a directory", "local")),
        (
            ZeroDivisionError("1 / 0"),
            RuntimeError("in an actor for clients:\nray::ClientWorker.run_client()\n  in prepare_update"),
        ),
    ],
)
def test_what_goes_wrong_in_an_actor_comes_out_as_it_is(raised: Exception, told: Exception, begin: Begin) -> None:
    pool, play, _ = begin(lambda actor, verb, asked: (1.0, True if verb == "ready" else RayTaskError(raised)))
    with pytest.raises(type(told)) as found:
        done(pool, [0])
    assert type(found.value) is type(told)
    assert str(found.value).startswith(str(told))
    assert str(raised) in str(found.value)
    assert play.asked == [(0, 0)]  # it is no actor that was lost


@given(
    actors=st.integers(1, 4),
    script=st.lists(st.lists(st.sampled_from(["1", "8", "late", "lost"]), min_size=3, max_size=3), max_size=8),
)
def test_whatever_happens_every_task_is_done_or_missing_once(actors: int, script: list[list[str]]) -> None:
    """And at the end there are as many actors as at the beginning."""
    tried = [0] * len(script)
    seconds = {"1": 1.0, "8": 8.0, "late": 500.0, "lost": 3.0}

    def does(actor: int, verb: str, arguments: Any) -> tuple[float, Any]:
        if verb == "ready":
            return 5.0, True
        client = arguments[0]
        what = script[client][min(tried[client], 2)]
        tried[client] += 1
        return seconds[what], RayError("lost") if what == "lost" else (("visit", *arguments), [])

    expected: dict[int, str] = {}
    for client, attempts in enumerate(script):
        expected[client] = next((what for what in attempts if what != "lost"), "error")
    with pytest.MonkeyPatch.context() as monkeypatch:
        pool, play, watch = make_pool(monkeypatch, does, actors=actors, timeout=20.0, retries=2)
        if "error" in expected.values():
            with pytest.raises(UserError, match="has lost 3 actors"):
                done(pool, range(len(script)), may_be_late=True)
            return
        found = done(pool, range(len(script)), may_be_late=True)
        assert sorted(found) == [client for client, what in expected.items() if what != "late"]
        missing = [text for text in watch.warnings if "missing" in text]
        assert len(missing) == len(script) - len(found)
        assert len(watch.warnings) - len(missing) == sum(each - 1 for each in tried)
        assert len(play.asked) == sum(tried)
        alive = [actor for actor in play.actors if not actor.lost and actor.number not in play.killed]
        assert len(alive) == actors
        pool.end()
        assert {actor.number for actor in alive} <= set(play.killed)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"actors": 0}, "engine.actors is 0, and must be at least 1, or null"),
        ({"actors": -3}, "engine.actors is -3, and must be at least 1, or null"),
        ({"cpus": 0}, "engine.cpus is 0, and must be at least 1"),
        ({"gpus": -0.5}, "engine.gpus is -0.5, and must be at least 0"),
        ({"gpus": math.nan}, "engine.gpus is nan, and must be at least 0"),
        ({"gpus": 1.5}, "engine.gpus is 1.5, and must be a share of one, or a whole number"),
        ({"timeout": 0.0}, "engine.timeout is 0.0, and must be above 0, or null"),
        ({"timeout": -1.0}, "engine.timeout is -1.0, and must be above 0, or null"),
        ({"timeout": math.nan}, "engine.timeout is nan, and must be above 0, or null"),
        ({"retries": -1}, "engine.retries is -1, and must be at least 0"),
    ],
)
def test_a_bad_option_is_told_in_a_line(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as told:
        Ray(**options)
    assert str(told.value).startswith(words)
    assert "\n" not in str(told.value)


def test_options_at_their_ends_are_taken_and_processors_are_threads() -> None:
    Ray(actors=1, cpus=1, gpus=0.25, timeout=0.1, retries=0)
    Ray(gpus=2)
    assert [Ray(cpus=cpus).threads(16, clients=6) for cpus in (1, 4)] == [1, 4]


def test_without_ray_it_is_told_what_to_install(
    federate: Federate, npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # which is put back then
    with pytest.raises(UserError, match=r"^engine Ray needs Ray: pip install 'fedekd\[ray\]'$"):
        federate(engine=Ray())
    options = [f"--data.dataset={npz}", "--data.num_clients=3", "--data.alpha=1", "--rounds=1", "--logger=null"]
    output = tmp_path / "run"
    assert main(["fit", *options, "--trainer.accelerator=cpu", "--engine=Ray", f"--output={output}"]) == 2
    assert "pip install 'fedekd[ray]'" in capsys.readouterr().err
    assert not output.exists()
