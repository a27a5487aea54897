"""Accuracy against cost of the exits in a finished federation."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch

from fedekd.data import FederatedDataModule, scale
from fedekd.early_exit import BUDGETS
from fedekd.early_exit.client_tradeoff import ExitTradeoff, exit_tradeoff, mean_tradeoff
from fedekd.federation import Orchestrator, RoundOptions, SequentialEngine
from fedekd.federation.results import ClientRecord, Progress
from fedekd.federation.summary import summarize
from fedekd.methods import ClientOptions, FedAvg, FedeKD, Local
from fedekd.models import exit_costs

from .conftest import Federate, federation
from .runs import StopAfter, StoppedError, repeatable


def options(**values: Any) -> ClientOptions:
    model = {"class_path": "fedekd.models.PrivateCNN", "init_args": {"width": 0.25}}
    adam = {"class_path": "torch.optim.Adam", "init_args": {"lr": 1e-3}}
    return ClientOptions(**{"local_epochs": 1, "private_model": model, "optimizer": adam, "exits": 3, **values})


def clients_of(run: Orchestrator) -> list[Any]:
    engine: Any = run.engine
    return [engine.client(number) for number in range(3)]


@pytest.fixture(scope="module")
def finished(write_blobs: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Orchestrator:
    """Create a finished federation with three exits; tests do not modify it."""
    run = federation(write_blobs(tmp_path_factory.mktemp("data") / "blobs.npz"), client=options())
    run.run()
    return run


def literal(client: Any) -> dict[str, Any]:
    """Image by image, threshold by threshold, in fractions of FLOPs."""
    network, places = client.networks["private"].eval(), {}
    costs = exit_costs(network, (1, 8, 8))
    paid = [sum(costs.stages[: e + 1]) + sum(costs.heads[: e + 1]) for e in range(3)]
    for split in ("validation", "test"):
        places[split] = []
        for index in getattr(client.splits, split):
            with torch.no_grad():
                exits = network(scale(client.samples.inputs[index][None]))
            scores = [float(logits.softmax(1).max()) for logits in exits]
            right = [bool(logits.argmax() == client.samples.targets[index]) for logits in exits]
            places[split].append((scores, right))

    def leaves(scores: list[float], threshold: float) -> int:
        return next((e for e in range(2) if scores[e] >= threshold), 2)

    def spent(split: str, threshold: float) -> Fraction:
        exits = [leaves(scores, threshold) for scores, _ in places[split]]
        return Fraction(sum(paid[e] for e in exits), len(exits) * costs.full)

    alone = [sum(costs.stages[: e + 1]) + costs.heads[e] for e in range(3)]
    tested = places["test"]
    exits = [(alone[e] / costs.full, fmean(right[e] for _, right in tested)) for e in range(3)]
    budgets = {}
    for budget in BUDGETS[:-1]:
        tried = [score for scores, _ in places["validation"] for score in scores[:2]]
        if kept := [each for each in tried if spent("validation", each) <= budget]:
            right = [right[leaves(scores, max(kept))] for scores, right in tested]
            budgets[budget] = (float(spent("test", max(kept))), fmean(right))
    return {"exits": exits, "budgets": {**budgets, 1.0: (1.0, exits[-1][1])}}


def test_exit_tradeoff_equals_loop_over_images(finished: Orchestrator) -> None:
    for client in clients_of(finished):
        expected, result = literal(client), exit_tradeoff(client)
        assert result == finished.progress.records[client.number].tradeoff
        assert result is not None
        for point, other in zip(result.exits, expected["exits"], strict=True):
            assert point == pytest.approx(other)
        assert [line[0] for line in result.budgets] == list(expected["budgets"])
        for budget, *point in result.budgets:
            assert point == pytest.approx(expected["budgets"][budget])


def test_summary_has_means_over_clients(finished: Orchestrator) -> None:
    records, summary = finished.progress.records, summarize(finished)
    for place, line in enumerate(summary["exits"]):
        points = [record.tradeoff.exits[place] for record in records.values()]  # type: ignore[union-attr]
        assert line == {"exit": place + 1, "cost": fmean(p[0] for p in points), "accuracy": fmean(p[1] for p in points)}


def test_mean_tradeoff_averages_over_clients_that_have_the_entry() -> None:
    deep = ExitTradeoff([[0.1, 0.5], [0.6, 0.7], [1.0, 0.9]], [[0.25, 0.2, 0.6], [1.0, 1.0, 0.9]])
    shallow = ExitTradeoff([[0.3, 0.7], [1.0, 0.6]], [[0.5, 0.4, 0.5], [1.0, 1.0, 0.6]])
    result = mean_tradeoff([deep, shallow])
    assert result["exits"] == [
        {"exit": 1, "cost": pytest.approx(0.2), "accuracy": pytest.approx(0.6)},
        {"exit": 2, "cost": pytest.approx(0.8), "accuracy": pytest.approx(0.65)},
        {"exit": 3, "cost": 1.0, "accuracy": 0.9},
    ]
    assert result["budgets"] == [
        {"budget": 0.25, "cost": 0.2, "accuracy": 0.6},
        {"budget": 0.5, "cost": 0.4, "accuracy": 0.5},
        {"budget": 1.0, "cost": 1.0, "accuracy": pytest.approx(0.75)},
    ]
    assert mean_tradeoff([shallow, deep]) == result


@pytest.mark.parametrize("method", [Local, FedAvg, FedeKD])
def test_summary_of_every_method_with_exits_has_exits_and_budgets(method: Any, federate: Federate) -> None:
    summary = federate(method(), client=options()).run()
    assert [line["exit"] for line in summary["exits"]] == [1, 2, 3]
    assert summary["exits"][-1] == {"exit": 3, "cost": 1.0, "accuracy": pytest.approx(summary["mean"])}
    assert summary["budgets"][-1] == {"budget": 1.0, "cost": 1.0, "accuracy": pytest.approx(summary["mean"])}
    assert json.loads(json.dumps(summary)) == summary


@pytest.mark.slow
def test_summary_without_exits_or_classes_has_no_tradeoff(federate: Federate, blob_grades: FederatedDataModule) -> None:
    for parts in ({"client": options(exits=None)}, {"client": options(exits=1)}, {"data": blob_grades}):
        summary = federate(FedAvg(), **{"client": options(), **parts}).run()
        assert "exits" not in summary
        assert "budgets" not in summary


def test_summary_without_validation_images_has_no_budgets(federate: Federate, npz: Any) -> None:
    data = FederatedDataModule(str(npz), num_clients=3, alpha=1.0, batch_size=8, fractions=(0.8, 0.0, 0.2))
    summary = federate(FedAvg(), client=options(), data=data).run()
    assert len(summary["exits"]) == 3
    assert summary["budgets"] == []


def test_exit_tradeoff_diverged_network_has_nan_accuracies(federate: Federate) -> None:
    """Outputs are NaN, for which argmax returns class 0."""
    client = clients_of(federate(client=options()))[0]
    with torch.no_grad():
        for parameter in client.networks["private"].parameters():
            parameter.fill_(math.nan)
    result = exit_tradeoff(client)
    assert result is not None
    assert all(math.isnan(accuracy) for _, accuracy in result.exits)
    assert all(math.isnan(accuracy) for *_, accuracy in result.budgets)


def test_progress_json_round_trip(finished: Orchestrator) -> None:
    kept = json.loads(json.dumps(finished.progress.to_json()))
    assert repr(Progress.from_json(kept)) == repr(finished.progress)  # NaN
    plain = ClientRecord(0.5, 2, {"a": 1.0})
    assert ClientRecord.from_json({"score": 0.5, "supervised_rounds": 2, "logs": {"a": 1.0}}) == plain
    assert ClientRecord.from_json({**vars(plain), "tradeoff": None}) == plain


class NoVisits(SequentialEngine):
    def run_clients(self, request: Any) -> Any:
        raise AssertionError("clients were run again")


def test_resume_after_last_visit_gives_same_summary(federate: Federate, tmp_path: Any) -> None:
    rounds = RoundOptions(rounds=2, participation=0.4)
    expected = federate(FedAvg(), client=options(), rounds=rounds).run()
    assert len(expected["budgets"]) > 1
    with pytest.raises(StoppedError):
        federate(FedAvg(), client=options(), rounds=rounds, output=tmp_path, observer=StopAfter(rounds=2)).run()
    assert not (tmp_path / "summary.json").exists()
    resumed = federate(FedAvg(), client=options(), rounds=rounds, output=tmp_path, engine=NoVisits).run()
    assert repeatable(resumed) == repeatable(expected)
    kept = json.loads((tmp_path / "summary.json").read_text())
    assert (kept["exits"], kept["budgets"]) == (expected["exits"], expected["budgets"])
    again = federate(FedAvg(), client=options(), rounds=rounds, output=tmp_path).evaluate_checkpoint()
    assert repeatable(again) == repeatable(expected)
