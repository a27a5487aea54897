"""What a federation promises about its numbers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from fedekd.data import FederatedDataModule
from fedekd.errors import UserError
from fedekd.federation import ClientResult, Orchestrator, RoundOptions, RoundRequest, SequentialEngine, SilentObserver
from fedekd.methods import Broadcast, ClientOptions, ClientUpdate, FedAvg, FedeKD, Local, Method
from fedekd.methods.base import state_dict_bytes

from .conftest import Federate, federation, weights


def repeatable(summary: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in summary.items() if key not in ("seconds", "versions")}


def assert_same_weights(one: Orchestrator, two: Orchestrator, role: str = "private") -> None:
    ours, theirs = weights(one, role), weights(two, role)
    assert ours.keys() == theirs.keys()
    assert ours
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_lambda_zero_is_local_bit_for_bit(federate: Federate, npz: Path, task: Any) -> None:
    parts = {"data": FederatedDataModule(str(npz), num_clients=3, alpha=5.0, batch_size=8, task=task)}
    alone, federated = federate(Local(), **parts), federate(FedeKD(lambda_kd=0), **parts)
    ours, theirs = federated.run(), alone.run()
    assert_same_weights(alone, federated)
    assert ours["delta"]["avg"] == ours["delta"]["worst"] == 0.0
    assert [client["score"] for client in ours["clients"]] == [client["score"] for client in theirs["clients"]]
    assert [client["local"] for client in ours["clients"]] == [client["score"] for client in theirs["clients"]]


def test_the_gate_changes_the_weights(federate: Federate) -> None:
    one, two, three = federate(FedeKD(lambda_kd=0)), federate(FedeKD()), federate(FedeKD(gate="none"))
    for each in (one, two, three):
        each.run()
    name = "0/head.weight"
    assert not torch.equal(weights(one)[name], weights(two)[name])
    assert not torch.equal(weights(two)[name], weights(three)[name])


def test_same_seed_same_bytes_and_another_seed_not(federate: Federate, tmp_path: Path) -> None:
    contents = []
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        summary = federate(output=tmp_path / folder, seed=seed).run()
        files = {path.name: path.read_bytes() for path in (tmp_path / folder / "checkpoints").glob("*.pt")}
        files["metrics.csv"] = (tmp_path / folder / "metrics.csv").read_bytes()
        files["summary"] = json.dumps(repeatable(summary)).encode()
        contents.append(files)
    assert contents[0] == contents[1]
    assert contents[0] != contents[2]


class BackwardsEngine(SequentialEngine):
    """Lets the clients run in reverse."""

    def run_clients(self, request: RoundRequest) -> Iterator[ClientResult]:
        yield from super().run_clients(request.only(list(reversed(request.participants))))

    def local_baselines(self, rounds: Any) -> Any:
        return super().local_baselines(dict(reversed(rounds.items())))


def test_order_of_clients_changes_no_number(federate: Federate) -> None:
    forwards, backwards = federate(), federate(engine=BackwardsEngine)
    assert repeatable(forwards.run()) == repeatable(backwards.run())
    assert_same_weights(forwards, backwards)
    assert_same_weights(forwards, backwards, "proxy")
    assert [*forwards.progress.history] == [*backwards.progress.history]


class StoppedError(Exception):
    """Ends a run at a chosen moment."""


class StopAfter(SilentObserver):
    """Raises at the n-th event."""

    def __init__(self, events: int) -> None:
        self.left = events

    def _count(self) -> None:
        self.left -= 1
        if self.left == 0:
            raise StoppedError

    def phase_started(self, client: int, phase: str) -> None:
        self._count()

    def round_finished(self, row: Any) -> None:
        self._count()


@pytest.fixture(scope="module")
def uninterrupted(
    write_blobs: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Orchestrator, dict[str, Any]]:
    """A federation that nobody has stopped, and its summary."""
    whole = federation(write_blobs(tmp_path_factory.mktemp("data") / "blobs.npz"))
    return whole, whole.run()


@pytest.mark.parametrize("events", [1, 2, 4, 7, 10, 11, 13, 16, 18, 20])
def test_a_stop_anywhere_and_resume_gives_the_uninterrupted_numbers(
    federate: Federate, uninterrupted: tuple[Orchestrator, dict[str, Any]], tmp_path: Path, events: int
) -> None:
    whole, expected = uninterrupted
    with pytest.raises(StoppedError):
        federate(output=tmp_path / "run", baseline_dir=tmp_path / "local", observer=StopAfter(events)).run()
    again = federate(output=tmp_path / "run", baseline_dir=tmp_path / "local")
    assert repeatable(again.run()) == repeatable(expected)
    assert again.progress.history == whole.progress.history
    assert_same_weights(whole, again)


def test_partial_participation_resumes_and_keeps_absent_clients_as_they_were(
    federate: Federate, tmp_path: Path
) -> None:
    rounds = RoundOptions(rounds=4, participation=0.4)  # one client of three
    whole = federate(rounds=rounds)
    expected = whole.run()
    with pytest.raises(StoppedError):
        federate(rounds=rounds, output=tmp_path, observer=StopAfter(9)).run()
    again = federate(rounds=rounds, output=tmp_path)
    assert repeatable(again.run()) == repeatable(expected)
    assert_same_weights(whole, again)
    assert whole.progress.history[0]["comm/updates"] == 1
    # Delta is against Local after as many supervised rounds as the client itself has had.
    engine: Any = whole.engine
    for client in expected["clients"]:
        trained = engine.clients[client["client"]].supervised_epochs
        assert client["local"] == whole.progress.local[client["client"]][trained - 1]


class FirstTeachesNone(Method):
    """Counts, in its own state, what each verb was called with."""

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
        self.calls.append(("upload", client.number, round_idx))
        state = {"total": torch.tensor([float(client.number)])}
        if client.number == 1:
            state["extra"] = torch.ones(2)
        return ClientUpdate(client.number, state, len(client.splits.train))

    def aggregate(self, updates: Sequence[ClientUpdate], round_idx: int) -> None:
        assert [update.client for update in updates] == sorted(update.client for update in updates)
        self.server_state = {"total": self.server_state["total"] + sum(u.state["total"] for u in updates)}


def test_verbs_come_in_the_order_of_algorithm_1(federate: Federate) -> None:
    method = FirstTeachesNone()
    federate(method).run()
    expected = []
    for round_idx in range(3):
        for client in range(3):
            expected.append(("receive", client, round_idx))
            if round_idx < 2:
                expected.append(("upload", client, round_idx))
    assert method.calls == expected
    assert method.server_state["total"].item() == 2 * (0 + 1 + 2)


def test_bytes_are_those_of_the_tensors_that_travel(federate: Federate) -> None:
    run = federate()
    summary = run.run()
    proxy = state_dict_bytes(run.method.server_state)
    assert summary["bytes_up"] == 2 * 3 * proxy
    assert summary["bytes_down"] == 3 * 3 * proxy  # the initial proxy too
    assert sum(row["comm/bytes_up"] for row in run.progress.history) == summary["bytes_up"]
    assert sum(row["comm/bytes_down"] for row in run.progress.history) == summary["bytes_down"]


class Poisoner(FedeKD):
    """Client 1 sends NaN in the first round."""

    def prepare_update(self, client: Any, round_idx: int) -> ClientUpdate:
        update = super().prepare_update(client, round_idx)
        if client.number == 1 and round_idx == 0:
            state = {name: torch.full_like(tensor, torch.nan) for name, tensor in update.state.items()}
            return ClientUpdate(1, state, 1)
        return update


class Listener(SilentObserver):
    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def test_a_poisoned_update_is_refused_by_name(federate: Federate) -> None:
    listener = Listener()
    run = federate(Poisoner(), observer=listener)
    run.run()
    assert len(listener.warnings) == 1
    assert "round 1: refused the update of client 1" in listener.warnings[0]
    assert "not finite" in listener.warnings[0]
    assert [row["comm/updates"] for row in run.progress.history] == [2, 3]
    assert all(torch.isfinite(tensor).all() for tensor in run.method.server_state.values())


def test_too_few_updates_leave_the_server_as_it_was(federate: Federate) -> None:
    listener = Listener()
    run = federate(Poisoner(), observer=listener, rounds=RoundOptions(rounds=1, quorum=3))
    run.run()
    assert "quorum of 3" in listener.warnings[-1]
    initial = run.spec.build_model("proxy", "server").state_dict()
    assert all(torch.equal(tensor, initial[name]) for name, tensor in run.method.server_state.items())


def test_lost_updates_are_counted_and_told(federate: Federate) -> None:
    listener = Listener()
    run = federate(observer=listener, rounds=RoundOptions(rounds=4, dropout=0.5))
    run.run()
    lost = [text for text in listener.warnings if "was lost" in text]
    arrived = sum(row["comm/updates"] for row in run.progress.history)
    assert len(lost) + arrived == 4 * 3
    assert 0 < len(lost) < 12


def test_local_is_trained_once_and_then_read(federate: Federate, tmp_path: Path) -> None:
    first = federate(baseline_dir=tmp_path / "local")
    expected = first.run()
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "local").iterdir()}
    assert len(kept) == 3
    second = federate(FedeKD(beta=3.0), baseline_dir=tmp_path / "local").run()
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "local").iterdir()} == kept
    assert [c["local"] for c in second["clients"]] == [c["local"] for c in expected["clients"]]
    # More rounds go on from what is there, and give what training at once gives.
    longer = federate(baseline_dir=tmp_path / "local", rounds=RoundOptions(rounds=3)).run()
    at_once = federate(rounds=RoundOptions(rounds=3)).run()
    assert [c["local"] for c in longer["clients"]] == [c["local"] for c in at_once["clients"]]


def test_damaged_reference_is_trained_anew(federate: Federate, tmp_path: Path) -> None:
    expected = federate(baseline_dir=tmp_path / "local").run()
    for path in (tmp_path / "local").iterdir():
        path.write_bytes(path.read_bytes()[:100])
    assert repeatable(federate(baseline_dir=tmp_path / "local").run()) == repeatable(expected)


@pytest.mark.parametrize("other", [{"seed": 1}, {"client": ClientOptions(local_epochs=2)}])
def test_a_reference_belongs_to_its_seed_and_model(federate: Federate, tmp_path: Path, other: dict[str, Any]) -> None:
    federate(baseline_dir=tmp_path / "local").run()
    federate(baseline_dir=tmp_path / "local", **other).run()
    assert len(list((tmp_path / "local").iterdir())) == 6


def test_a_run_without_a_folder_is_scored_again_from_memory(federate: Federate) -> None:
    run = federate()
    expected = run.run()
    assert [client.number for client in run.load_clients()] == [0, 1, 2]
    assert repeatable(run.evaluate_checkpoint()) == repeatable(expected)


def test_a_finished_run_that_is_made_again_is_not_finished_meanwhile(federate: Federate, tmp_path: Path) -> None:
    expected = federate(output=tmp_path).run()
    for path in (tmp_path / "checkpoints").glob("*.pt"):
        path.write_bytes(b"")
    listener = Listener()
    with pytest.raises(StoppedError):
        federate(output=tmp_path, observer=StopAfter(12)).run()
    assert not (tmp_path / "summary.json").exists()
    assert repeatable(federate(output=tmp_path, observer=listener).run()) == repeatable(expected)
    assert not listener.warnings


def test_rescoring_gives_the_summary_again(federate: Federate, tmp_path: Path) -> None:
    expected = federate(output=tmp_path).run()
    assert repeatable(federate(output=tmp_path).evaluate_checkpoint()) == repeatable(expected)


def test_without_teaching_partial_participation_is_local_too(federate: Federate) -> None:
    summary = federate(FedeKD(lambda_kd=0), rounds=RoundOptions(rounds=5, participation=0.4)).run()
    assert [client["delta"] for client in summary["clients"]] == [0.0, 0.0, 0.0]


def test_delta_of_every_round_is_against_local_after_as_many_rounds(federate: Federate) -> None:
    """FedAvg trains after it was scored, FedeKD before: in both, round t is held against Local's round t."""
    for method in (FedAvg(), FedeKD()):
        run = federate(method, rounds=RoundOptions(rounds=3))
        run.run()
        for row in run.progress.history:
            for client in range(3):
                assert row[f"client_{client}/local"] == run.progress.local[client][int(row["round"]) - 1]


def test_before_a_round_has_met_its_quorum_nobody_is_taught(federate: Federate) -> None:
    class Unlucky(FedeKD):
        def prepare_update(self, client: Any, round_idx: int) -> ClientUpdate:
            update = super().prepare_update(client, round_idx)
            spoilt = {name: torch.full_like(tensor, torch.nan) for name, tensor in update.state.items()}
            return ClientUpdate(update.client, spoilt, 1) if round_idx < 2 else update

    run = federate(Unlucky(), rounds=RoundOptions(rounds=4), observer=Listener())
    run.run()
    teacher_outputs = ["gate/weight_mean" in row for row in run.progress.history]
    assert teacher_outputs == [False, False, True, True]
    assert [row["delta/avg"] for row in run.progress.history[:2]] == [0.0, 0.0]


def test_a_model_that_diverges_has_no_score(federate: Federate) -> None:
    listener = Listener()
    client = ClientOptions(local_epochs=1, optimizer={"class_path": "torch.optim.SGD", "init_args": {"lr": 1e30}})
    summary = federate(Local(), client=client, observer=listener).run()
    assert all(client["score"] != client["score"] for client in summary["clients"])
    assert summary["worst"] != summary["worst"]
    assert any("client 0 has no score" in text for text in listener.warnings)


@pytest.mark.parametrize("other", [{"seed": 3}, {"method": FedeKD(beta=9.0)}, {"rounds": RoundOptions(rounds=3)}])
def test_a_folder_is_not_taken_up_by_another_experiment(federate: Federate, tmp_path: Path, other: Any) -> None:
    federate(output=tmp_path / "run").run()
    with pytest.raises(UserError, match="was run with other"):
        federate(**other, output=tmp_path / "run").run()


def test_a_run_without_a_folder_leaves_none_behind(
    federate: Federate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    federate().run()
    assert not list((tmp_path / "here").iterdir())


def test_batchnorm_and_single_samples_are_refused_beforehand(federate: Federate, npz: Path) -> None:
    client = ClientOptions(private_model={"class_path": "torchvision.models.resnet18"})
    with pytest.raises(UserError, match=r"client\.private_model has BatchNorm.*data\.batch_size is 1"):
        federate(client=client, data=FederatedDataModule(str(npz), num_clients=3, alpha=5.0, batch_size=1))


def test_resume_with_another_configuration_or_other_data_is_refused(federate: Federate, tmp_path: Path) -> None:
    federate(output=tmp_path, config={"method": {"beta": 1.0}}).run()
    with pytest.raises(UserError, match=r"method\.beta.*1\.0.*2\.0"):
        federate(output=tmp_path, config={"method": {"beta": 2.0}}).run()


def test_quorum_above_the_number_of_clients_is_a_mistake(federate: Federate) -> None:
    with pytest.raises(UserError, match="quorum is 4"):
        federate(rounds=RoundOptions(quorum=4))


def test_optimizer_that_takes_other_arguments_is_a_mistake(federate: Federate) -> None:
    client = ClientOptions(optimizer={"class_path": "torch.optim.Adam", "init_args": {"lr": -1.0}})
    with pytest.raises(UserError, match=r"client\.optimizer"):
        federate(client=client).run()


def test_a_model_of_other_outputs_is_refused_before_anything_is_trained(federate: Federate, tmp_path: Path) -> None:
    client = ClientOptions(private_model={"class_path": "torchvision.models.alexnet"})  # too deep for 8 x 8 pixels
    with pytest.raises(UserError, match=r"client\.private_model"):
        federate(client=client, baseline_dir=tmp_path / "local")
    assert not (tmp_path / "local").exists()
