"""Results of a federated run: repeatability, resume, participation, rejected updates, local baselines."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from fedekd.data import FederatedDataModule
from fedekd.errors import UserError
from fedekd.federation import BaselineOptions, Orchestrator, RoundOptions, RunFolder, SilentObserver
from fedekd.federation.checkpoint import CheckpointStore
from fedekd.methods import Broadcast, ClientOptions, ClientUpdate, FedAvg, FedeKD, Local, Method
from fedekd.methods.base import state_dict_bytes
from fedekd.privacy import GaussianMechanism
from fedekd.reporting import metrics_csv

from .conftest import Federate, Recorder, federation
from .runs import BackwardsEngine, StoppedError, assert_equal_weights, repeatable, weights


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_run_lambda_kd_zero_equals_local_bit_for_bit(federate: Federate, npz: Path, task: Any) -> None:
    parts = {"data": FederatedDataModule(str(npz), num_clients=3, alpha=5.0, batch_size=8, task=task)}
    local_run, federated = federate(Local(), **parts), federate(FedeKD(lambda_kd=0), **parts)
    ours, theirs = federated.run(), local_run.run()
    assert_equal_weights(weights(local_run), weights(federated))
    assert ours["delta"]["avg"] == ours["delta"]["worst"] == 0.0
    assert [client["score"] for client in ours["clients"]] == [client["score"] for client in theirs["clients"]]
    assert [client["local"] for client in ours["clients"]] == [client["score"] for client in theirs["clients"]]


def test_run_gate_and_distillation_change_the_weights(federate: Federate) -> None:
    one, two, three = federate(FedeKD(lambda_kd=0)), federate(FedeKD()), federate(FedeKD(gate="none"))
    for run in (one, two, three):
        run.run()
    name = "0/head.weight"
    assert not torch.equal(weights(one)[name], weights(two)[name])
    assert not torch.equal(weights(two)[name], weights(three)[name])


def test_run_same_seed_gives_equal_bytes_and_another_seed_does_not(federate: Federate, tmp_path: Path) -> None:
    contents = []
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        summary = federate(output=tmp_path / folder, seed=seed).run()
        files = CheckpointStore(tmp_path / folder / "checkpoints").digests()
        files["metrics.csv"] = (tmp_path / folder / "metrics.csv").read_text()
        files["summary"] = json.dumps(repeatable(summary))
        contents.append(files)
    assert contents[0] == contents[1]
    assert contents[0] != contents[2]


class BackwardsBaselines(BackwardsEngine):
    def local_baselines(self, rounds: Any) -> Any:
        return super().local_baselines(dict(reversed(rounds.items())))


def test_run_order_of_clients_does_not_change_results(federate: Federate) -> None:
    forwards, backwards = federate(), federate(engine=BackwardsBaselines)
    assert repeatable(forwards.run()) == repeatable(backwards.run())
    assert_equal_weights(weights(forwards), weights(backwards))
    assert_equal_weights(weights(forwards, "proxy"), weights(backwards, "proxy"))
    assert metrics_csv(forwards.progress.history) == metrics_csv(backwards.progress.history)


class StopAtEvent(SilentObserver):
    """Observer that stops a run at its n-th event."""

    def __init__(self, events: int) -> None:
        self.events_left = events

    def _count(self) -> None:
        self.events_left -= 1
        if self.events_left == 0:
            raise StoppedError

    def phase_started(self, client: int, phase: str) -> None:
        self._count()

    def round_finished(self, row: Any) -> None:
        self._count()


@pytest.fixture(scope="module")
def uninterrupted(
    write_blobs: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Orchestrator, dict[str, Any]]:
    """A federation that was not stopped, and its summary."""
    whole = federation(write_blobs(tmp_path_factory.mktemp("data") / "blobs.npz"))
    return whole, whole.run()


@pytest.mark.slow
@pytest.mark.parametrize("events", [1, 2, 4, 7, 10, 11, 13, 16, 18, 20])
def test_resume_after_a_stop_at_any_event_gives_equal_results(
    federate: Federate, uninterrupted: tuple[Orchestrator, dict[str, Any]], tmp_path: Path, events: int
) -> None:
    whole, expected = uninterrupted
    with pytest.raises(StoppedError):
        federate(output=tmp_path / "run", baseline_dir=tmp_path / "local", observer=StopAtEvent(events)).run()
    again = federate(output=tmp_path / "run", baseline_dir=tmp_path / "local")
    assert repeatable(again.run()) == repeatable(expected)
    assert metrics_csv(again.progress.history) == metrics_csv(whole.progress.history)
    assert_equal_weights(weights(whole), weights(again))


def test_resume_with_partial_participation_gives_equal_results(federate: Federate, tmp_path: Path) -> None:
    rounds = RoundOptions(rounds=4, participation=0.4)  # one client of three
    whole = federate(rounds=rounds)
    expected = whole.run()
    with pytest.raises(StoppedError):
        federate(rounds=rounds, output=tmp_path, observer=StopAtEvent(9)).run()
    again = federate(rounds=rounds, output=tmp_path)
    assert repeatable(again.run()) == repeatable(expected)
    assert_equal_weights(weights(whole), weights(again))
    assert whole.progress.history[0]["comm/updates"] == 1
    # Delta uses the local baseline after as many supervised rounds as the client had.
    engine: Any = whole.engine
    for client in expected["clients"]:
        trained = engine.clients[client["client"]].supervised_epochs
        assert client["local"] == whole.progress.local[client["client"]][trained - 1]


class CallRecorder(Method):
    """Records the calls of the client's hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int, int]] = []

    def init_server(self, spec: Any) -> None:
        self.server_state = {"total": torch.zeros(1)}

    def broadcast(self, participants: Sequence[int], round_idx: int) -> Broadcast:
        return Broadcast(self.server_state, {1: {"extra": torch.ones(2)}})

    def receive(self, client: Any, received: Any, round_idx: int) -> dict[str, float]:
        self.calls.append(("receive", client.number, round_idx))
        assert ("extra" in received) == (client.number == 1)
        return {}

    def prepare_update(self, client: Any, round_idx: int) -> ClientUpdate:
        self.calls.append(("update", client.number, round_idx))
        state = {"total": torch.tensor([float(client.number)])}
        if client.number == 1:
            state["extra"] = torch.ones(2)
        return ClientUpdate(client.number, state, len(client.splits.train))

    def aggregate(self, updates: Sequence[ClientUpdate], round_idx: int) -> None:
        assert [update.client for update in updates] == sorted(update.client for update in updates)
        self.server_state = {"total": self.server_state["total"] + sum(u.state["total"] for u in updates)}


def test_run_calls_hooks_in_the_order_of_algorithm_1(federate: Federate) -> None:
    method = CallRecorder()
    federate(method).run()
    expected = []
    for round_idx in range(3):
        for client in range(3):
            expected.append(("receive", client, round_idx))
            if round_idx < 2:
                expected.append(("update", client, round_idx))
    assert method.calls == expected
    assert method.server_state["total"].item() == 2 * (0 + 1 + 2)


def test_run_bytes_are_those_of_the_transferred_tensors(federate: Federate) -> None:
    run = federate()
    summary = run.run()
    proxy = state_dict_bytes(run.method.server_state)
    assert summary["bytes_up"] == 2 * 3 * proxy
    assert summary["bytes_down"] == 3 * 3 * proxy  # the initial proxy too
    assert sum(row["comm/bytes_up"] for row in run.progress.history) == summary["bytes_up"]
    assert sum(row["comm/bytes_down"] for row in run.progress.history) == summary["bytes_down"]


class SendsNaN(FedeKD):
    """Client 1 sends NaN in the first round."""

    def prepare_update(self, client: Any, round_idx: int) -> ClientUpdate:
        update = super().prepare_update(client, round_idx)
        if client.number == 1 and round_idx == 0:
            state = {name: torch.full_like(tensor, torch.nan) for name, tensor in update.state.items()}
            return ClientUpdate(1, state, 1)
        return update


def test_run_update_with_nan_is_rejected_with_its_client(federate: Federate) -> None:
    recorder = Recorder()
    run = federate(SendsNaN(), observer=recorder)
    run.run()
    assert len(recorder.warnings) == 1
    assert "round 1: update of client 1 rejected: " in recorder.warnings[0]
    assert "finite values, got NaN" in recorder.warnings[0]
    assert [row["comm/updates"] for row in run.progress.history] == [2, 3]
    assert all(torch.isfinite(tensor).all() for tensor in run.method.server_state.values())


def test_run_updates_below_quorum_leave_the_server_state(federate: Federate) -> None:
    recorder = Recorder()
    run = federate(SendsNaN(), observer=recorder, rounds=RoundOptions(rounds=1, quorum=3))
    run.run()
    assert "quorum of 3" in recorder.warnings[-1]
    initial = run.spec.build_model("proxy", "server").state_dict()
    assert all(torch.equal(tensor, initial[name]) for name, tensor in run.method.server_state.items())


def test_run_lost_updates_are_counted_and_warned_of(federate: Federate) -> None:
    recorder = Recorder()
    run = federate(observer=recorder, rounds=RoundOptions(rounds=4, update_loss_rate=0.5))
    run.run()
    lost = [text for text in recorder.warnings if "was lost" in text]
    arrived = sum(row["comm/updates"] for row in run.progress.history)
    assert len(lost) + arrived == 4 * 3
    assert 0 < len(lost) < 12


@pytest.mark.slow
def test_local_baseline_is_trained_once_and_then_read(federate: Federate, tmp_path: Path) -> None:
    first = federate(baseline_dir=tmp_path / "local")
    expected = first.run()
    cached = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "local").iterdir()}
    assert len(cached) == 3
    second = federate(FedeKD(beta=3.0), baseline_dir=tmp_path / "local").run()
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "local").iterdir()} == cached
    assert [c["local"] for c in second["clients"]] == [c["local"] for c in expected["clients"]]
    # More rounds continue from the cache, with results equal to training without it.
    longer = federate(baseline_dir=tmp_path / "local", rounds=RoundOptions(rounds=3)).run()
    at_once = federate(rounds=RoundOptions(rounds=3)).run()
    assert [c["local"] for c in longer["clients"]] == [c["local"] for c in at_once["clients"]]


def test_local_baseline_corrupt_cache_is_trained_again(federate: Federate, tmp_path: Path) -> None:
    expected = federate(baseline_dir=tmp_path / "local").run()
    for path in (tmp_path / "local").iterdir():
        path.write_bytes(path.read_bytes()[:100])
    assert repeatable(federate(baseline_dir=tmp_path / "local").run()) == repeatable(expected)


def test_evaluate_checkpoint_without_output_uses_memory(federate: Federate) -> None:
    run = federate()
    expected = run.run()
    assert [client.number for client in run.load_clients()] == [0, 1, 2]
    assert repeatable(run.evaluate_checkpoint()) == repeatable(expected)


def test_run_finished_with_corrupt_checkpoints_is_reopened(federate: Federate, tmp_path: Path) -> None:
    expected = federate(output=tmp_path).run()
    for path in (tmp_path / "checkpoints").glob("*.bin"):
        path.write_bytes(b"")
    recorder = Recorder()
    with pytest.raises(StoppedError):
        federate(output=tmp_path, observer=StopAtEvent(12)).run()
    assert not (tmp_path / "summary.json").exists()
    assert repeatable(federate(output=tmp_path, observer=recorder).run()) == repeatable(expected)
    assert not recorder.warnings


def test_evaluate_checkpoint_returns_the_summary_of_the_run(federate: Federate, tmp_path: Path) -> None:
    expected = federate(output=tmp_path).run()
    assert repeatable(federate(output=tmp_path).evaluate_checkpoint()) == repeatable(expected)


def test_run_lambda_kd_zero_with_partial_participation_has_zero_delta(federate: Federate) -> None:
    summary = federate(FedeKD(lambda_kd=0), rounds=RoundOptions(rounds=5, participation=0.4)).run()
    assert [client["delta"] for client in summary["clients"]] == [0.0, 0.0, 0.0]


def test_metrics_local_score_is_of_as_many_rounds(federate: Federate) -> None:
    """FedAvg trains after its score, FedeKD before: in both, round t is compared with round t of the baseline."""
    for method in (FedAvg(), FedeKD()):
        run = federate(method, rounds=RoundOptions(rounds=3))
        run.run()
        for row in run.progress.history:
            for client in range(3):
                assert row[f"client_{client}/local"] == run.progress.local[client][int(row["round"]) - 1]


def test_run_without_valid_updates_uses_no_teacher(federate: Federate) -> None:
    class SendsNaNTwice(FedeKD):
        def prepare_update(self, client: Any, round_idx: int) -> ClientUpdate:
            update = super().prepare_update(client, round_idx)
            invalid = {name: torch.full_like(tensor, torch.nan) for name, tensor in update.state.items()}
            return ClientUpdate(update.client, invalid, 1) if round_idx < 2 else update

    run = federate(SendsNaNTwice(), rounds=RoundOptions(rounds=4), observer=Recorder())
    run.run()
    has_teacher = ["gate/weight_mean" in row for row in run.progress.history]
    assert has_teacher == [False, False, True, True]
    assert [row["delta/avg"] for row in run.progress.history[:2]] == [0.0, 0.0]


def test_run_diverged_model_has_score_nan(federate: Federate) -> None:
    recorder = Recorder()
    client = ClientOptions(local_epochs=1, optimizer={"class_path": "torch.optim.SGD", "init_args": {"lr": 1e30}})
    summary = federate(Local(), client=client, observer=recorder).run()
    assert all(client["score"] is None for client in summary["clients"])
    assert summary["worst"] is None
    assert any("client 0 has no score" in text for text in recorder.warnings)


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 3},
        {"method": FedeKD(beta=9.0)},
        {"rounds": RoundOptions(rounds=3)},
        {"baseline": BaselineOptions(tune=True)},
        {"privacy": GaussianMechanism(1.0, 1.0)},  # left out of the identity where it is off
    ],
)
def test_resume_with_other_settings_raises_user_error(federate: Federate, tmp_path: Path, other: Any) -> None:
    federate(output=tmp_path / "run").run()
    with pytest.raises(UserError, match=r"expected the saved value .*, got"):
        federate(**other, output=tmp_path / "run").run()


def test_resume_accepts_numbers_as_keys_of_the_configuration(federate: Federate, tmp_path: Path) -> None:
    config = {"method": {"init_args": {1: 2, "a": (3,)}}}
    summary = federate(output=tmp_path / "run", config=config).run()
    assert federate(output=tmp_path / "run", config=config).run() == summary


def test_run_without_output_writes_no_file(federate: Federate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    federate().run()
    assert not list((tmp_path / "here").iterdir())


def test_orchestrator_batchnorm_with_batches_of_one_raises_user_error(federate: Federate, npz: Path) -> None:
    client = ClientOptions(private_model={"class_path": "torchvision.models.resnet18"})
    with pytest.raises(UserError, match=r"client\.private_model: expected no BatchNorm.*data\.batch_size 1"):
        federate(client=client, data=FederatedDataModule(str(npz), num_clients=3, alpha=5.0, batch_size=1))


def test_resume_with_other_configuration_raises_user_error(federate: Federate, tmp_path: Path) -> None:
    federate(output=tmp_path, config={"method": {"beta": 1.0}}).run()
    with pytest.raises(UserError, match=r"method\.beta.*1\.0.*2\.0"):
        federate(output=tmp_path, config={"method": {"beta": 2.0}}).run()


def test_orchestrator_quorum_above_clients_raises_user_error(federate: Federate) -> None:
    with pytest.raises(UserError, match=r"quorum: expected at most 3 \(clients per round\), got 4"):
        federate(rounds=RoundOptions(quorum=4))


def test_client_options_invalid_optimizer_argument_raises_user_error() -> None:
    with pytest.raises(UserError, match=r"client\.optimizer"):
        ClientOptions(optimizer={"class_path": "torch.optim.Adam", "init_args": {"lr": -1.0}})


def test_orchestrator_model_that_does_not_fit_raises_before_training(federate: Federate, tmp_path: Path) -> None:
    client = ClientOptions(private_model={"class_path": "torchvision.models.alexnet"})  # too deep for 8 x 8 pixels
    with pytest.raises(UserError, match=r"client\.private_model"):
        federate(client=client, baseline_dir=tmp_path / "local")
    assert not (tmp_path / "local").exists()


class FullDiskLogger(CSVLogger):
    """CSVLogger that fails at the end of a run."""

    def finalize(self, status: str) -> None:
        raise OSError("no space left")


def test_run_failing_logger_still_writes_the_summary(federate: Federate, tmp_path: Path) -> None:
    observer = Recorder()
    summary = federate(output=tmp_path / "run", loggers=[FullDiskLogger(tmp_path / "log")], observer=observer).run()
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == summary
    [line] = [text for text in observer.warnings if "FullDiskLogger" in text]
    assert "OSError: no space left" in line


def test_run_writes_the_summary_before_loggers_are_closed(federate: Federate, tmp_path: Path) -> None:
    class StalledLogger(CSVLogger):
        def finalize(self, status: str) -> None:
            assert RunFolder(tmp_path / "run", {}).is_complete(pytest.fail)
            raise KeyboardInterrupt

    rounds = tmp_path / "log/lightning_logs/version_0/metrics.csv"
    with pytest.raises(KeyboardInterrupt):
        federate(output=tmp_path / "run", loggers=[StalledLogger(tmp_path / "log")]).run()
    assert len(rounds.read_text().splitlines()) == 3  # the header and a row per round


def test_run_reports_the_address_of_an_online_logger_once(federate: Federate, tmp_path: Path) -> None:
    class OnlineLogger(CSVLogger):
        url = "https://example.org/run"

    class Listener(SilentObserver):
        def __init__(self) -> None:
            self.urls: list[str] = []

        def logged_at(self, url: str) -> None:
            self.urls.append(url)

    listener = Listener()
    federate(loggers=[OnlineLogger(tmp_path / "log"), CSVLogger(tmp_path / "other")], observer=listener).run()
    assert listener.urls == ["https://example.org/run"]
