"""StateStore and ClientWorker: versions of states, and repeated tasks."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedekd.federation import Orchestrator, RoundRequest
from fedekd.federation.checkpoint import pack
from fedekd.federation.engines import worker as worker_module
from fedekd.federation.engines.worker import ClientWorker, DamagedStateError, Event, StateStore, WorkerSetup
from fedekd.global_state import exclusive
from fedekd.methods import Broadcast, StateDict

from ..conftest import Federate


def state(value: float) -> dict[str, Any]:
    return {"networks": {"private": {"weight": torch.full((2,), value)}}, "method_state": {}, "supervised_epochs": 3}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_store_write_keeps_one_file_per_version(tmp_path: Path) -> None:
    store = StateStore(tmp_path)
    written = {(1, 11): 0.5, (11, 1): 1.5, (1, 1): 2.5, (111, 1): 3.5, (123456, 1): 4.5, (1, 23456): 5.5}
    for (number, version), value in written.items():
        store.write(number, version, state(value))
    assert len(names(tmp_path)) == len(written)
    for (number, version), value in written.items():
        content = StateStore(tmp_path).read(number, version)
        assert content["networks"]["private"]["weight"].tolist() == [value] * 2
        assert content["supervised_epochs"] == 3
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


@pytest.mark.parametrize("place", [0.0, 0.3, 0.6, 0.9, 0.999])
def test_store_read_of_a_damaged_state_names_the_file(tmp_path: Path, place: float) -> None:
    store = StateStore(tmp_path)
    store.write(1, 2, state(0.5))
    [path] = tmp_path.iterdir()
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 4
    path.write_bytes(content)
    with pytest.raises(DamagedStateError, match=r"client-00001-000002\.pt: the state of client 1 is damaged: it does"):
        store.read(1, 2)
    path.write_bytes(pack(state(0.5)))  # of a version without checksums
    with pytest.raises(DamagedStateError):
        store.read(1, 2)


def test_store_write_is_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = StateStore(tmp_path)
    store.write(0, 1, state(0.5))
    before = names(tmp_path)
    during: list[list[str]] = []

    def full(state: Any) -> bytes:
        during.append(names(tmp_path))
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(worker_module, "pack", full)
    for version in (1, 2):
        with pytest.raises(OSError, match="No space"):
            store.write(0, version, state(1.5))
    assert len(during[0]) == 2  # while it was written
    assert names(tmp_path) == before
    assert store.read(0, 1)["networks"]["private"]["weight"].tolist() == [0.5] * 2


def test_store_write_to_a_removed_folder_raises(tmp_path: Path) -> None:
    """The engine is closed: a worker that still writes must not create the folder again."""
    store = StateStore(tmp_path / "states")
    with pytest.raises(FileNotFoundError, match="states"):
        store.write(0, 1, state(0.5))
    assert names(tmp_path) == []


def make_worker(run: Orchestrator, folder: Path) -> ClientWorker:
    """Worker with all clients of a federation, and their states in a new folder."""
    run.method.init_server(run.spec)
    folder.mkdir()
    setup = WorkerSetup.build(run.method, run.data.samples, list(run.data.clients), run.spec, None, folder)
    return ClientWorker(setup, np.ascontiguousarray(run.data.samples.inputs.numpy()))


def fail_halfway(worker: ClientWorker, version: int, shared: StateDict) -> None:
    """Run client 1 with an error at the end of its update."""
    method: Any = worker.engine.method

    def broken(client: Any, round_idx: int) -> Any:
        type(method).prepare_update(method, client, round_idx)
        raise OSError("halfway")

    method.prepare_update = broken
    with pytest.raises(OSError, match="halfway"):
        worker.run_client(1, version, RoundRequest([1], Broadcast(shared), 0, True), {})
    del method.prepare_update


def is_phases(events: Sequence[Event], *names: str) -> bool:
    """Whether the events are the start and end of these phases of client 1."""
    phases = [(name, arguments[:2]) for name, arguments in events]
    return phases == [(f"phase_{what}", (1, name)) for name in names for what in ("started", "finished")]


def test_run_client_repeated_from_the_same_version_gives_equal_bytes(federate: Federate, tmp_path: Path) -> None:
    run = federate()
    worker = make_worker(run, tmp_path / "states")
    shared = run.method.broadcast([1], 0).shared
    states, updates = [], []
    for version in (0, 0, 1):
        fail_halfway(worker, version, shared)
        result, events = worker.run_client(1, version, RoundRequest([1], Broadcast(shared), 0, True), {})
        assert is_phases(events, "receive", "update")
        assert not worker.engine.clients  # the memory of the client is freed
        assert result.update is not None
        updates.append(result.update.state)
        states.append((tmp_path / "states" / f"client-00001-{version + 1:06d}.pt").read_bytes())
    assert names(tmp_path / "states") == ["client-00001-000001.pt", "client-00001-000002.pt"]
    assert states[0] == states[1]
    for name, tensor in updates[0].items():
        assert torch.equal(tensor, updates[1][name]), name


def test_task_after_a_failed_one_starts_from_the_stored_state(federate: Federate, tmp_path: Path) -> None:
    run = federate()
    worker = make_worker(run, tmp_path / "states")
    worker.write_initial_state(1)
    before = worker.store.read(1, 0)
    for task, arguments, expected in (
        ("write_initial_state", (), ()),
        ("evaluate", (0,), ()),
        ("local_baseline", (1,), ("local",)),
    ):
        fail_halfway(worker, 0, run.method.broadcast([1], 0).shared)
        _, events = getattr(worker, task)(1, *arguments)
        assert is_phases(events, *expected), task
    assert pack(worker.store.read(1, 0)) == pack(before)


def test_worker_changes_warning_filters_under_the_lock(
    federate: Federate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from_numpy, is_free = torch.from_numpy, list[bool]()

    def observed(array: Any) -> Any:
        with ThreadPoolExecutor(1) as pool:
            is_free.append(pool.submit(lock.acquire, blocking=False).result())  # type: ignore[attr-defined]
        return from_numpy(array)

    lock = exclusive()
    run = federate()
    monkeypatch.setattr(worker_module.torch, "from_numpy", observed)
    make_worker(run, tmp_path / "store")
    assert is_free == [False]
