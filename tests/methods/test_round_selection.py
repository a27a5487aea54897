"""Selection of the round that a client deploys: `--select_round best`."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

from fedekd.data import FederatedDataModule
from fedekd.do_no_harm.rule import DoNoHarm
from fedekd.errors import UserError
from fedekd.federation import BaselineOptions, Orchestrator, RoundOptions
from fedekd.federation.checkpoint import pack
from fedekd.methods import Client, ClientOptions, FedAvg, FedeKD, FederationSpec, Local, Method, ProxyEnsemble
from fedekd.methods.round_selection import select_round, used_splits
from fedekd.reporting.rows import client_prefix
from fedekd.tasks import Task

from .conftest import Federate, make_spec

ADAM = {"class_path": "torch.optim.Adam", "init_args": {"lr": 0.03}}
MODEL = {"class_path": "fedekd.models.ProxyCNN"}
ROUNDS = 5


#: By client and round, what `Recorder` saw.
RECORDS: dict[tuple[int, int], dict[str, Any]] = {}


class Recorder:
    """Method that records what each client serves, after it damaged it in the last round and in another one."""

    def receive(self, client: Client, received: dict[str, Tensor], round_idx: int) -> dict[str, float]:
        logs: dict[str, float] = super().receive(client, received, round_idx)  # type: ignore[misc]
        if round_idx in (ROUNDS, ROUNDS - client.number):
            for role in client.served_state()["networks"]:
                for parameter in client.networks[role].parameters():
                    parameter.detach().zero_()
        RECORDS[client.number, round_idx] = {
            "tuning": client.evaluate("tuning")[0][-1],
            "test": client.evaluate()[0][-1],
            "served": copy.deepcopy(client.served_state()),
            "logs": {name: value for name, value in logs.items() if name.startswith("serving/")},
        }
        return logs


class RecordedFedAvg(Recorder, FedAvg):
    """`FedAvg`, recorded."""


class RecordedFedeKD(Recorder, FedeKD):
    """`FedeKD`, recorded."""


class RecordedProxyEnsemble(Recorder, ProxyEnsemble):
    """`ProxyEnsemble`, recorded."""


def run_of(federate: Federate, method: Method, select_round: str, **parts: Any) -> Orchestrator:
    client = ClientOptions(local_epochs=1, private_model=MODEL, optimizer=ADAM)
    rounds = RoundOptions(rounds=ROUNDS, select_round=select_round)
    return federate(method, **{"client": client, "rounds": rounds, **parts})


@pytest.mark.parametrize(
    ("method", "task"),
    [
        (RecordedFedAvg, None),
        (RecordedFedAvg, "regression"),
        (RecordedFedeKD, None),
        (RecordedProxyEnsemble, None),
    ],
)
def test_clients_deploy_the_round_with_the_best_tuning_score(
    method: type[Method], task: Task | None, federate: Federate
) -> None:
    last = run_of(federate, method(), "last", task=task)
    last.run()
    records = dict(RECORDS)
    best = run_of(federate, method(), "best", task=task)
    summary = best.run()
    sign = 1 if last.spec.primary.higher_is_better else -1
    chosen = [
        max(range(1, ROUNDS + 1), key=lambda idx, client=number: (sign * records[client, idx]["tuning"], idx))  # type: ignore[misc]
        for number in range(3)
    ]
    assert min(chosen) < ROUNDS
    for number, round_idx in enumerate(chosen):
        record, engine = records[number, round_idx], best.engine
        client = engine.client(number)  # type: ignore[attr-defined]
        assert pack(client.served_state()) == pack(record["served"])
        assert client.selected is None
        values = summary["clients"][number]
        assert (values["selected_round"], values["tuning_score"]) == (round_idx, record["tuning"])
        assert values["score"] == record["test"]
        row, prefix = best.progress.history[-1], client_prefix(number, None)
        assert row[f"{prefix}selected/round"] == round_idx
        assert {name: row[f"{prefix}{name}"] for name in record["logs"]} == record["logs"]
    # Until the last round, training and scores are those without the selection.
    for ours, theirs in zip(best.progress.history[:-1], last.progress.history[:-1], strict=True):
        assert {name: value for name, value in ours.items() if "/selected/" not in name} == theirs
    assert not any("selected" in name for row in last.progress.history for name in row)
    assert "selected_round" not in last.run()["clients"][0]


def test_finished_run_is_scored_with_the_deployed_round(federate: Federate, tmp_path: Path) -> None:
    control = BaselineOptions(control=True)
    parts = {"output": tmp_path / "run", "do_no_harm": DoNoHarm(confidence=0.5, looks=2), "baseline": control}
    summary = run_of(federate, RecordedFedAvg(), "best", **parts).run()
    again = run_of(federate, RecordedFedAvg(), "best", **parts).evaluate_checkpoint()
    for name in ("clients", "deployed", "control_mean"):
        assert again[name] == summary[name]
    with pytest.raises(UserError, match=r"rounds\.select_round: expected the saved value 'best', got 'last'"):
        run_of(federate, RecordedFedAvg(), "last", **parts).run()


def test_control_selects_its_round_too(federate: Federate, tmp_path: Path) -> None:
    scores = [
        run_of(federate, RecordedFedAvg(), select, baseline=BaselineOptions(control=True), baseline_dir=tmp_path).run()
        for select in ("last", "best")
    ]
    assert scores[0]["control_mean"] != scores[1]["control_mean"]
    assert scores[0]["local_mean"] == scores[1]["local_mean"]


class Scripted(Client):
    """Client with given tuning scores, whose weight is the number of the round."""

    scores: list[float]

    def evaluate(self, split: str = "test", role: str | None = None) -> tuple[list[float], dict[str, float]]:
        assert split == "tuning"
        return [math.inf, self.scores.pop(0)], {}


@pytest.mark.parametrize(
    ("task", "scores", "chosen"),
    [
        ("classification", [0.5, 0.7, 0.6], 2),
        ("classification", [0.7, 0.7, 0.6], 2),
        ("classification", [0.5, 0.5, 0.5], 3),
        ("classification", [math.nan, 0.2, math.nan], 2),
        ("classification", [math.nan, math.nan, math.nan], 3),
        ("regression", [0.5, 0.3, 0.4], 2),
        ("regression", [math.nan, 9.0, math.inf], 2),
    ],
)
def test_select_round_of_scores_deploys_the_latest_best(
    task: Task, scores: list[float], chosen: int, blobs: FederatedDataModule
) -> None:
    client = Scripted(0, blobs.clients[0], blobs.samples, make_spec(task=task))
    client.networks["private"], client.scores = nn.Linear(1, 1), list(scores)
    for round_idx in (1, 2, 3):
        nn.init.constant_(client.networks["private"].weight, round_idx)  # type: ignore[arg-type]
        client.load_state_dict(copy.deepcopy(client.state_dict()))  # as after a stop
        logs = select_round(client, round_idx, {"loss": 1.0, "serving/flops": round_idx}, deploy=round_idx == 3)
    assert client.networks["private"].weight.tolist() == [[chosen]]  # type: ignore[operator,union-attr]
    assert logs["selected/round"] == chosen
    assert logs["serving/flops"] == chosen
    assert "loss" not in logs
    assert "selected" not in client.state_dict()


def test_selection_uses_the_tuning_split(federate: Federate) -> None:
    spec: FederationSpec = make_spec(select_round="best")
    assert used_splits(Local(), spec) == ("train", "tuning")
    assert used_splits(ProxyEnsemble(), spec) == ("train", "tuning")
    assert used_splits(Local(), make_spec()) == ("train",)
    assert spec.hash_dict() == make_spec().hash_dict()
    with pytest.raises(UserError, match=r"do_no_harm\.rule: expected certified with --select_round best"):
        run_of(federate, FedAvg(), "best", do_no_harm=DoNoHarm(rule="better"))


def test_selection_without_tuning_samples_raises(federate: Federate, npz: Path) -> None:
    data = FederatedDataModule(str(npz), num_clients=3, alpha=5.0, fractions=(0.8, 0.0, 0.2))
    with pytest.raises(
        UserError, match=r"select_round: expected tuning samples of every client for best, got none of client 0"
    ):
        run_of(federate, FedAvg(), "best", data=data)
    with pytest.raises(UserError, match="select_round: expected one of last, best, got 'first'"):
        RoundOptions(select_round="first")
