"""The engine Ray on a cluster that is written down: where it may be, what fits on it, and whose states count."""

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
from fedekd.federation.engines import ray_engine, ray_pool
from fedekd.federation.engines.worker import ClientWorker
from fedekd.federation.storage import pack
from fedekd.methods import FedAvg

from .conftest import Federate
from .test_ray_pool import Play, RayError, names

pytestmark = pytest.mark.timeout(60)


class Cluster(Play):
    """As much of Ray as the engine asks for. Its actors run their clients here, and some write when all is over.

    Attributes:
        machines: What each of them has; one more is lost.
        addresses: Those that were joined; None where nobody has yet.
        fate: What becomes of the actors of the first visits, in their order: late or lost, and both are out of reach.
        out_of_reach: What these will still do.
    """

    def __init__(self) -> None:
        super().__init__(self.do)
        self.machines: list[Mapping[str, float]] = [{"CPU": 1.0, "memory": 1e9}]
        self.addresses: list[str] | None = []
        self.fate: list[str] = []
        self.out_of_reach: list[Callable[[], Any]] = []
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

    def do(self, actor: int, verb: str, arguments: Any) -> tuple[float, Any]:
        if verb == "ready":
            return 1.0, True
        host = ClientWorker(*self.parts[actor])
        if verb == "run_client" and self.fate:
            self.out_of_reach.append(lambda: host.run_client(*arguments))
            return (1000.0, None) if self.fate.pop(0) == "late" else (1.0, RayError("The actor is unavailable."))
        return 1.0, getattr(host, verb)(*arguments)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    cluster = Cluster()
    monkeypatch.setattr(ray_engine, "_imported", lambda: cluster)
    monkeypatch.setattr(ray_pool, "time", cluster)
    return cluster


@pytest.fixture
def states(tmp_path: Path) -> Path:
    """Where the clients' states are kept."""
    return tmp_path / "states"


@pytest.fixture
def elsewhere(cluster: Cluster) -> Cluster:
    """One that is not joined yet."""
    cluster.shutdown()
    return cluster


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]"])
def test_an_address_where_nobody_listens_is_told_at_once(host: str, elsewhere: Cluster, federate: Federate) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"{host}:{server.getsockname()[1]}"
        federate(engine=Ray(address=address)).engine._join()  # type: ignore[attr-defined]
        # As Ray does, the machine is asked by the address that others know it by.
        assert elsewhere.addresses == [address]
    elsewhere.shutdown()
    with pytest.raises(UserError) as told:
        federate(engine=Ray(address=address)).engine.client_state(0)
    assert str(told.value) == (
        f"engine.address is '{address}': no cluster is there (Connection refused); give auto, host:port or"
        " ray://host:port of one that runs, or null to start one"
    )
    assert elsewhere.addresses is None


def test_nobody_waits_long_for_an_address_that_says_nothing(
    elsewhere: Cluster, federate: Federate, monkeypatch: pytest.MonkeyPatch
) -> None:
    def silent(address: tuple[str, int], timeout: float) -> None:
        assert address == ("head.example", 6379)
        assert timeout <= 10
        raise TimeoutError("timed out")

    monkeypatch.setattr(socket, "create_connection", silent)
    with pytest.raises(UserError, match=r"^engine\.address is 'head\.example:6379': no cluster is there \(timed out\)"):
        federate(engine=Ray(address="head.example:6379")).engine.client_state(0)


@pytest.mark.parametrize("address", ["auto", "ray://127.0.0.1:1", "local", "127.0.0.1:port", None])
def test_other_addresses_are_left_to_ray(
    address: str | None, elsewhere: Cluster, federate: Federate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(socket, "create_connection")
    federate(engine=Ray(address=address)).engine._join()  # type: ignore[attr-defined]
    assert elsewhere.addresses == [address or "local"]


Machines = list[Mapping[str, float]]
EngineOn = Callable[[Machines, dict[str, Any]], Any]


@pytest.fixture
def engine_on(cluster: Cluster, federate: Federate, states: Path) -> EngineOn:
    """Makes an engine over a cluster of such machines."""

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
        ([{"CPU": 8.0}], {"cpus": 1}, 3),  # there are no more clients
        ([{"CPU": 8.0, "GPU": 2.0}], {"gpus": 0.6}, 2),
        ([{"CPU": 8.0, "GPU": 1.0}, {"CPU": 8.0}], {"gpus": 0.4}, 2),
        ([{"CPU": 8.0, "GPU": 1.0}], {"gpus": 0.1}, 3),
        ([{"CPU": 8.0, "GPU": 3.0}, {"CPU": 8.0, "GPU": 1.0}], {"gpus": 2.0}, 1),
        ([{"CPU": 1.0, "GPU": 4.0}, {"CPU": 4.0, "GPU": 1.0}], {"gpus": 1.0}, 2),
    ],
)
def test_as_many_actors_as_fit_on_each_machine(
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
            "2 processors and 0 GPUs: room for 0 actors of engine.cpus 2 and engine.gpus 0, each on one machine, and"
            " engine.actors is null",
        ),
        (
            [{"CPU": 2.0, "GPU": 1.0}, {"CPU": 1.0, "GPU": 1.0}],
            {"gpus": 0.6, "actors": 3},
            "3 processors and 2 GPUs: room for 2 actors of engine.cpus 1 and engine.gpus 0.6, each on one machine, and"
            " engine.actors is 3",
        ),
        (
            [{"CPU": 2.0, "GPU": 1.0}, {"CPU": 1.0, "GPU": 1.0}],
            {"gpus": 2},
            "3 processors and 2 GPUs: room for 0 actors of engine.cpus 1 and engine.gpus 2, each on one machine, and"
            " engine.actors is null",
        ),
    ],
)
def test_what_fits_on_no_machine_is_told(
    machines: Machines, options: dict[str, Any], words: str, cluster: Cluster, engine_on: EngineOn, states: Path
) -> None:
    engine = engine_on(machines, options)
    with pytest.raises(UserError, match=f"^the cluster has {re.escape(words)}$"):
        engine._started()
    assert not cluster.actors
    assert names(states) == []


@pytest.mark.parametrize("fate", ["late", "lost"])
def test_what_an_actor_out_of_reach_still_writes_counts_for_nothing(
    fate: str, cluster: Cluster, federate: Federate, states: Path
) -> None:
    """One that was late is of another round, and one that was lost has perhaps computed on another kind of machine."""
    here, there = federate(FedAvg()), federate(FedAvg(), engine=Ray(timeout=20.0, folder=str(states)))
    for run in (here, there):
        run.method.init_server(run.spec)
    cluster.fate = [fate]
    if fate == "late":
        assert not list(there.engine.run_clients(RoundRequest([1], here.method.broadcast([1], 0), 0, True)))
    for run in (here, there):
        assert len(list(run.engine.run_clients(RoundRequest([1], here.method.broadcast([1], 1), 1, True)))) == 1
    [folder] = states.iterdir()
    assert names(folder) == ["client-00001-000002.pt"]
    [still] = cluster.out_of_reach
    still()
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
        still()
    assert names(states) == []
