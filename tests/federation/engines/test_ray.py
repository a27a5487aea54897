"""Clients on a Ray cluster: the same numbers, whatever is lost on the way, and nothing is left behind."""

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

from fedekd.cli import main
from fedekd.data import FederatedDataModule
from fedekd.do_no_harm import DoNoHarm
from fedekd.errors import UserError
from fedekd.federation import Ray, RoundOptions, RoundRequest, SequentialEngine
from fedekd.federation.engines import ray_pool
from fedekd.federation.participation import participants
from fedekd.federation.storage import pack
from fedekd.methods import CAFEDistill, ClientOptions, ClientUpdate, FedAvg, FedeKD
from fedekd.methods.base import state_dict_bytes

from .conftest import Federate
from .test_side_by_side import Faulty, Unborn, Watch, contents

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
    """One for all tests that do not ask who starts it, with another working directory than any of them."""
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
    """Where temporary folders are made; none of them may be left."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    assert not list(folder.iterdir())


def names(folder: Path, pattern: str = "*") -> list[str]:
    return sorted(path.name for path in folder.glob(pattern))


def read(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class Keeper(Watch):
    """Notes which states lie on disk after each round, and does something then."""

    def __init__(self, temporary: Path, then: Mapping[int, Callable[[], None]] | None = None) -> None:
        super().__init__()
        self.temporary, self.then, self.states = temporary, then or {}, dict[int, list[str]]()

    def round_finished(self, row: Mapping[str, float]) -> None:
        self.states[int(row["round"])] = names(self.temporary, "fedekd-*/*")
        self.then.get(int(row["round"]), lambda: None)()


class StoppedError(Exception):
    """Ends a run at a chosen moment."""


class StopBeforeRound(Watch):
    def __init__(self, round_idx: int) -> None:
        super().__init__()
        self.round = round_idx

    def round_started(self, round_idx: int) -> None:
        if round_idx == self.round:
            raise StoppedError


# Without a cluster, or with one of their own.


def test_by_the_command_line(no_cluster: None, npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    options = [f"--data.dataset={npz}", "--data.num_clients=3", "--data.alpha=1", "--rounds=1", "--logger=null"]
    options += ["--client.local_epochs=1", "--trainer.accelerator=cpu", "--trainer.threads=1"]
    assert main(["fit", *options, "--output=a", "--baseline_dir=la"]) == 0
    on_ray = ["--engine=Ray", "--engine.actors=1", "--engine.timeout=500", "--output=b", "--baseline_dir=lb"]
    assert main(["fit", *options, *on_ray]) == 0
    assert contents(Path("a")) == contents(Path("b"))
    assert read(Path("la")) == read(Path("lb"))
    assert not ray.is_initialized()  # the cluster was the run's own
    # Where clients run may be changed when a run goes on.
    Path("b/summary.json").unlink()
    assert main(["fit", "--resume", "b", "--engine=Sequential"]) == 0
    assert contents(Path("a")) == contents(Path("b"))


@pytest.mark.parametrize("address", ["nowhere", "127.0.0.1:1"])
def test_an_address_of_nothing_is_told(address: str, no_cluster: None, federate: Federate) -> None:
    """Left to itself, Ray takes twelve minutes for the second."""
    with pytest.raises(UserError, match=rf"engine\.address is '{address}': no cluster is there \(.+\); give") as told:
        federate(engine=Ray(address=address)).run()
    assert "\n" not in str(told.value)


def test_a_machine_of_a_cluster_that_is_there_may_be_lost(
    no_cluster: None, federate: Federate, tmp_path: Path, temporary: Path
) -> None:
    from ray.cluster_utils import Cluster

    rounds = RoundOptions(rounds=3)
    federate(output=tmp_path / "one", rounds=rounds).run()
    machines = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        other = machines.add_node(num_cpus=1)
        with pytest.raises(UserError, match=r"engine\.folder is null, and the cluster has several machines: name one"):
            federate(engine=Ray(address=machines.address)).run()
        watch = Keeper(temporary, {1: lambda: machines.remove_node(other, allow_graceful=False)})
        engine = Ray(address=machines.address, folder=str(tmp_path / "states"))
        federate(output=tmp_path / "two", rounds=rounds, engine=engine, observer=watch).run()
        assert not ray.is_initialized()
        assert machines.head_node.any_processes_alive()
        assert not machines.head_node.dead_processes()  # it was left, not ended
    finally:
        ray.shutdown()
        machines.shutdown()
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert sum("was lost" in text and "does its work again" in text for text in watch.warnings) == 1
    assert names(tmp_path / "states") == []


# With the cluster that all share.


def test_the_same_bytes_as_one_after_another(
    cluster: None,
    federate: Federate,
    tmp_path: Path,
    temporary: Path,
    write_blobs: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With FedeKD, whose clients keep optimizers, and compare what they have with what they trained alone."""
    monkeypatch.chdir(tmp_path)
    npz = write_blobs(tmp_path / "more.npz", num_samples=360)
    watches, runs = (Watch(), Keeper(temporary)), []
    for watch, name, engine in zip(watches, ("one", "two"), (None, Ray(actors=2)), strict=True):
        data = FederatedDataModule(str(npz), num_clients=3, alpha=50, batch_size=8, fractions=(0.4, 0.4, 0.2))
        parts = {"data": data, "do_no_harm": DoNoHarm(rule="better", looks=2), "engine": engine, "observer": watch}
        runs.append(federate(output=tmp_path / name, baseline_dir=Path(f"local-{name}"), **parts))
        summary = runs[-1].run()
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert read(tmp_path / "local-one") == read(tmp_path / "local-two")
    assert {client["deployed"] for client in summary["clients"]} == {"federated", "local"}
    assert sorted(watches[0].begun) == sorted(watches[1].begun)
    assert watches[0].steps == watches[1].steps
    assert watches[1].warnings == []
    # One file a client, of its newest state: visits 0 and 1, and then 2.
    assert watches[1].states == {r: [f"client-{n:05d}-{r + 1:06d}.pt" for n in range(3)] for r in (1, 2)}
    assert ray.is_initialized()  # the cluster was there before the run
    with pytest.raises(RuntimeError, match="closed"):
        runs[1].engine.score(0)


def test_what_is_personal_reaches_its_client_and_who_sits_out_keeps_its_state(
    cluster: None, federate: Federate, tmp_path: Path, temporary: Path
) -> None:
    client = ClientOptions(
        local_epochs=1,
        private_model={"class_path": "fedekd.models.PrivateCNN"},
        optimizer={"class_path": "torch.optim.SGD", "init_args": {"lr": 0.05, "momentum": 0.9}},
        exits=2,
    )
    rounds, watch = RoundOptions(rounds=3, participation=0.6), Keeper(temporary)
    parts = {"client": client, "rounds": rounds}
    federate(CAFEDistill(), output=tmp_path / "one", **parts).run()
    on_ray = {"engine": Ray(actors=1, folder=str(temporary)), "observer": watch}
    federate(CAFEDistill(), output=tmp_path / "two", **parts, **on_ray).run()
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    visits = [participants(rounds, 3, 0, round_idx) for round_idx in range(4)]
    assert len({tuple(each) for each in visits[:3]}) > 1  # not always the same
    for round_idx in (1, 2, 3):
        made = [sum(number in each for each in visits[: round_idx + 1]) for number in range(3)]
        expected = [f"client-{number:05d}-{times:06d}.pt" for number, times in enumerate(made) if times]
        assert watch.states[round_idx] == expected


class Mortal(FedeKD):
    """In round 1 client 1 takes its process with it, and client 2 when its visit is over and on disk; once each.

    Args:
        marks: A folder in which who has died leaves a mark.
        temporary: Below it are the clients' states.
    """

    def __init__(self, marks: Path, temporary: Path) -> None:
        super().__init__()
        marks.mkdir(exist_ok=True)
        self.marks, self.temporary = str(marks), str(temporary)

    def receive(self, client: Any, received: Any, round_idx: int) -> dict[str, float]:
        logs = super().receive(client, received, round_idx)
        if (client.number, round_idx) == (1, 1):
            die_once(Path(self.marks) / "during")
        return logs

    def prepare_update(self, client: Any, round_idx: int) -> ClientUpdate:
        update = super().prepare_update(client, round_idx)
        if (client.number, round_idx) == (2, 1):
            update = replace(update, state=Deadly(update.state, Path(self.marks) / "after", Path(self.temporary)))
        return update


class Deadly(dict[str, torch.Tensor]):
    """Whoever takes this out of its process ends that, once; it notes which states of client 2 there are then."""

    def __init__(self, state: Mapping[str, torch.Tensor], mark: Path, temporary: Path) -> None:
        super().__init__(state)
        self.mark, self.temporary = mark, temporary

    def items(self) -> Any:
        die_once(self.mark, " ".join(names(self.temporary, "*/client-00002-*")))
        return super().items()


def die_once(mark: Path, note: str = "") -> None:
    if not mark.exists():
        mark.write_text(note)
        os.kill(os.getpid(), signal.SIGKILL)


def immortal(marks: Path, temporary: Path) -> Mortal:
    method = Mortal(marks, temporary)
    (marks / "during").touch()
    (marks / "after").touch()
    return method


def test_actors_that_die_change_nothing(cluster: None, federate: Federate, tmp_path: Path, temporary: Path) -> None:
    watches = Watch(), Watch()
    federate(immortal(tmp_path / "m1", temporary), output=tmp_path / "quiet", observer=watches[0]).run()
    method = Mortal(tmp_path / "m2", temporary)
    federate(method, output=tmp_path / "run", observer=watches[1], engine=Ray(actors=1, retries=1)).run()
    assert contents(tmp_path / "run") == contents(tmp_path / "quiet")
    assert (tmp_path / "m2/after").read_text() == "client-00002-000001.pt client-00002-000002.pt"
    assert [text.partition(" (")[0] for text in watches[1].warnings] == [
        "the actor of client 1 was lost",
        "the actor of client 2 was lost",
    ]
    assert all(text.endswith("); another one does its work again") for text in watches[1].warnings)
    assert not any("\n" in text for text in watches[1].warnings)
    # What is done twice is told once.
    assert sorted(watches[0].begun) == sorted(watches[1].begun)
    assert watches[0].steps == watches[1].steps


def test_without_retries_the_run_goes_on_from_its_checkpoint(
    cluster: None, federate: Federate, tmp_path: Path, temporary: Path
) -> None:
    federate(immortal(tmp_path / "m1", temporary), output=tmp_path / "quiet").run()
    method = Mortal(tmp_path / "m2", temporary)
    said = r"client 1 has lost 1 actors \(.+\), and engine\.retries is 0; .* use fit --resume$"
    run = federate(method, output=tmp_path / "run", engine=Ray(actors=1, retries=0))
    with pytest.raises(UserError, match=said) as told:
        run.run()
    assert "\n" not in str(told.value)
    assert not (tmp_path / "run/metrics.csv").exists()
    assert names(tmp_path / "run/checkpoints", "manifest-*") == ["manifest-0001.json"]
    with pytest.raises(RuntimeError, match="closed"):
        run.engine.score(0)
    federate(immortal(tmp_path / "m2", temporary), output=tmp_path / "run").run()
    assert contents(tmp_path / "run") == contents(tmp_path / "quiet")


@pytest.mark.parametrize(("error", "kind"), [("told", UserError), ("untold", RuntimeError)])
def test_what_goes_wrong_in_an_actor_comes_out_and_closes_the_engine(
    error: str, kind: Any, cluster: None, federate: Federate
) -> None:
    run = federate(Faulty(error), engine=Ray(actors=1))
    run.method.init_server(run.spec)
    with pytest.raises(kind) as found:
        list(run.engine.run_clients(RoundRequest([0, 1], run.method.broadcast([0, 1], 0), 0, True)))
    text = str(found.value)
    assert type(found.value) is kind
    assert text == "something is wrong" if error == "told" else "in prepare_update\n" in text
    assert error == "told" or text.strip().endswith("ZeroDivisionError: 1 / 0")
    with pytest.raises(RuntimeError, match="closed"):
        run.engine.score(0)


def test_why_an_actor_cannot_begin_is_told(cluster: None, federate: Federate) -> None:
    with pytest.raises(UserError, match="nowhere"):
        federate(Unborn("unknown"), engine=Ray(actors=1)).run()


class Sleepy(FedeKD):
    """Some of its clients sleep through a round, once; in round 0 nobody does.

    Args:
        marks: A folder in which who falls asleep leaves a mark.
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
    """An engine in this process, some of whose clients are missing in some rounds."""

    class Missing(SequentialEngine):
        def run_clients(self, request: RoundRequest) -> Any:
            there = [number for number in request.participants if (number, request.round_idx) not in missing]
            yield from super().run_clients(request.only(there))

    return Missing


def test_a_run_goes_on_without_those_that_are_late(
    cluster: None, federate: Federate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But after the last aggregate, when nothing can go on without them, and it goes on from its checkpoint."""
    rounds = RoundOptions(rounds=2, quorum=3)
    federate(output=tmp_path / "quiet", rounds=rounds, engine=without((1, 1))).run()
    method, watch = Sleepy(tmp_path / "marks", [(1, 1), (2, 2)]), Watch()

    def now() -> float:
        return time.monotonic() + 1000 * len(names(tmp_path / "marks"))

    # The clock runs ahead as soon as somebody sleeps: nobody has to wait for it, nor is late on a slow machine.
    monkeypatch.setattr(ray_pool, "time", SimpleNamespace(monotonic=now))
    parts = {"output": tmp_path / "run", "rounds": rounds, "engine": Ray(actors=1, timeout=300)}
    with pytest.raises(UserError, match=r"client 2 has not answered within engine\.timeout, 300 s; .* fit --resume$"):
        federate(method, observer=watch, **parts).run()
    assert watch.warnings == [
        "client 1 has not answered within engine.timeout, 300 s, and is missing from this round",
        "round 2: 2 updates are fewer than the quorum of 3; the server keeps its state",
    ]
    kept = [(tmp_path / f"run/checkpoints/server-000{round_idx}.pt").read_bytes() for round_idx in (1, 2)]
    assert kept[0] == kept[1]
    files = names(
        tmp_path / "run/checkpoints", "client-*"
    )  # after round 0, and after 1, in which client 1 is as it was
    assert files == [f"client-{client:03d}-000{after}.pt" for client in range(3) for after in (1, 2)[: 2 - client % 2]]
    resumed = federate(method, **parts)
    resumed.run()
    size = state_dict_bytes(method.broadcast([0], 2).to(0))
    assert resumed.progress.bytes_down == (3 + 2 + 3) * size
    assert resumed.progress.bytes_up == (3 + 2) * size
    assert contents(tmp_path / "run") == contents(tmp_path / "quiet")


def test_a_round_in_which_nobody_answers_is_none(cluster: None, federate: Federate, tmp_path: Path) -> None:
    rounds = RoundOptions(rounds=3, participation=0.3)
    [late] = participants(rounds, 3, 0, 1)
    parts = {"rounds": rounds, "output": tmp_path / "quiet", "engine": without((late, 1))}
    with pytest.raises(StoppedError):
        federate(observer=StopBeforeRound(2), **parts).run()
    federate(**parts).run()  # no row and no client's state is new, and yet it goes on from there
    parts |= {"output": tmp_path / "run", "engine": Ray(actors=1, timeout=15)}
    watch = Watch()
    run = federate(Sleepy(tmp_path / "marks", [(late, 1)]), observer=watch, **parts)
    run.run()
    assert watch.warnings == [
        f"client {late} has not answered within engine.timeout, 15 s, and is missing from this round",
        "round 2: 0 updates are fewer than the quorum of 1; the server keeps its state",
    ]
    assert [row["round"] for row in run.progress.history] == [2, 3]
    assert contents(tmp_path / "run") == contents(tmp_path / "quiet")


def test_states_lie_in_the_folder_until_the_engine_is_closed(
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
        for number in range(3):  # 1 has not been visited
            assert engines[0].score(number) == engines[1].score(number)
            assert pack(engines[0].client_state(number)) == pack(engines[1].client_state(number))
        assert pack(engines[0].client_state(0)) != before[0]
        engines[0].load_client_state(0, state)
        assert pack(engines[0].client_state(0)) == before[0]
        assert names(folder, "*/client-00000-*") == ["client-00000-000002.pt"]
        assert engines[0].score(0) != engines[1].score(0)
    finally:
        engines[0].close()
    assert names(folder) == []
    engines[0].close()
    assert ray.is_initialized()  # the cluster was there before the engine


@pytest.mark.parametrize("verb", ["score", "references", "visit", "client_state", "load_client_state"])
def test_a_closed_engine_says_so(verb: str, cluster: None, federate: Federate) -> None:
    run, here = federate(FedAvg(), engine=Ray(actors=1)), federate(FedAvg())
    for each in (run, here):
        each.method.init_server(each.spec)
    state = here.engine.client_state(0)
    arguments: dict[str, tuple[Any, ...]] = {
        "score": (0,),
        "references": ({0: 1},),
        "visit": ([0], run.method.broadcast([0], 0), 0, True),
        "client_state": (0,),
        "load_client_state": (0, state),
    }
    run.engine.load_client_state(0, state)
    run.engine.close()
    with pytest.raises(RuntimeError, match="the engine is closed"):
        list(getattr(run.engine, verb)(*arguments[verb]))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"actors": 3},
            "room for 2 actors of engine.cpus 1 and engine.gpus 0, each on one machine, and engine.actors is 3",
        ),
        (
            {"cpus": 3},
            "room for 0 actors of engine.cpus 3 and engine.gpus 0, each on one machine, and engine.actors is null",
        ),
        (
            {"gpus": 0.5},
            "room for 0 actors of engine.cpus 1 and engine.gpus 0.5, each on one machine, and engine.actors is null",
        ),
    ],
)
def test_more_than_the_cluster_has_room_for_is_told(
    options: dict[str, Any], words: str, cluster: None, federate: Federate
) -> None:
    with pytest.raises(UserError) as told:
        federate(engine=Ray(**options)).run()
    assert str(told.value) == f"the cluster has 2 processors and 0 GPUs: {words}"
