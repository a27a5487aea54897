"""WorkerPool on a scripted Ray with a simulated clock: order, lost workers, retries and timeouts."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedekd.cli import main
from fedekd.errors import UserError
from fedekd.federation import Ray
from fedekd.federation.engines import pool as pool_module
from fedekd.federation.engines import ray_engine
from fedekd.federation.engines.pool import Task, WorkerPool
from fedekd.federation.engines.ray_engine import RayExecutor
from fedekd.federation.engines.worker import ClientWorker, Event

from ..conftest import Federate, Recorder

pytestmark = pytest.mark.timeout(60)


class RayError(Exception):
    """Stands for `ray.exceptions.RayError`: an actor was lost."""


class RayTaskError(RayError):
    """Stands for `ray.exceptions.RayTaskError`: the task raised an exception."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(f"ray::ClientWorker.run_client()\n  in prepare_update\n{type(cause).__name__}: {cause}")
        self.cause = cause


class Actor:
    """Runs one call at a time; each takes a scripted time."""

    def __init__(self, ray: ScriptedRay, number: int) -> None:
        self.ray, self.number, self.free, self.lost = ray, number, 0.0, False

    def __getattr__(self, task: str) -> Any:
        return SimpleNamespace(remote=lambda *arguments: self.ray.call(self, task, arguments))


class Call:
    """Pending call: its result and when it is due."""

    def __init__(self, actor: Actor, due: float, content: Any) -> None:
        self.actor, self.due, self.content = actor, due, content


#: Script of the actors: (actor, task, arguments) -> (seconds, result).
Script = Callable[[int, str, Any], tuple[float, Any]]


class ScriptedRay:
    """The part of Ray that the executor uses, with a simulated clock and scripted actors."""

    exceptions = SimpleNamespace(RayError=RayError, RayTaskError=RayTaskError)

    def __init__(self, script: Script) -> None:
        self.script, self.now = script, 0.0
        self.actors: list[Actor] = []
        self.killed: list[int] = []
        self.options: list[dict[str, Any]] = []
        self.parts: list[Any] = []
        self.calls: list[tuple[int, int]] = []  # actor and client of each task

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

    def call(self, actor: Actor, task: str, arguments: Any) -> Call:
        assert actor.number not in self.killed, "call of a killed actor"
        assert not actor.lost, "call of a lost actor"
        assert actor.free <= self.now, "call of a busy actor"
        if task != "ready":
            self.calls.append((actor.number, arguments[0]))
        seconds, content = self.script(actor.number, task, arguments)
        actor.free = self.now + seconds
        return Call(actor, actor.free, content)

    def wait(self, calls: list[Call], num_returns: int, timeout: float) -> tuple[list[Call], list[Call]]:
        assert len(set(calls)) == len(calls) > 0, "Ray raises an error for no calls or equal ones"
        assert self.now < 10_000, "endless wait"
        order = sorted(calls, key=lambda call: call.due)
        self.now = max(self.now, min(self.now + timeout, order[num_returns - 1].due))
        finished = [call for call in order[:num_returns] if call.due <= self.now]
        return finished, [call for call in calls if call not in finished]

    def get(self, call: Call) -> Any:
        assert call.due <= self.now
        if isinstance(call.content, Exception):
            call.actor.lost = not isinstance(call.content, RayTaskError)
            raise call.content
        return call.content

    def is_initialized(self) -> bool:
        return True

    def kill(self, actor: Actor) -> None:
        self.killed.append(actor.number)


MakePool = Callable[..., tuple[WorkerPool, ScriptedRay, Recorder]]


def build_pool(
    monkeypatch: pytest.MonkeyPatch,
    script: Script,
    actors: int = 1,
    timeout: float | None = None,
    retries: int = 3,
    **options: Any,
) -> tuple[WorkerPool, ScriptedRay, Recorder]:
    ray, recorder = ScriptedRay(script), Recorder()
    monkeypatch.setattr(pool_module, "time", ray)
    monkeypatch.setattr(ray_engine, "_import_ray", lambda: ray)
    executor = RayExecutor(Ray(**options), clients=actors)
    executor._setup = ("setup", "pixels")
    return WorkerPool(executor, actors, timeout, retries, recorder), ray, recorder


@pytest.fixture
def make_pool(monkeypatch: pytest.MonkeyPatch) -> MakePool:
    """Builds a pool on a scripted Ray; keyword arguments are options of the engine."""
    return lambda script, **options: build_pool(monkeypatch, script, **options)


def takes(seconds: Mapping[int, float] | float = 1.0, ready: Mapping[int, float] | float = 1.0) -> Script:
    """Script without errors: seconds of a task by client, and seconds to start by actor."""

    def script(actor: int, task: str, arguments: Any) -> tuple[float, Any]:
        if task == "ready":
            return ready if isinstance(ready, int | float) else ready[actor], True
        client = arguments[0]
        events: list[Event] = [("phase_started", (client, task)), ("phase_finished", (client, task, 10))]
        return seconds if isinstance(seconds, int | float) else seconds[client], ((task, *arguments), events)

    return script


def tasks(*clients: int) -> list[Task]:
    return [Task(client, "run_client", ("version", client)) for client in clients]


def run(pool: WorkerPool, clients: Sequence[int], **options: Any) -> list[int]:
    """Run a task per client, and return the clients in the order of their results."""
    order = []
    for task, result in pool.run(tasks(*clients), **options):
        assert result == ("run_client", task.client, "version", task.client)
        order.append(task.client)
    return order


def test_pool_runs_tasks_in_order_and_yields_results_as_they_finish(make_pool: MakePool) -> None:
    pool, ray, recorder = make_pool(takes({0: 9, 1: 3, 2: 2, 3: 2, 4: 5}), actors=2, cpus=2, gpus=0.5)
    assert ray.options == [{"num_cpus": 2, "num_gpus": 0.5, "max_restarts": 0}] * 2
    assert ray.parts == [("setup", "pixels")] * 2
    assert run(pool, [0, 1, 2, 3, 4]) == [1, 2, 3, 0, 4]
    assert ray.calls == [(0, 0), (1, 1), (1, 2), (1, 3), (1, 4)]
    assert ray.now == 1 + 3 + 2 + 2 + 5
    assert recorder.phases == [(client, "run_client") for client in (1, 2, 3, 0, 4)]
    assert recorder.steps == 50
    assert run(pool, [0]) == [0]
    assert len(ray.actors) == 2
    assert (ray.killed, recorder.warnings) == ([], [])


def test_pool_starts_with_the_first_ready_worker(make_pool: MakePool) -> None:
    pool, ray, _ = make_pool(takes(10, ready={0: 30, 1: 1, 2: math.inf}), actors=3)
    assert run(pool, [0, 1, 2, 3, 4, 5]) == [0, 1, 2, 3, 4, 5]
    assert ray.calls == [(1, 0), (1, 1), (1, 2), (0, 3), (1, 4), (0, 5)]
    assert ray.now == 30 + 10 + 10
    assert run(pool, []) == []
    pool.close()
    assert sorted(ray.killed) == [0, 1, 2]
    pool.close()
    assert len(ray.killed) == 3


def test_pool_close_kills_busy_workers(make_pool: MakePool) -> None:
    pool, ray, _ = make_pool(takes({0: 1, 1: 100}), actors=2)
    results = pool.run(tasks(0, 1))
    assert next(results)[0].client == 0
    pool.close()
    assert sorted(ray.killed) == [0, 1]


def losing(*attempts: tuple[int, int], also: Script | None = None) -> Script:
    """Script in which workers are lost after 2 s, in the n-th attempt of a client: (client, n), from 1."""
    attempts_of: dict[int, int] = {}
    usual = also or takes()

    def script(actor: int, task: str, arguments: Any) -> tuple[float, Any]:
        if task != "ready":
            attempts_of[arguments[0]] = attempts_of.get(arguments[0], 0) + 1
            if (arguments[0], attempts_of[arguments[0]]) in attempts:
                return 2.0, RayError("The actor died.\n\tclass_name: ClientWorker")
        return usual(actor, task, arguments)

    return script


def test_pool_repeats_the_task_of_a_lost_worker_first(make_pool: MakePool) -> None:
    pool, ray, recorder = make_pool(losing((1, 1), (1, 2)))
    assert run(pool, [0, 1, 2]) == [0, 1, 2]
    assert ray.calls == [(0, 0), (0, 1), (1, 1), (2, 1), (2, 2)]
    warning = "the worker of client 1 was lost (The actor died); another worker repeats its task"
    assert recorder.warnings == [warning] * 2
    assert recorder.phases == [
        (0, "run_client"),
        (1, "run_client"),
        (2, "run_client"),
    ]  # events of lost attempts are dropped
    assert len(ray.actors) == 3


def test_pool_computes_the_last_argument_per_attempt(make_pool: MakePool) -> None:
    pool, _, _ = make_pool(losing((0, 2), (1, 1), (1, 2)))
    attempts = iter("abcdefg")
    for expected in ([(0, "a"), (1, "d")], [(0, "f"), (1, "g")]):
        with_attempt = [replace(task, per_attempt=lambda: next(attempts)) for task in tasks(0, 1)]
        results = list(pool.run(with_attempt))
        assert [result for _, result in results] == [
            ("run_client", n, "version", n, attempt) for n, attempt in expected
        ]
        assert [task for task, _ in results] == with_attempt


def test_pool_too_many_losses_of_a_client_raise_user_error(make_pool: MakePool) -> None:
    pool, _, recorder = make_pool(losing((0, 1), (0, 2), (1, 1), (1, 2), (1, 3)), retries=2)
    with pytest.raises(UserError, match=r"client 1: 3 workers lost \(The actor died\), expected at most 2\."):
        run(pool, [0, 1, 2])
    assert len(recorder.warnings) == 4  # client 0 is not client 1
    pool, _, _ = make_pool(losing((0, 1)), retries=0)
    with pytest.raises(UserError, match=r"client 0: 1 workers lost .* at most 0\. .* fit --resume\.$"):
        run(pool, [0])


def test_pool_counts_losses_per_round(make_pool: MakePool) -> None:
    pool, _, recorder = make_pool(losing((0, 1), (0, 3), (0, 5)), retries=1)
    assert [run(pool, [0]) for _ in range(3)] == [[0]] * 3
    assert len(recorder.warnings) == 3


def test_pool_kills_a_lost_worker_which_may_be_unreachable_only(make_pool: MakePool) -> None:
    """Ray raises ActorUnavailableError after a network failure: the actor then still holds its processors."""
    pool, ray, _ = make_pool(losing((0, 1)))
    assert run(pool, [0]) == [0]
    assert ray.killed == [0]


def test_pool_drops_a_late_task_and_replaces_its_worker(make_pool: MakePool) -> None:
    pool, ray, recorder = make_pool(takes({0: 1000, 1: 15, 2: 20, 3: 1000}, ready=100), actors=1, timeout=20.0)
    assert run(pool, [0, 1, 2, 3], may_be_late=True) == [1, 2]
    warning = "client {} exceeded engine.timeout, 20 s, and is missing from this round"
    assert recorder.warnings == [warning.format(0), warning.format(3)]
    assert ray.killed == [0, 1]
    assert ray.calls == [(0, 0), (1, 1), (1, 2), (1, 3)]
    assert recorder.phases == [(1, "run_client"), (2, "run_client")]
    assert (
        100 + 20 + 100 + 15 + 20 + 20 <= ray.now < 100 + 20 + 100 + 15 + 20 + 20 + 3
    )  # the start of a worker does not count
    assert run(pool, [1]) == [1]
    assert ray.calls[-1] == (2, 1)


def test_pool_late_task_of_the_last_round_raises_user_error(make_pool: MakePool) -> None:
    pool, ray, recorder = make_pool(takes({0: 1, 1: 1000}), actors=2, timeout=0.25)
    with pytest.raises(
        UserError, match=r"^client 0 exceeded engine\.timeout, 0\.25 s\. .* raise it\. .* fit --resume\.$"
    ):
        run(pool, [0])
    assert not recorder.warnings
    pool.close()
    assert sorted(ray.killed) == [0, 1, 2]  # the late one and the present ones


def test_pool_result_that_waits_to_be_read_is_not_late(make_pool: MakePool) -> None:
    """Large updates that arrive together are read one at a time."""
    pool, ray, recorder = make_pool(takes({0: 10, 1: 10, 2: 10, 3: 1000}), actors=4, timeout=20.0)
    finished = []
    for task, _ in pool.run(tasks(0, 1, 2, 3), may_be_late=True):
        finished.append(task.client)
        ray.now += 30
    assert finished == [0, 1, 2]
    assert recorder.warnings == ["client 3 exceeded engine.timeout, 20 s, and is missing from this round"]
    assert ray.killed == [3]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("The actor died.\n\tclass_name: ClientWorker", "The actor died"),
        (
            "It died of an error in its creation task, ray::\n  in unpickle\nImportError: nowhere\n",
            "ImportError: nowhere",
        ),
        ("", "RayError"),
    ],
)
def test_pool_worker_that_cannot_start_raises_user_error(text: str, reason: str, make_pool: MakePool) -> None:
    pool, _, _ = make_pool(lambda *call: (1.0, RayError(text)))
    with pytest.raises(UserError, match=f"^a worker could not start: {reason}$"):
        run(pool, [0])


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (UserError("something is wrong"), UserError("something is wrong")),
        (NotADirectoryError(20, "Not a directory", "local"), NotADirectoryError(20, "Not a directory", "local")),
        (
            ZeroDivisionError("1 / 0"),
            RuntimeError("in a Ray actor:\nray::ClientWorker.run_client()\n  in prepare_update"),
        ),
    ],
)
def test_pool_exception_of_a_task_is_raised(raised: Exception, expected: Exception, make_pool: MakePool) -> None:
    pool, ray, _ = make_pool(lambda actor, task, arguments: (1.0, True if task == "ready" else RayTaskError(raised)))
    with pytest.raises(type(expected)) as error:
        run(pool, [0])
    assert type(error.value) is type(expected)
    assert str(error.value).startswith(str(expected))
    assert str(raised) in str(error.value)
    assert ray.calls == [(0, 0)]  # not repeated: no worker was lost
    pool.close()
    assert ray.killed == [0]


@given(
    actors=st.integers(1, 4),
    fates=st.lists(st.lists(st.sampled_from(["1", "8", "late", "lost"]), min_size=3, max_size=3), max_size=8),
)
def test_pool_every_task_finishes_or_is_missing_once(actors: int, fates: list[list[str]]) -> None:
    """At the end there are as many workers as at the start."""
    attempts = [0] * len(fates)
    seconds = {"1": 1.0, "8": 8.0, "late": 500.0, "lost": 3.0}

    def script(actor: int, task: str, arguments: Any) -> tuple[float, Any]:
        if task == "ready":
            return 5.0, True
        client = arguments[0]
        what = fates[client][min(attempts[client], 2)]
        attempts[client] += 1
        return seconds[what], RayError("lost") if what == "lost" else (("run_client", *arguments), [])

    expected: dict[int, str] = {}
    for client, outcomes in enumerate(fates):
        expected[client] = next((what for what in outcomes if what != "lost"), "error")
    with pytest.MonkeyPatch.context() as monkeypatch:
        pool, ray, recorder = build_pool(monkeypatch, script, actors=actors, timeout=20.0, retries=2)
        if "error" in expected.values():
            with pytest.raises(UserError, match="3 workers lost"):
                run(pool, range(len(fates)), may_be_late=True)
            return
        finished = run(pool, range(len(fates)), may_be_late=True)
        assert sorted(finished) == [client for client, what in expected.items() if what != "late"]
        missing = [text for text in recorder.warnings if "missing" in text]
        assert len(missing) == len(fates) - len(finished)
        assert len(recorder.warnings) - len(missing) == sum(count - 1 for count in attempts)
        assert len(ray.calls) == sum(attempts)
        alive = [actor for actor in ray.actors if not actor.lost and actor.number not in ray.killed]
        assert len(alive) == actors
        pool.close()
        assert {actor.number for actor in alive} <= set(ray.killed)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"actors": 0}, "engine.actors: expected at least 1, or null, got 0."),
        ({"actors": -3}, "engine.actors: expected at least 1, or null, got -3."),
        ({"cpus": 0}, "engine.cpus: expected at least 1, got 0."),
        ({"gpus": -0.5}, "engine.gpus: expected a fraction in [0, 1] or a whole number, got -0.5."),
        ({"gpus": math.nan}, "engine.gpus: expected a fraction in [0, 1] or a whole number, got nan."),
        ({"gpus": 1.5}, "engine.gpus: expected a fraction in [0, 1] or a whole number, got 1.5."),
        ({"timeout": 0.0}, "engine.timeout: expected a number above 0, or null, got 0.0."),
        ({"timeout": -1.0}, "engine.timeout: expected a number above 0, or null, got -1.0."),
        ({"timeout": math.nan}, "engine.timeout: expected a number above 0, or null, got nan."),
        ({"retries": -1}, "engine.retries: expected at least 0, got -1."),
    ],
)
def test_ray_invalid_option_raises_user_error(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as error:
        Ray(**options)
    assert str(error.value) == words


def test_ray_limits_are_valid_and_threads_are_processors() -> None:
    Ray(actors=1, cpus=1, gpus=0.25, timeout=0.1, retries=0)
    Ray(gpus=2)
    assert [Ray(cpus=cpus).threads(16, clients=6) for cpus in (1, 4)] == [1, 4]


def test_ray_not_installed_raises_user_error(
    federate: Federate, npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # restored afterwards
    with pytest.raises(UserError, match=r"^engine: Ray is not installed\. Run: pip install 'fedekd\[ray\]'$"):
        federate(engine=Ray())
    options = [f"--data.dataset={npz}", "--data.num_clients=3", "--data.alpha=1", "--rounds=1", "--logger=null"]
    output = tmp_path / "run"
    assert main(["fit", *options, "--trainer.accelerator=cpu", "--engine=Ray", f"--output={output}"]) == 2
    assert "pip install 'fedekd[ray]'" in capsys.readouterr().err
    assert not output.exists()
