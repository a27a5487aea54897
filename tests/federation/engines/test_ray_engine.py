"""RayExecutor on a scripted cluster: addresses, number of actors, and states of unreachable actors."""

from __future__ import annotations

import re
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fedekd.errors import UserError
from fedekd.federation import Ray, RoundRequest
from fedekd.federation.checkpoint import pack
from fedekd.federation.engines import pool as pool_module
from fedekd.federation.engines import ray_engine
from fedekd.federation.engines.worker import ClientWorker
from fedekd.methods import FedAvg

from ..conftest import Federate
from .test_pool import RayError, ScriptedRay
from .test_worker import names

pytestmark = pytest.mark.timeout(60)


class Cluster(ScriptedRay):
    """Scripted Ray whose actors run their clients in this process; some become unreachable and still write.

    Attributes:
        machines: Resources of each machine; one more is dead.
        addresses: Addresses of `init`; None while not connected.
        fates: Fates of the first `run_client` calls: late or lost; both actors are then unreachable.
        unreachable: What the unreachable actors will still do.
    """

    def __init__(self) -> None:
        super().__init__(self.run_here)
        self.machines: list[Mapping[str, float]] = [{"CPU": 1.0, "memory": 1e9}]
        self.addresses: list[str] | None = []
        self.fates: list[str] = []
        self.unreachable: list[Callable[[], Any]] = []
        self.util = SimpleNamespace(get_node_ip_address=lambda: "127.0.0.1")

    def is_initialized(self) -> bool:
        return self.addresses is not None

    def init(self, address: str, **options: Any) -> None:
        self.addresses = [*(self.addresses or []), address]

    def shutdown(self) -> None:
        self.addresses = None

    def nodes(self) -> list[dict[str, Any]]:
        lost = {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}}
        return [lost, *({"Alive": True, "Resources": machine} for machine in self.machines)]

    def put(self, content: Any) -> Any:
        return content

    def run_here(self, actor: int, task: str, arguments: Any) -> tuple[float, Any]:
        if task == "ready":
            return 1.0, True
        worker = ClientWorker(*self.parts[actor])
        if task == "run_client" and self.fates:
            self.unreachable.append(lambda: worker.run_client(*arguments))
            return (1000.0, None) if self.fates.pop(0) == "late" else (1.0, RayError("The actor is unavailable."))
        return 1.0, getattr(worker, task)(*arguments)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    cluster = Cluster()
    monkeypatch.setattr(ray_engine, "_import_ray", lambda: cluster)
    monkeypatch.setattr(pool_module, "time", cluster)
    return cluster


@pytest.fixture
def states(tmp_path: Path) -> Path:
    """Folder of the client states."""
    return tmp_path / "states"


@pytest.fixture
def disconnected(cluster: Cluster) -> Cluster:
    """Cluster that is not joined yet."""
    cluster.shutdown()
    return cluster


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]"])
def test_connect_address_without_listener_raises_at_once(host: str, disconnected: Cluster, federate: Federate) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"{host}:{server.getsockname()[1]}"
        federate(engine=Ray(address=address)).engine.executor.connect()  # type: ignore[attr-defined]
        # As Ray does, the address of the machine is used in place of the loopback.
        assert disconnected.addresses == [address]
    disconnected.shutdown()
    with pytest.raises(UserError) as error:
        federate(engine=Ray(address=address)).engine.client_state(0)
    assert str(error.value) == (
        "engine.address: expected auto, host:port or ray://host:port of a running cluster, or null to start one,"
        f" got '{address}' (Connection refused)."
    )
    assert disconnected.addresses is None


def test_connect_silent_address_times_out_after_ten_seconds(
    disconnected: Cluster, federate: Federate, monkeypatch: pytest.MonkeyPatch
) -> None:
    def silent(address: tuple[str, int], timeout: float) -> None:
        assert address == ("head.example", 6379)
        assert timeout <= 10
        raise TimeoutError("timed out")

    monkeypatch.setattr(socket, "create_connection", silent)
    with pytest.raises(UserError, match=r"^engine\.address: .* got 'head\.example:6379' \(timed out\)\.$"):
        federate(engine=Ray(address="head.example:6379")).engine.client_state(0)


@pytest.mark.parametrize("address", ["auto", "ray://127.0.0.1:1", "local", "127.0.0.1:port", None])
def test_connect_passes_other_addresses_to_ray(
    address: str | None, disconnected: Cluster, federate: Federate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(socket, "create_connection")
    federate(engine=Ray(address=address)).engine.executor.connect()  # type: ignore[attr-defined]
    assert disconnected.addresses == [address or "local"]


Machines = list[Mapping[str, float]]
EngineOn = Callable[[Machines, dict[str, Any]], Any]


@pytest.fixture
def engine_on(cluster: Cluster, federate: Federate, states: Path) -> EngineOn:
    """Builds an engine on a cluster of machines."""

    def make(machines: Machines, options: dict[str, Any]) -> Any:
        cluster.machines = machines
        return federate(engine=Ray(folder=str(states), **options)).engine

    return make


@pytest.mark.parametrize(
    ("machines", "options", "actors"),
    [
        ([{"CPU": 1.0}, {"CPU": 1.0}], {"cpus": 1}, 2),
        ([{"CPU": 3.0}, {"CPU": 1.0}, {"CPU": 2.0}], {"cpus": 2}, 2),
        ([{"CPU": 3.0}, {"CPU": 1.0}, {"CPU": 2.0}], {"cpus": 2, "actors": 1}, 1),
        ([{"CPU": 8.0}], {"cpus": 1}, 3),  # one per client
        ([{"CPU": 8.0, "GPU": 2.0}], {"gpus": 0.6}, 2),
        ([{"CPU": 8.0, "GPU": 1.0}, {"CPU": 8.0}], {"gpus": 0.4}, 2),
        ([{"CPU": 8.0, "GPU": 1.0}], {"gpus": 0.1}, 3),
        ([{"CPU": 8.0, "GPU": 3.0}, {"CPU": 8.0, "GPU": 1.0}], {"gpus": 2.0}, 1),
        ([{"CPU": 1.0, "GPU": 4.0}, {"CPU": 4.0, "GPU": 1.0}], {"gpus": 1.0}, 2),
    ],
)
def test_engine_starts_as_many_actors_as_fit_on_each_machine(
    machines: Machines, options: dict[str, Any], actors: int, cluster: Cluster, engine_on: EngineOn
) -> None:
    engine = engine_on(machines, options)
    engine._started()
    assert len(cluster.actors) == actors
    engine.close()


@pytest.mark.parametrize(
    ("machines", "options", "words"),
    [
        (
            [{"CPU": 1.0}, {"CPU": 1.0}],
            {"cpus": 2},
            "0 actors of engine.cpus 2 and engine.gpus 0 on a cluster of 2 processors and 0 GPUs, got null",
        ),
        (
            [{"CPU": 2.0, "GPU": 1.0}, {"CPU": 1.0, "GPU": 1.0}],
            {"gpus": 0.6, "actors": 3},
            "2 actors of engine.cpus 1 and engine.gpus 0.6 on a cluster of 3 processors and 2 GPUs, got 3",
        ),
        (
            [{"CPU": 2.0, "GPU": 1.0}, {"CPU": 1.0, "GPU": 1.0}],
            {"gpus": 2},
            "0 actors of engine.cpus 1 and engine.gpus 2 on a cluster of 3 processors and 2 GPUs, got null",
        ),
    ],
)
def test_engine_more_actors_than_fit_raises_user_error(
    machines: Machines, options: dict[str, Any], words: str, cluster: Cluster, engine_on: EngineOn, states: Path
) -> None:
    engine = engine_on(machines, options)
    with pytest.raises(UserError, match=rf"^engine\.actors: expected at most {re.escape(words)}\.$"):
        engine.evaluate(0)
    assert not cluster.actors
    assert names(states) == []


@pytest.mark.parametrize("fate", ["late", "lost"])
def test_engine_ignores_states_written_by_an_unreachable_actor(
    fate: str, cluster: Cluster, federate: Federate, states: Path
) -> None:
    """A late one is of another round; a lost one may have run on other hardware."""
    here, there = federate(FedAvg()), federate(FedAvg(), engine=Ray(timeout=20.0, folder=str(states)))
    for run in (here, there):
        run.method.init_server(run.spec)
    cluster.fates = [fate]
    if fate == "late":
        assert not list(there.engine.run_clients(RoundRequest([1], here.method.broadcast([1], 0), 0, True)))
    for run in (here, there):
        assert len(list(run.engine.run_clients(RoundRequest([1], here.method.broadcast([1], 1), 1, True)))) == 1
    [folder] = states.iterdir()
    assert names(folder) == ["client-00001-000002.pt"]
    [write_late] = cluster.unreachable
    write_late()
    assert names(folder) == ["client-00001-000001.pt", "client-00001-000002.pt"]
    for round_idx in (2, 3):
        assert pack(there.engine.client_state(1)) == pack(here.engine.client_state(1))
        for run in (here, there):
            list(run.engine.run_clients(RoundRequest([1], here.method.broadcast([1], round_idx), round_idx, True)))
    there.engine.load_client_state(1, here.engine.client_state(1))
    assert pack(there.engine.client_state(1)) == pack(here.engine.client_state(1))
    assert names(folder) == ["client-00001-000001.pt", "client-00001-000005.pt"]
    there.engine.close()
    with pytest.raises(FileNotFoundError):
        write_late()
    assert names(states) == []
