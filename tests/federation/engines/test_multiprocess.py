"""Engine MultiProcess: results equal to the sequential engine, and errors of worker processes."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from fedekd.errors import UserError
from fedekd.federation import MultiProcess, RoundRequest
from fedekd.federation.checkpoint import unpack
from fedekd.methods import FedAvg, FedeKD

from ..conftest import Federate, Recorder
from ..runs import contents

pytestmark = pytest.mark.slow


def test_multiprocess_gives_the_bytes_of_the_sequential_engine(federate: Federate, tmp_path: Path) -> None:
    recorders = Recorder(), Recorder()
    federate(output=tmp_path / "one", baseline_dir=tmp_path / "local1", observer=recorders[0]).run()
    parallel = federate(
        output=tmp_path / "two", baseline_dir=tmp_path / "local2", observer=recorders[1], engine=MultiProcess(2)
    )
    parallel.run()
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    baselines = [{path.name: path.read_bytes() for path in (tmp_path / f"local{i}").iterdir()} for i in (1, 2)]
    assert baselines[0] == baselines[1]
    assert sorted(recorders[0].phases) == sorted(recorders[1].phases)
    assert recorders[0].steps == recorders[1].steps
    assert not multiprocessing.active_children()


def test_multiprocess_damaged_state_raises_one_line(federate: Federate) -> None:
    run = federate(engine=MultiProcess(1))
    engine: Any = run.engine
    run.method.init_server(run.spec)
    engine.load_client_state(1, engine.client_state(1))
    [path] = engine._store.folder.glob("client-00001-000001.pt")
    content = path.read_bytes()
    path.write_bytes(content[:100] + bytes([content[100] ^ 1]) + content[101:])
    with pytest.raises(UserError, match=r"client 1 is damaged: .*\. Saved rounds are kept; .*--resume\.$"):
        engine.evaluate(1)


class KillsProcess(FedeKD):
    """Client 1 kills its process in round 1, once."""

    def __init__(self, mark: str) -> None:
        super().__init__()
        self.mark = mark

    def receive(self, client: Any, received: Any, round_idx: int) -> dict[str, float]:
        if client.number == 1 and round_idx == 1 and not Path(self.mark).exists():
            Path(self.mark).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().receive(client, received, round_idx)


class Faulty(FedAvg):
    """Clients raise a UserError or another exception."""

    def __init__(self, error: str) -> None:
        super().__init__()
        self.error = error

    def prepare_update(self, client: Any, round_idx: int) -> Any:
        raise UserError("something is wrong") if self.error == "user" else ZeroDivisionError("1 / 0")


def test_multiprocess_killed_process_raises_and_the_run_resumes(federate: Federate, tmp_path: Path) -> None:
    quiet = federate(KillsProcess(str(tmp_path)), output=tmp_path / "quiet").run()
    method = KillsProcess(str(tmp_path / "dead"))
    with pytest.raises(
        UserError, match=r"client 1: 1 workers lost \(killed, perhaps for lack of memory: .*fit --resume\.$"
    ):
        federate(method, output=tmp_path / "run", engine=MultiProcess(3)).run()
    summary = federate(KillsProcess(method.mark), output=tmp_path / "run").run()
    assert (tmp_path / "run/metrics.csv").read_bytes() == (tmp_path / "quiet/metrics.csv").read_bytes()
    assert summary["delta"] == quiet["delta"]


@pytest.mark.parametrize(("error", "kind"), [("user", UserError), ("other", RuntimeError)])
def test_multiprocess_exception_of_a_client_is_raised_by_the_run(error: str, kind: Any, federate: Federate) -> None:
    with pytest.raises(kind, match="something is wrong" if error == "user" else "^ZeroDivisionError: 1 / 0") as caught:
        federate(Faulty(error), engine=MultiProcess(1)).run()
    # The exception holds the connection, so that the process does not end by itself.
    assert caught.value.__traceback__ is not None
    assert not multiprocessing.active_children()


class FailsToUnpickle(FedeKD):
    """Exits or raises when a worker process unpickles it."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def __reduce__(self) -> Any:
        return unpickle, (self.how, os.getpid())


def unpickle(how: str, here: int) -> FailsToUnpickle:
    if os.getpid() == here:
        return FailsToUnpickle(how)
    if how == "dies":
        os._exit(3)
    raise ModuleNotFoundError("no module named nowhere")


@pytest.mark.parametrize(
    ("how", "words"), [("dies", r"^a worker could not start: exit code 3$"), ("unknown", r"nowhere\. .* module\.$")]
)
@pytest.mark.timeout(120)
def test_multiprocess_worker_that_cannot_start_raises_user_error(
    how: str, words: str, federate: Federate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    run = federate(FailsToUnpickle(how), engine=MultiProcess(1))
    with pytest.raises(UserError, match=words):
        run.run()
    assert not list((tmp_path / "tmp").iterdir())
    with pytest.raises(RuntimeError, match="closed"):
        run.engine.evaluate(0)


def test_multiprocess_os_error_of_a_worker_keeps_its_type(federate: Federate, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        federate(baseline_dir=tmp_path / "file/local", engine=MultiProcess(1)).run()


def test_multiprocess_loads_states_and_ends_its_processes(federate: Federate) -> None:
    run = federate(engine=MultiProcess(2))
    engine: Any = run.engine
    run.method.init_server(run.spec)
    try:
        before = unpack(engine.client_state(0).content)
        list(engine.run_clients(RoundRequest([0, 2], run.method.broadcast([0, 2], 0), 0, True)))
        after = unpack(engine.client_state(0).content)
        assert not torch.equal(*(s["networks"]["proxy"]["head.weight"] for s in (before, after)))
        engine.load_client_state(0, before)
        restored = unpack(engine.client_state(0).content)
        assert pickle.dumps(restored["method_state"]) == pickle.dumps(before["method_state"])
        torch.testing.assert_close(restored["networks"], before["networks"], rtol=0, atol=0)
        pids = [process.pid for process in multiprocessing.active_children()]
        assert len(set(pids)) == 2
    finally:
        engine.close()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_multiprocess_threads_are_an_equal_share_of_the_cores() -> None:
    assert [MultiProcess(n).threads(16, clients=6) for n in (1, 4, 5, 32)] == [16, 4, 3, 2]
    with pytest.raises(UserError, match=r"^engine\.processes: expected at least 1, got 0\.$"):
        MultiProcess(0)
