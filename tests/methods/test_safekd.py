"""SafeKD in the orchestrator, and networks with exits under other methods."""

from __future__ import annotations

import inspect
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from fedekd.errors import UserError
from fedekd.federation import RoundOptions, Sequential, SilentObserver
from fedekd.federation.checkpoint import CheckpointStore
from fedekd.methods import FML, ClientOptions, Ditto, FedAvg, FedeKD, FedKD, FedPer, FedType, Local, SafeKD
from fedekd.models import MultiExitNetwork
from fedekd.modules import MultiExitModule
from tests.federation.runs import BackwardsEngine, StopAfter, StoppedError, assert_equal_weights, repeatable, weights

from .conftest import Federate, differ, make_spec

SMALL = {"class_path": "fedekd.models.ProxyCNN"}


def client(**values: Any) -> ClientOptions:
    optimizer = {"class_path": "torch.optim.Adam", "init_args": {"lr": 1e-3}}
    return ClientOptions(**{"local_epochs": 1, "private_model": SMALL, "optimizer": optimizer, "exits": 2, **values})


class Warnings(SilentObserver):
    def __init__(self) -> None:
        self.messages: list[str] = []

    def warn(self, message: str) -> None:
        self.messages.append(message)


def test_safekd_without_distillation_equals_local(federate: Federate) -> None:
    ours, local = federate(SafeKD(0.0, 0.0), client=client()), federate(Local(), client=client())
    summary = ours.run()
    local.run()
    assert_equal_weights(weights(ours), weights(local))
    assert summary["delta"] == {"avg": 0.0, "worst": 0.0, "p10": 0.0}
    assert all(row["delta"] == 0.0 for row in summary["clients"])
    assert not any("teacher" in client.networks for client in ours.engine.clients.values())  # type: ignore[attr-defined]


@pytest.mark.slow
@pytest.mark.parametrize("method", [lambda: SafeKD(1.0, 0.0), lambda: SafeKD(0.0, 1.0)])
def test_safekd_each_term_changes_weights(method: Any, federate: Federate) -> None:
    ours, local = federate(method(), client=client()), federate(Local(), client=client())
    ours.run()
    local.run()
    assert differ(weights(ours), weights(local))


def test_safekd_moving_average_continues_over_rounds(federate: Federate) -> None:
    run = federate(SafeKD(ema_decay=0.5, warmup_epochs=0), client=client(), rounds=RoundOptions(rounds=3))
    run.run()
    engine: Any = run.engine
    for trained_client in engine.clients.values():
        steps = 3 * -(-len(trained_client.splits.train) // 8)
        assert int(trained_client.networks["teacher"].n_averaged) == steps
        assert trained_client.supervised_epochs == 3
    teachers, students = weights(run, "teacher"), weights(run)
    assert differ({name: teachers[name.replace("/", "/module.")] for name in students}, students)


def test_safekd_passes_options_and_epochs_to_module(federate: Federate, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []

    def recorded(*args: Any, **kwargs: Any) -> MultiExitModule:
        calls.append(inspect.signature(MultiExitModule).bind(*args, **kwargs).arguments)
        return MultiExitModule(*args, **kwargs)

    monkeypatch.setattr("fedekd.methods.safekd.MultiExitModule", recorded)
    options = {
        "distillation_weight": 0.5,
        "consistency_weight": 0.25,
        "temperature": 3.0,
        "dkd_alpha": 2.0,
        "dkd_beta": 5.0,
        "warmup_epochs": 7,
        "exit_weights": [0.4, 0.6],
        "ema_decay": 0.9,
    }
    federate(SafeKD(**options), client=client(local_epochs=2)).run()
    assert [{name: call[name] for name in options} for call in calls] == [options] * 6
    assert [call["first_epoch"] for call in calls] == [0, 0, 0, 2, 2, 2]


@pytest.mark.slow
def test_safekd_resumed_run_with_other_client_order_is_identical(federate: Federate, tmp_path: Path) -> None:
    rounds = RoundOptions(rounds=3, participation=0.5)
    whole = federate(SafeKD(), client=client(), rounds=rounds, output=tmp_path / "whole")
    summary = whole.run()
    stopped = federate(SafeKD(), client=client(), rounds=rounds, output=tmp_path / "cut", observer=StopAfter(phases=12))
    with pytest.raises(StoppedError):
        stopped.run()
    again = federate(SafeKD(), client=client(), rounds=rounds, output=tmp_path / "cut", engine=BackwardsEngine)
    assert repeatable(again.run()) == repeatable(summary)
    assert_equal_weights(weights(whole), weights(again))
    assert_equal_weights(weights(whole, "teacher"), weights(again, "teacher"))
    digests = [CheckpointStore(tmp_path / name / "checkpoints").digests() for name in ("whole", "cut")]
    assert digests[0] == digests[1]


def test_load_clients_restores_finished_run(federate: Federate, tmp_path: Path) -> None:
    run = federate(SafeKD(), client=client(), output=tmp_path)
    run.run()
    again = federate(SafeKD(), client=client(), output=tmp_path)
    clients = again.load_clients()
    assert [loaded.number for loaded in clients] == [0, 1, 2]
    assert_equal_weights(weights(run), weights(again))
    assert_equal_weights(weights(run, "teacher"), weights(again, "teacher"))
    assert [loaded.supervised_epochs for loaded in clients] == [2, 2, 2]


def test_load_clients_unfinished_run_raises_user_error(federate: Federate, tmp_path: Path) -> None:
    stopped = federate(SafeKD(), client=client(), output=tmp_path, observer=StopAfter(phases=12))
    with pytest.raises(StoppedError):
        stopped.run()
    with pytest.raises(UserError, match="no checkpoint of the last round"):
        federate(SafeKD(), client=client(), output=tmp_path).load_clients()
    with pytest.raises(UserError, match="engine: expected Sequential to load clients"):
        federate(SafeKD(), client=client(), engine=lambda *parts: object()).load_clients()
    assert federate(SafeKD(), client=client(), engine=Sequential()).num_clients == 3


def test_safekd_regression_raises_one_line_user_error(federate: Federate) -> None:
    with pytest.raises(UserError, match="task: expected classification for method SafeKD") as error:
        federate(SafeKD(), "regression", client=client()).run()
    assert "\n" not in str(error.value)


def test_safekd_without_exits_option_adds_exits_and_warns_once(federate: Federate) -> None:
    model = {"class_path": "fedekd.models.PrivateCNN"}
    warnings = Warnings()
    run = federate(SafeKD(), client=client(private_model=model, exits=None), observer=warnings)
    run.run()
    [warning] = [line for line in warnings.messages if "exits" in line]
    assert "SafeKD needs exits" in warning
    assert "--client.exits" in warning
    assert "\n" not in warning
    engine: Any = run.engine
    assert [trained_client.networks["private"].num_exits for trained_client in engine.clients.values()] == [3] * 3
    no_warnings = Warnings()
    same = federate(SafeKD(), client=client(private_model=model, exits=3), observer=no_warnings)
    same.run()
    assert not [line for line in no_warnings.messages if "exits" in line]
    assert_equal_weights(weights(run), weights(same))


@pytest.mark.parametrize("exits", [3, None])
def test_client_exits_above_stages_raise_one_line_user_error(exits: int | None, federate: Federate) -> None:
    with pytest.raises(UserError, match=r"^client\.exits 3: exits: expected 1 to 2 for ProxyCNN, got 3") as error:
        federate(SafeKD(), client=client(exits=exits))
    assert "\n" not in str(error.value)


def test_spec_exits_belong_to_private_model_with_seeded_heads() -> None:
    plain, cut = make_spec(client=client(exits=None)), make_spec(client=client(exit_grid=2))
    assert not isinstance(cut.build_model("proxy", 0), MultiExitNetwork)
    one, again, other = cut.build_model("private", 0), cut.build_model("private", 0), cut.build_model("private", 1)
    assert isinstance(one, MultiExitNetwork)
    assert one.heads[0].num_features == 4 * 32
    assert_equal_weights(dict(one.state_dict()), dict(again.state_dict()))
    assert not torch.equal(one.heads[0].linear.weight, other.heads[0].linear.weight)
    # The backbone has the same initial weights as without exits.
    backbone = plain.build_model("private", 0).state_dict()
    assert torch.equal(one.head.weight, backbone["head.weight"])
    assert cut.hash_dict() != make_spec(client=client()).hash_dict() != plain.hash_dict()


def trained(run: Any) -> dict[str, bool]:
    """Return which heads of the first client's network have changed."""
    before = run.spec.build_model("private", 0)
    after = run.engine.clients[0].networks["private"]
    pairs = zip(before.heads, after.heads, strict=True)
    return {
        f"exit_{number}": differ(dict(old.state_dict()), dict(new.state_dict()))
        for number, (old, new) in enumerate(pairs, start=1)
    }


METHODS = [
    Local,
    FedAvg,
    FedeKD,
    FedType,
    Ditto,
    FedPer,
    FML,
    FedKD,
    pytest.param(lambda: FedeKD(energy="feature"), id="FedeKD-feature"),
]


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_method_trains_every_exit(method: Any, federate: Federate) -> None:
    run = federate(method(), client=client())
    run.run()
    assert all(tensor.isfinite().all() for tensor in weights(run).values())
    assert trained(run) == {"exit_1": True, "exit_2": True}


@pytest.mark.parametrize("method", [Local, FedeKD])
def test_method_regression_trains_every_exit(method: Any, federate: Federate) -> None:
    run = federate(method(), "regression", client=client())
    run.run()
    assert trained(run) == {"exit_1": True, "exit_2": True}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"temperature": 0.0}, r"method\.temperature: .* got 0\.0"),
        ({"ema_decay": 2.0}, r"method\.ema_decay: .* got 2\.0"),
        ({"warmup_epochs": -1}, r"method\.warmup_epochs: .* got -1"),
        ({"exit_weights": [0.0, 0.0]}, r"method\.exit_weights: expected finite"),
        ({"distillation_weight": math.inf}, r"method\.distillation_weight: .* got inf"),
    ],
)
def test_safekd_invalid_argument_raises_user_error(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        SafeKD(**arguments)


def test_safekd_wrong_number_of_exit_weights_raises_before_training(federate: Federate) -> None:
    run = federate(SafeKD(exit_weights=[1.0, 1.0, 1.0]), client=client())
    with pytest.raises(UserError, match=r"method\.exit_weights: expected 2 weights, one per exit"):
        run.run()
    assert not run.progress.local
