"""Clients in several processes: the same numbers, and a clear word when a process dies."""

from __future__ import annotations

import os
import pickle
import signal
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from fedekd.cli import main
from fedekd.errors import UserError
from fedekd.federation import MultiProcess, RoundRequest, SilentObserver
from fedekd.federation.engines.multiprocess import _dealt_out
from fedekd.methods import Broadcast, FedAvg, FedeKD

from .conftest import Federate

pytestmark = pytest.mark.slow


class Watch(SilentObserver):
    """Notes what it is told."""

    def __init__(self) -> None:
        self.begun: list[tuple[int, str]] = []
        self.steps = 0
        self.warnings: list[str] = []

    def phase_started(self, client: int, phase: str) -> None:
        self.begun.append((client, phase))

    def phase_finished(self, client: int, phase: str, steps: int) -> None:
        self.steps += steps

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def contents(run: Path) -> dict[str, bytes]:
    """Everything of a run that must not depend on where its clients ran."""
    return {path.name: path.read_bytes() for path in [run / "metrics.csv", *(run / "checkpoints").glob("*.pt")]}


def test_the_same_bytes_as_one_after_another(federate: Federate, tmp_path: Path) -> None:
    watches = Watch(), Watch()
    federate(output=tmp_path / "one", baseline_dir=tmp_path / "local1", observer=watches[0]).run()
    beside = federate(
        output=tmp_path / "two", baseline_dir=tmp_path / "local2", observer=watches[1], engine=MultiProcess(2)
    )
    beside.run()
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    references = [{path.name: path.read_bytes() for path in (tmp_path / f"local{i}").iterdir()} for i in (1, 2)]
    assert references[0] == references[1]
    assert sorted(watches[0].begun) == sorted(watches[1].begun)
    assert watches[0].steps == watches[1].steps
    assert not beside.engine._workers  # type: ignore[attr-defined]


class Suicidal(FedeKD):
    """Its client 1 takes its process with it in round 1, once."""

    def __init__(self, mark: str) -> None:
        super().__init__()
        self.mark = mark

    def receive(self, client: Any, received: Any, round_idx: int) -> dict[str, float]:
        if client.number == 1 and round_idx == 1 and not Path(self.mark).exists():
            Path(self.mark).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().receive(client, received, round_idx)


class Faulty(FedAvg):
    """Its clients find something wrong, or break."""

    def __init__(self, error: str) -> None:
        super().__init__()
        self.error = error

    def prepare_update(self, client: Any, round_idx: int) -> Any:
        raise UserError("something is wrong") if self.error == "told" else ZeroDivisionError("1 / 0")


def test_a_process_that_dies_is_told_and_the_run_goes_on_from_its_checkpoint(
    federate: Federate, tmp_path: Path
) -> None:
    quiet = federate(Suicidal(str(tmp_path)), output=tmp_path / "quiet").run()
    method = Suicidal(str(tmp_path / "dead"))
    with pytest.raises(UserError, match=r"the process of the clients 1 has died \(killed, perhaps"):
        federate(method, output=tmp_path / "run", engine=MultiProcess(3)).run()
    summary = federate(Suicidal(method.mark), output=tmp_path / "run").run()
    assert (tmp_path / "run/metrics.csv").read_bytes() == (tmp_path / "quiet/metrics.csv").read_bytes()
    assert summary["delta"] == quiet["delta"]


@pytest.mark.parametrize(("error", "kind"), [("told", UserError), ("untold", RuntimeError)])
def test_what_goes_wrong_in_a_process_comes_out_of_the_run(error: str, kind: Any, federate: Federate) -> None:
    with pytest.raises(kind, match="something is wrong" if error == "told" else "ZeroDivisionError: 1 / 0"):
        federate(Faulty(error), engine=MultiProcess(1)).run()


class Unborn(FedeKD):
    """Cannot be made again in another process, in one way or another."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def __reduce__(self) -> Any:
        return born, (self.how, os.getpid())


def born(how: str, here: int) -> Unborn:
    if os.getpid() == here:
        return Unborn(how)
    if how == "dies":
        os._exit(3)
    raise ModuleNotFoundError("no module named nowhere")


@pytest.mark.parametrize(
    ("how", "words"), [("dies", r"clients 0, 1, 2 has died \(exit code 3\)"), ("unknown", "nowhere; .* module")]
)
@pytest.mark.timeout(120)
def test_a_process_that_cannot_begin_is_told(
    how: str, words: str, federate: Federate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    run = federate(Unborn(how), engine=MultiProcess(1))
    with pytest.raises(UserError, match=words):
        run.run()
    assert not list((tmp_path / "tmp").iterdir())
    with pytest.raises(RuntimeError, match="closed"):
        run.engine.score(0)


def test_a_full_disk_in_a_process_is_told_as_one_here(federate: Federate, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        federate(baseline_dir=tmp_path / "file/local", engine=MultiProcess(1)).run()


def test_clients_stay_where_they_are_and_get_only_their_own(federate: Federate) -> None:
    run = federate(engine=MultiProcess(2))
    engine: Any = run.engine
    run.method.init_server(run.spec)
    try:
        before = engine.client_state(0)
        list(engine.run_clients(RoundRequest([0, 2], run.method.broadcast([0, 2], 0), 0, True)))
        after = engine.client_state(0)
        assert not torch.equal(*(s["networks"]["proxy"]["head.weight"] for s in (before, after)))
        engine.load_client_state(0, before)
        assert pickle.dumps(engine.client_state(0)["memory"]) == pickle.dumps(before["memory"])
        torch.testing.assert_close(engine.client_state(0)["networks"], before["networks"], rtol=0, atol=0)
        pids = [worker.process.pid for worker in engine._workers]
        assert len(set(pids)) == 2
    finally:
        engine.close()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_broadcast_for_some() -> None:
    shared = {"a": torch.zeros(1)}
    broadcast = Broadcast(shared, {0: {"b": torch.ones(1)}, 1: {"b": torch.ones(2)}})
    own = broadcast.only([1, 2])
    assert own.to(1)["b"].shape == (2,)
    assert own.personal.keys() == {1}
    assert own.to(2).keys() == {"a"}


@pytest.mark.parametrize(
    ("sizes", "processes", "largest"), [([10, 70, 20, 50], 2, 80), ([5] * 6, 3, 10), ([4, 1], 8, 4), ([3], 1, 3)]
)
def test_work_is_dealt_evenly(sizes: Sequence[int], processes: int, largest: int) -> None:
    homes = _dealt_out(sizes, processes)
    work = [sum(size for size, home in zip(sizes, homes, strict=True) if home == place) for place in set(homes)]
    assert max(work) == largest
    assert set(homes) == set(range(min(processes, len(sizes))))


def test_threads_are_shared_out_and_bad_numbers_told() -> None:
    assert [MultiProcess(n).threads(16, clients=6) for n in (1, 4, 5, 32)] == [16, 4, 3, 2]
    with pytest.raises(UserError, match=r"engine.processes is 0"):
        MultiProcess(0)


def test_by_the_command_line(npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    options = [f"--data.dataset={npz}", "--data.num_clients=3", "--data.alpha=1", "--rounds=1", "--logger=null"]
    options += ["--client.local_epochs=1", "--trainer.accelerator=cpu", "--trainer.threads=1"]
    assert main(["fit", *options, "--output=a", "--baseline_dir=la"]) == 0
    beside = ["--engine=MultiProcess", "--engine.processes=1", "--output=b", "--baseline_dir=lb"]
    assert main(["fit", *options, *beside]) == 0
    assert contents(Path("a")) == contents(Path("b"))
    assert main(["test", "b"]) == 0
    # Where clients run may be changed when a run goes on.
    Path("b/summary.json").unlink()
    assert main(["fit", "--resume", "b", "--engine=Sequential"]) == 0
