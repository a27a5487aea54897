"""Engine Ray on a real cluster: equal results after lost actors and machines, and no files left behind."""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fedekd.atomic import unseal_json
from fedekd.cli import main
from fedekd.data import FederatedDataModule
from fedekd.do_no_harm import DoNoHarm
from fedekd.errors import UserError
from fedekd.federation import Ray, RoundOptions, RoundRequest, SequentialEngine
from fedekd.federation.checkpoint import pack
from fedekd.federation.engines import pool as pool_module
from fedekd.federation.engines.ray_engine import RayExecutor
from fedekd.federation.options import participants
from fedekd.methods import CAFEDistill, ClientOptions, ClientUpdate, FedAvg, FedeKD
from fedekd.methods.base import state_dict_bytes

from ..conftest import Federate, Recorder
from ..runs import StopBeforeRound, StoppedError, contents
from .test_multiprocess import FailsToUnpickle, Faulty

ray = pytest.importorskip("ray")

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.timeout(400),
    pytest.mark.filterwarnings("ignore:Tip. In future versions of Ray:FutureWarning"),
]


@pytest.fixture(scope="module", autouse=True)
def end_of_the_cluster() -> Iterator[None]:
    yield
    ray.shutdown()


@pytest.fixture
def cluster(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cluster shared by the tests that do not start their own, with its own working directory."""
    if not ray.is_initialized():
        quiet = {"log_to_driver": False, "configure_logging": False}
        with monkeypatch.context() as patched:
            patched.chdir(tmp_path_factory.mktemp("elsewhere"))
            ray.init(address="local", num_cpus=2, include_dashboard=False, **quiet)


@pytest.fixture
def no_cluster() -> None:
    ray.shutdown()


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Parent of temporary folders, none of which may remain."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    assert not list(folder.iterdir())


def names(folder: Path, pattern: str = "*") -> list[str]:
    return sorted(path.name for path in folder.glob(pattern))


def read(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class StateRecorder(Recorder):
    """Records the state files after each round, and runs a function then."""

    def __init__(self, temporary: Path, then: Mapping[int, Callable[[], None]] | None = None) -> None:
        super().__init__()
        self.temporary, self.then, self.states = temporary, then or {}, dict[int, list[str]]()

    def round_finished(self, row: Mapping[str, float]) -> None:
        self.states[int(row["round"])] = names(self.temporary, "fedekd-*/*")
        self.then.get(int(row["round"]), lambda: None)()


# Tests that start their own cluster.


def test_cli_ray_run_equals_sequential_and_resumes_with_it(
    no_cluster: None, npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options = [f"--data.dataset={npz}", "--data.num_clients=3", "--data.alpha=1", "--rounds=1", "--logger=null"]
    options += ["--client.local_epochs=1", "--trainer.accelerator=cpu", "--trainer.threads=1"]
    assert main(["fit", *options, "--output=a", "--baseline_dir=la"]) == 0
    on_ray = ["--engine=Ray", "--engine.actors=1", "--engine.timeout=500", "--output=b", "--baseline_dir=lb"]
    assert main(["fit", *options, *on_ray]) == 0
    assert contents(Path("a")) == contents(Path("b"))
    assert read(Path("la")) == read(Path("lb"))
    assert not ray.is_initialized()  # the run started and ended its cluster
    # The engine may change on resume.
    Path("b/summary.json").unlink()
    assert main(["fit", "--resume", "b", "--engine=Sequential"]) == 0
    assert contents(Path("a")) == contents(Path("b"))


@pytest.mark.parametrize("address", ["nowhere", "127.0.0.1:1"])
def test_ray_address_without_cluster_raises_user_error(address: str, no_cluster: None, federate: Federate) -> None:
    """Ray itself retries the second for twelve minutes."""
    with pytest.raises(UserError, match=rf"^engine\.address: .* got '{address}' \(.+\)\.$") as error:
        federate(engine=Ray(address=address)).run()
    assert "\n" not in str(error.value)


def test_ray_lost_machine_gives_equal_results(
    no_cluster: None, federate: Federate, tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.cluster_utils import Cluster

    started: list[Any] = []

    def start(executor: RayExecutor, start: Callable[[RayExecutor], tuple[Any, Any]] = RayExecutor.start) -> Any:
        started.append(start(executor))
        if len(started) <= 2:  # on a slow machine, an actor may start only after the other one has run all rounds
            ray.get(started[-1][1], timeout=200)
        return started[-1]

    monkeypatch.setattr(RayExecutor, "start", start)
    rounds = RoundOptions(rounds=3)
    federate(output=tmp_path / "one", rounds=rounds).run()
    machines = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        other = machines.add_node(num_cpus=1)
        with pytest.raises(UserError, match=r"engine\.folder: expected a folder that all machines of the cluster see"):
            federate(engine=Ray(address=machines.address)).run()
        recorder = StateRecorder(temporary, {1: lambda: machines.remove_node(other, allow_graceful=False)})
        engine = Ray(address=machines.address, folder=str(tmp_path / "states"))
        federate(output=tmp_path / "two", rounds=rounds, engine=engine, observer=recorder).run()
        assert not ray.is_initialized()
        assert machines.head_node.any_processes_alive()
        assert not machines.head_node.dead_processes()  # the cluster was left, not ended
    finally:
        ray.shutdown()
        machines.shutdown()
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert sum("was lost" in text and "repeats its task" in text for text in recorder.warnings) == 1
    assert names(tmp_path / "states") == []


# Tests on the shared cluster.


def test_ray_gives_the_bytes_of_the_sequential_engine(
    cluster: None,
    federate: Federate,
    tmp_path: Path,
    temporary: Path,
    write_blobs: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """FedeKD, whose clients keep optimizers, with do-no-harm comparisons."""
    monkeypatch.chdir(tmp_path)
    npz = write_blobs(tmp_path / "more.npz", num_samples=360)
    recorders, runs = (Recorder(), StateRecorder(temporary)), []
    for recorder, name, engine in zip(recorders, ("one", "two"), (None, Ray(actors=2)), strict=True):
        data = FederatedDataModule(str(npz), num_clients=3, alpha=50, batch_size=8, fractions=(0.4, 0.4, 0.2))
        parts = {"data": data, "do_no_harm": DoNoHarm(rule="better", looks=2), "engine": engine, "observer": recorder}
        runs.append(federate(output=tmp_path / name, baseline_dir=Path(f"local-{name}"), **parts))
        summary = runs[-1].run()
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert read(tmp_path / "local-one") == read(tmp_path / "local-two")
    assert {client["deployed"] for client in summary["clients"]} == {"federated", "local"}
    assert sorted(recorders[0].phases) == sorted(recorders[1].phases)
    assert recorders[0].steps == recorders[1].steps
    assert recorders[1].warnings == []
    # One file per client, of its newest state.
    assert recorders[1].states == {r: [f"client-{n:05d}-{r + 1:06d}.pt" for n in range(3)] for r in (1, 2)}
    assert ray.is_initialized()  # the cluster was there before the run
    with pytest.raises(RuntimeError, match="closed"):
        runs[1].engine.evaluate(0)


def test_ray_personal_messages_and_absent_clients_give_equal_results(
    cluster: None, federate: Federate, tmp_path: Path, temporary: Path
) -> None:
    client = ClientOptions(
        local_epochs=1,
        private_model={"class_path": "fedekd.models.PrivateCNN"},
        optimizer={"class_path": "torch.optim.SGD", "init_args": {"lr": 0.05, "momentum": 0.9}},
        exits=2,
    )
    rounds, recorder = RoundOptions(rounds=3, participation=0.6), StateRecorder(temporary)
    parts = {"client": client, "rounds": rounds}
    federate(CAFEDistill("paper"), output=tmp_path / "one", **parts).run()
    on_ray = {"engine": Ray(actors=1, folder=str(temporary)), "observer": recorder}
    federate(CAFEDistill("paper"), output=tmp_path / "two", **parts, **on_ray).run()
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    numbers = [participants(rounds, 3, 0, round_idx) for round_idx in range(4)]
    assert len({tuple(each) for each in numbers[:3]}) > 1  # they differ between rounds
    for round_idx in (1, 2, 3):
        made = [sum(number in each for each in numbers[: round_idx + 1]) for number in range(3)]
        expected = [f"client-{number:05d}-{times:06d}.pt" for number, times in enumerate(made) if times]
        assert recorder.states[round_idx] == expected


class KillsActor(FedeKD):
    """In round 1, client 1 kills its actor, and client 2 does so after its state is on disk; once each.

    Args:
        marks: Folder of the marks of what has happened.
        temporary: Parent of the folder of client states.
    """

    def __init__(self, marks: Path, temporary: Path) -> None:
        super().__init__()
        marks.mkdir(exist_ok=True)
        self.marks, self.temporary = str(marks), str(temporary)

    def receive(self, client: Any, received: Any, round_idx: int) -> dict[str, float]:
        logs = super().receive(client, received, round_idx)
        if (client.number, round_idx) == (1, 1):
            kill_once(Path(self.marks) / "during")
        return logs

    def prepare_update(self, client: Any, round_idx: int) -> ClientUpdate:
        update = super().prepare_update(client, round_idx)
        if (client.number, round_idx) == (2, 1):
            update = replace(
                update, state=KillsWhenRead(update.state, Path(self.marks) / "after", Path(self.temporary))
            )
        return update


class KillsWhenRead(dict[str, torch.Tensor]):
    """State dict that kills its process when read, once, and records the states of client 2."""

    def __init__(self, state: Mapping[str, torch.Tensor], mark: Path, temporary: Path) -> None:
        super().__init__(state)
        self.mark, self.temporary = mark, temporary

    def items(self) -> Any:
        kill_once(self.mark, " ".join(names(self.temporary, "*/client-00002-*")))
        return super().items()


def kill_once(mark: Path, note: str = "") -> None:
    if not mark.exists():
        mark.write_text(note)
        os.kill(os.getpid(), signal.SIGKILL)


def harmless(marks: Path, temporary: Path) -> KillsActor:
    method = KillsActor(marks, temporary)
    (marks / "during").touch()
    (marks / "after").touch()
    return method


def test_ray_killed_actors_give_equal_results(
    cluster: None, federate: Federate, tmp_path: Path, temporary: Path
) -> None:
    recorders = Recorder(), Recorder()
    federate(harmless(tmp_path / "m1", temporary), output=tmp_path / "quiet", observer=recorders[0]).run()
    method = KillsActor(tmp_path / "m2", temporary)
    federate(method, output=tmp_path / "run", observer=recorders[1], engine=Ray(actors=1, retries=1)).run()
    assert contents(tmp_path / "run") == contents(tmp_path / "quiet")
    assert (tmp_path / "m2/after").read_text() == "client-00002-000001.pt client-00002-000002.pt"
    assert [text.partition(" (")[0] for text in recorders[1].warnings] == [
        "the worker of client 1 was lost",
        "the worker of client 2 was lost",
    ]
    assert all(text.endswith("); another worker repeats its task") for text in recorders[1].warnings)
    assert not any("\n" in text for text in recorders[1].warnings)
    # Events of repeated tasks are reported once.
    assert sorted(recorders[0].phases) == sorted(recorders[1].phases)
    assert recorders[0].steps == recorders[1].steps


def test_ray_without_retries_raises_and_the_run_resumes(
    cluster: None, federate: Federate, tmp_path: Path, temporary: Path
) -> None:
    federate(harmless(tmp_path / "m1", temporary), output=tmp_path / "quiet").run()
    method = KillsActor(tmp_path / "m2", temporary)
    message = r"^client 1: 1 workers lost \(.+\), expected at most 0\. .* fit --resume\.$"
    run = federate(method, output=tmp_path / "run", engine=Ray(actors=1, retries=0))
    with pytest.raises(UserError, match=message) as error:
        run.run()
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run/metrics.csv").exists()
    assert names(tmp_path / "run/checkpoints", "manifest-*") == ["manifest-0001.json"]
    with pytest.raises(RuntimeError, match="closed"):
        run.engine.evaluate(0)
    federate(harmless(tmp_path / "m2", temporary), output=tmp_path / "run").run()
    assert contents(tmp_path / "run") == contents(tmp_path / "quiet")


@pytest.mark.parametrize(("error", "kind"), [("user", UserError), ("other", RuntimeError)])
def test_ray_exception_of_a_client_is_raised_and_closes_the_engine(
    error: str, kind: Any, cluster: None, federate: Federate
) -> None:
    run = federate(Faulty(error), engine=Ray(actors=1))
    run.method.init_server(run.spec)
    with pytest.raises(kind) as found:
        list(run.engine.run_clients(RoundRequest([0, 1], run.method.broadcast([0, 1], 0), 0, True)))
    text = str(found.value)
    assert type(found.value) is kind
    assert text == "something is wrong" if error == "user" else "in prepare_update\n" in text
    assert error == "user" or text.strip().endswith("ZeroDivisionError: 1 / 0")
    with pytest.raises(RuntimeError, match="closed"):
        run.engine.evaluate(0)


def test_ray_worker_that_cannot_start_raises_user_error(cluster: None, federate: Federate) -> None:
    with pytest.raises(UserError, match="nowhere"):
        federate(FailsToUnpickle("unknown"), engine=Ray(actors=1)).run()


class Sleepy(FedeKD):
    """Some clients sleep through a round, once.

    Args:
        marks: Folder of the marks of what has happened.
        naps: Client and round of each.
    """

    def __init__(self, marks: Path, naps: Sequence[tuple[int, int]]) -> None:
        super().__init__()
        marks.mkdir(exist_ok=True)
        self.marks, self.naps = str(marks), [f"{number} {round_idx}" for number, round_idx in naps]

    def prepare_update(self, client: Any, round_idx: int) -> ClientUpdate:
        update = super().prepare_update(client, round_idx)
        self.sleep_once(client, round_idx)
        return update

    def receive(self, client: Any, received: Any, round_idx: int) -> dict[str, float]:
        logs = super().receive(client, received, round_idx)
        if round_idx == client.spec.rounds:
            self.sleep_once(client, round_idx)
        return logs

    def sleep_once(self, client: Any, round_idx: int) -> None:
        nap = f"{client.number} {round_idx}"
        mark = Path(self.marks) / nap
        if nap in self.naps and not mark.exists():
            mark.touch()
            time.sleep(600)


def without(*missing: tuple[int, int]) -> Any:
    """Sequential engine in which some clients are missing in some rounds."""

    class Missing(SequentialEngine):
        def run_clients(self, request: RoundRequest) -> Any:
            present = [number for number in request.participants if (number, request.round_idx) not in missing]
            yield from super().run_clients(replace(request, participants=present))

    return Missing


def test_ray_late_clients_are_left_out_except_in_the_last_round(
    cluster: None, federate: Federate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the last round the run raises an error, and resumes from its checkpoint."""
    rounds = RoundOptions(rounds=2, quorum=3)
    federate(output=tmp_path / "quiet", rounds=rounds, engine=without((1, 1))).run()
    method, recorder = Sleepy(tmp_path / "marks", [(1, 1), (2, 2)]), Recorder()

    def now() -> float:
        return time.monotonic() + 1000 * len(names(tmp_path / "marks"))

    # The clock jumps as soon as a client sleeps, so that the test neither waits nor depends on the machine.
    monkeypatch.setattr(pool_module, "time", SimpleNamespace(monotonic=now))
    parts = {"output": tmp_path / "run", "rounds": rounds, "engine": Ray(actors=1, timeout=300)}
    with pytest.raises(UserError, match=r"^client 2 exceeded engine\.timeout, 300 s\. .* fit --resume\.$"):
        federate(method, observer=recorder, **parts).run()
    assert recorder.warnings == [
        "client 1 exceeded engine.timeout, 300 s, and is missing from this round",
        "round 2: 2 updates are below the quorum of 3; the server keeps its state",
    ]
    manifests = [unseal_json(path.read_bytes()) for path in sorted((tmp_path / "run").glob("checkpoints/manifest-*"))]
    first, second = ({key: entry["sha256"] for key, entry in each["files"].items()} for each in manifests)
    # After round 0, and after 1, in which client 1 and the server are as they were.
    assert [key for key in first if first[key] == second[key]] == ["client-001", "server"]
    resumed = federate(method, **parts)
    resumed.run()
    size = state_dict_bytes(method.broadcast([0], 2).to(0))
    assert resumed.progress.bytes_down == (3 + 2 + 3) * size
    assert resumed.progress.bytes_up == (3 + 2) * size
    assert contents(tmp_path / "run") == contents(tmp_path / "quiet")


def test_ray_round_without_results_has_no_row(cluster: None, federate: Federate, tmp_path: Path) -> None:
    rounds = RoundOptions(rounds=3, participation=0.3)
    [late] = participants(rounds, 3, 0, 1)
    parts = {"rounds": rounds, "output": tmp_path / "quiet", "engine": without((late, 1))}
    with pytest.raises(StoppedError):
        federate(observer=StopBeforeRound(2), **parts).run()
    federate(**parts).run()  # without a new row or state, it still resumes
    parts |= {"output": tmp_path / "run", "engine": Ray(actors=1, timeout=15)}
    recorder = Recorder()
    run = federate(Sleepy(tmp_path / "marks", [(late, 1)]), observer=recorder, **parts)
    run.run()
    assert recorder.warnings == [
        f"client {late} exceeded engine.timeout, 15 s, and is missing from this round",
        "round 2: 0 updates are below the quorum of 1; the server keeps its state",
    ]
    assert [row["round"] for row in run.progress.history] == [2, 3]
    assert contents(tmp_path / "run") == contents(tmp_path / "quiet")


def test_ray_states_are_in_the_folder_until_close(
    cluster: None, federate: Federate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Path("states/of clients")
    there, here = federate(FedAvg(), engine=Ray(actors=1, folder=str(folder))), federate(FedAvg())
    for run in (there, here):
        run.method.init_server(run.spec)
    engines: Any = there.engine, here.engine
    try:
        before = [pack(engine.client_state(0)) for engine in engines]
        assert before[0] == before[1]
        assert names(folder, "*/*") == ["client-00000-000000.pt"]
        state = engines[0].client_state(0)
        for engine in engines:
            list(engine.run_clients(RoundRequest([0, 2], here.method.broadcast([0, 2], 0), 0, True)))
        assert names(folder, "*/*") == ["client-00000-000001.pt", "client-00002-000001.pt"]
        for number in range(3):  # client 1 has not run
            assert repr(engines[0].evaluate(number)) == repr(engines[1].evaluate(number))  # NaN
            assert pack(engines[0].client_state(number)) == pack(engines[1].client_state(number))
        assert pack(engines[0].client_state(0)) != before[0]
        engines[0].load_client_state(0, state)
        assert pack(engines[0].client_state(0)) == before[0]
        assert names(folder, "*/client-00000-*") == ["client-00000-000002.pt"]
        assert engines[0].evaluate(0) != engines[1].evaluate(0)
    finally:
        engines[0].close()
    assert names(folder) == []
    engines[0].close()
    assert ray.is_initialized()  # the cluster was there before the engine


@pytest.mark.parametrize("name", ["evaluate", "local_baselines", "run_clients", "client_state", "load_client_state"])
def test_ray_closed_engine_raises_runtime_error(name: str, cluster: None, federate: Federate) -> None:
    run, here = federate(FedAvg(), engine=Ray(actors=1)), federate(FedAvg())
    for each in (run, here):
        each.method.init_server(each.spec)
    state = here.engine.client_state(0)
    arguments: dict[str, tuple[Any, ...]] = {
        "evaluate": (0,),
        "local_baselines": ({0: 1},),
        "run_clients": (RoundRequest([0], run.method.broadcast([0], 0), 0, True),),
        "client_state": (0,),
        "load_client_state": (0, state),
    }
    run.engine.load_client_state(0, state)
    run.engine.close()
    with pytest.raises(RuntimeError, match="the engine is closed"):
        list(getattr(run.engine, name)(*arguments[name]))


@pytest.mark.parametrize(
    ("options", "capacity", "wanted"),
    [
        (
            {"actors": 3},
            "2 actors of engine.cpus 1 and engine.gpus 0",
            "3",
        ),
        (
            {"cpus": 3},
            "0 actors of engine.cpus 3 and engine.gpus 0",
            "null",
        ),
        (
            {"gpus": 0.5},
            "0 actors of engine.cpus 1 and engine.gpus 0.5",
            "null",
        ),
    ],
)
def test_ray_more_actors_than_fit_raises_user_error(
    options: dict[str, Any], capacity: str, wanted: str, cluster: None, federate: Federate
) -> None:
    with pytest.raises(UserError) as error:
        federate(engine=Ray(**options)).run()
    cluster_size = "2 processors and 0 GPUs"
    assert (
        str(error.value) == f"engine.actors: expected at most {capacity} on a cluster of {cluster_size}, got {wanted}."
    )
