"""Control and tuned Local: equal compute, nothing that travelled, cached, resumable."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedekd.data import FederatedDataModule
from fedekd.errors import UserError
from fedekd.federation import BaselineOptions, Orchestrator, RoundOptions, local_baseline, references
from fedekd.federation.local_baseline import LocalBaseline
from fedekd.federation.references import Control, TunedLocal, learning_rate, reference_from_json, reference_to_json
from fedekd.methods import (
    FML,
    Broadcast,
    ClientOptions,
    ClientUpdate,
    Ditto,
    FedAvg,
    FedDyn,
    FedeKD,
    Local,
    Method,
    ProxyEnsemble,
    ScaleFL,
)

from .conftest import Federate, Recorder

WITH_CONTROL = BaselineOptions(control=True)
METHODS: dict[str, Callable[[], Method]] = {
    "proxy-ensemble": ProxyEnsemble,
    "fedekd": FedeKD,
    "fml": FML,
    "ditto": Ditto,
    "fedavg": lambda: FedAvg(finetune_epochs=1),
}


def text(run: Orchestrator) -> str:
    """All references of a run; as text, because NaN differs from itself."""
    return str(run.progress.references)


def one_client(npz: Path) -> FederatedDataModule:
    return FederatedDataModule(str(npz), num_clients=1, alpha=1.0, batch_size=8)


@pytest.mark.parametrize("name", METHODS)
def test_federation_of_one_client_equals_its_control(federate: Federate, npz: Path, name: str) -> None:
    run = federate(METHODS[name](), data=one_client(npz), baseline=WITH_CONTROL)
    summary = run.run()
    assert summary["surplus"] == {"avg": 0.0, "worst": 0.0, "p10": 0.0}
    for row in run.progress.history:
        assert row["client_0/control"] == row["client_0/accuracy"]
    control = run.progress.references["control"][0]
    assert control.metrics[-1] == run.progress.records[0].metrics


class Spy(ProxyEnsemble):
    """Records which clients the server aggregates and broadcasts to, by name of the server's object."""

    aggregated: list[list[int]] = []  # noqa: RUF012 - shared with the copies that the controls use

    def aggregate(self, updates: Any, round_idx: int) -> None:
        self.aggregated.append([update.client for update in updates])
        super().aggregate(updates, round_idx)


def test_control_aggregates_the_own_update_only(federate: Federate) -> None:
    Spy.aggregated.clear()
    run = federate(Spy(), rounds=RoundOptions(rounds=2))
    run.run()
    controls, rounds = Spy.aggregated[:-2], Spy.aggregated[-2:]
    assert controls == [[0], [0], [1], [1], [2], [2]]
    assert rounds == [[0, 1, 2], [0, 1, 2]]


class Poisoned(ProxyEnsemble):
    """The server sends noise in place of the mean, except to a single client: a control must not see it."""

    def broadcast(self, participants: Any, round_idx: int) -> Broadcast:
        sent = super().broadcast(participants, round_idx)
        if len(participants) == 1 or round_idx == 0:
            return sent
        return Broadcast({name: torch.randn_like(tensor) for name, tensor in sent.shared.items()})


def test_control_never_reads_what_travelled(federate: Federate) -> None:
    honest, poisoned = federate(ProxyEnsemble()), federate(Poisoned())
    honest.run()
    poisoned.run()
    assert text(poisoned) == text(honest)
    scores = [[record.metrics for record in run.progress.records.values()] for run in (honest, poisoned)]
    assert scores[0] != scores[1]


def test_control_follows_partial_participation(federate: Federate) -> None:
    run = federate(ProxyEnsemble(), rounds=RoundOptions(rounds=4, participation=0.5))
    run.run()
    planned = [run._participants(round_idx) for round_idx in range(5)]
    for number, control in run.progress.references["control"].items():
        assert list(control.rounds) == [index for index in range(1, 5) if number in planned[index]]
        assert len(control.metrics) == len(control.rounds)
        for round_idx in range(1, 5):
            trained = [index for index, planned_round in enumerate(control.rounds) if planned_round <= round_idx]
            assert control.after(round_idx) == control.metrics[trained[-1] if trained else 0]


@pytest.mark.parametrize("method", [ProxyEnsemble, FML])
def test_control_stopped_after_a_write_continues_from_it(
    federate: Federate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: type[Method]
) -> None:
    monkeypatch.setattr(local_baseline, "WRITE_SECONDS", 0.0)
    folder = tmp_path / "local"
    expected = federate(method(), baseline=WITH_CONTROL)
    expected.run()

    class StopError(Exception):
        pass

    prepare, calls = method.prepare_update, 0

    def interrupted(self: Any, client: Any, round_idx: int) -> ClientUpdate:
        nonlocal calls
        calls += 1
        if calls % 2 == 0:
            raise StopError
        return prepare(self, client, round_idx)

    monkeypatch.setattr(method, "prepare_update", interrupted)
    stops = 0
    for _ in range(100):
        try:
            run = federate(method(), baseline=WITH_CONTROL, baseline_dir=folder)
            run._train_references()
            break
        except StopError:
            stops += 1
    assert stops > 2
    assert text(run) == text(expected)
    monkeypatch.setattr(method, "prepare_update", lambda *_: pytest.fail("trained again"))
    again = federate(method(), baseline=WITH_CONTROL, baseline_dir=folder)
    again._train_references()
    assert text(again) == text(expected)


def test_control_of_another_option_is_another_file(federate: Federate, tmp_path: Path) -> None:
    def files(method: Method, **parts: Any) -> set[str]:
        folder = tmp_path / "local"
        before = set(folder.glob("control-*")) if folder.exists() else set()
        federate(method, baseline=WITH_CONTROL, baseline_dir=folder, **parts)._train_references()
        return {path.name for path in set(folder.glob("control-*")) - before}

    assert len(files(ProxyEnsemble())) == 3
    assert len(files(ProxyEnsemble(proxy_epochs=3))) == 3
    assert len(files(FedeKD())) == 3
    assert len(files(ProxyEnsemble(), rounds=RoundOptions(rounds=3))) == 3
    assert files(ProxyEnsemble()) == set()


def test_references_survive_a_resume(federate: Federate, tmp_path: Path) -> None:
    options = BaselineOptions(control=True, tune=True, learning_rates=(1e-3, 1e-2))
    run = federate(ProxyEnsemble(), baseline=options, output=tmp_path)
    summary = run.run()
    again = federate(ProxyEnsemble(), baseline=options, output=tmp_path)
    again._resume()
    assert text(again) == text(run)
    assert again.evaluate_checkpoint()["surplus"] == summary["surplus"]


def test_tuned_local_has_the_smallest_loss_on_the_tuning_split(federate: Federate) -> None:
    rates, rounds = (1e-4, 1e-2), 3
    run = federate(Local(), baseline=BaselineOptions(tune=True, learning_rates=rates, epochs=rounds))
    summary = run.run()
    for number, client in enumerate(summary["clients"]):
        candidates = []
        for rate in (1e-3, *rates):  # the run's own comes first, with the epochs of the run
            optimizer = {"class_path": "torch.optim.Adam", "init_args": {"lr": rate}}
            options = replace(run.spec.client, optimizer=optimizer)
            other = federate(Local(), client=options, rounds=RoundOptions(rounds=rounds))
            engine: Any = other.engine
            module = engine.client(number)
            for round_idx in range(1, rounds + 1):
                is_tried = rate in rates or round_idx == run.spec.rounds
                other.method.receive(module, {}, round_idx)
                output, targets = module.predict("private", "tuning").output.double(), module.targets("tuning")
                loss = -sum(float(row.log_softmax(0)[label]) for row, label in zip(output, targets, strict=True)) / len(
                    targets
                )
                if is_tried:
                    candidates.append((loss, rate, float(round_idx), module.score()))
        loss, rate, epochs, score = min(candidates, key=lambda candidate: round(candidate[0], 9))
        assert (client["tuned_lr"], client["tuned_epochs"], client["tuned"]) == (rate, epochs, score)
    assert summary["delta_tuned"]["avg"] == pytest.approx(summary["mean"] - summary["tuned_mean"])


def test_tuned_local_without_tuning_samples_is_the_local_baseline(federate: Federate, npz: Path) -> None:
    data = FederatedDataModule(str(npz), num_clients=3, alpha=1.0, batch_size=8, fractions=(0.8, 0.0, 0.2))
    summary = federate(FedAvg(), data=data, baseline=BaselineOptions(tune=True)).run()
    for client in summary["clients"]:
        assert (client["tuned"], client["tuned_lr"], client["tuned_epochs"]) == (client["local"], 1e-3, 2.0)


def test_tuned_local_replaces_a_diverged_candidate(federate: Federate, monkeypatch: pytest.MonkeyPatch) -> None:
    def trained(client: Any, rounds: int, folder: Path | None) -> LocalBaseline:
        rate = learning_rate(client)
        loss = math.nan if rate == pytest.approx(1e-3) else rate
        return LocalBaseline([], metrics=[{"rate": rate}] * rounds, tuning_losses=[loss] * rounds)

    monkeypatch.setattr(references, "train_local_baseline", trained)
    engine: Any = federate(Local()).engine
    chosen = TunedLocal((0.5, 0.25), 1).train(engine.client(0), Local(), None)
    assert chosen.metrics == [{"rate": pytest.approx(0.25)}]


def test_control_of_feddyn_is_that_of_one_client(federate: Federate, npz: Path) -> None:
    """The control of client 0 among three equals a federation of the samples of client 0."""
    run = federate(FedDyn(alpha=0.1), baseline=WITH_CONTROL)
    run._train_references()
    alone = federate(FedDyn(alpha=0.1))
    method: Any = alone.method
    method.init_server(alone.spec)
    method.num_clients = 1
    engine: Any = alone.engine
    client = engine.client(0)
    for round_idx in range(3):
        method.receive(client, method.broadcast([0], round_idx).to(0), round_idx)
        if round_idx < 2:
            method.aggregate([method.prepare_update(client, round_idx)], round_idx)
    assert str(run.progress.references["control"][0].metrics[-1]) == str(client.evaluate()[1])


def test_control_of_local_training_is_refused(federate: Federate) -> None:
    with pytest.raises(UserError, match=r"baseline\.control: expected null or false for Local, got True"):
        federate(Local(), baseline=WITH_CONTROL)


def test_control_key_depends_on_the_models_of_other_clients(federate: Federate, tmp_path: Path) -> None:
    def files(widths: tuple[float, float]) -> set[str]:
        before = set(tmp_path.glob("control-*"))
        models = [{"class_path": "fedekd.models.PrivateCNN", "init_args": {"width": width}} for width in widths]
        client = ClientOptions(local_epochs=1, private_models=models, exits=2)
        run = federate(ScaleFL(), client=client, baseline=WITH_CONTROL, baseline_dir=tmp_path)
        run._train_references()
        return {path.name for path in set(tmp_path.glob("control-*")) - before}

    assert len(files((0.2, 0.2))) == 3
    assert len(files((0.2, 0.1))) == 3


def test_runs_without_references_have_no_columns_of_them(federate: Federate) -> None:
    run = federate(FedeKD())
    summary = run.run()
    assert not {"surplus", "delta_tuned", "serving"} & summary.keys()
    assert not [name for row in run.progress.history for name in row if "surplus" in name or "serving" in name]


def test_references_convert_to_json_and_back() -> None:
    for reference in (Control((0, 2, 5)), TunedLocal((1e-3, 1e-2), 4)):
        assert reference_from_json(reference_to_json(reference)) == reference
    for values in ({"kind": "other"}, {"kind": "control", "rounds": [1], "extra": 1}, {"rounds": [1]}):
        with pytest.raises(UserError, match="reference: expected one of control, tuned"):
            reference_from_json(values)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"learning_rates": []}, r"baseline.learning_rates: expected finite numbers above 0, got \[\]"),
        ({"learning_rates": [1e-3, 0.0]}, r"baseline.learning_rates: .* got \[0.001, 0.0\]"),
        ({"epochs": 0}, "baseline.epochs: expected at least 1, or null, got 0"),
    ],
)
def test_invalid_baseline_options_raise(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        BaselineOptions(**arguments)


def test_tuning_with_fewer_epochs_than_a_round_is_refused(federate: Federate) -> None:
    client = ClientOptions(local_epochs=3)
    with pytest.raises(UserError, match=r"baseline\.epochs: expected at least 3 \(client\.local_epochs\), got 2"):
        federate(Local(), client=client, baseline=BaselineOptions(tune=True, epochs=2))


def test_progress_counts_the_references(federate: Federate) -> None:
    recorder = Recorder()
    baseline = BaselineOptions(control=True, tune=True, learning_rates=(1e-3,), epochs=2)
    federate(FedeKD(), rounds=RoundOptions(rounds=2, participation=0.6), baseline=baseline, observer=recorder).run()
    assert recorder.steps == recorder.planned_steps > 0
