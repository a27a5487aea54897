"""Diverged training: the run continues, and the client takes part again."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from fedekd.errors import UserError
from fedekd.federation import RoundOptions, SilentObserver
from fedekd.methods import Client, ClientOptions, FedDyn, FedeKD, FedType, Local
from fedekd.modules.losses.fedtype import ConformalModel
from tests.federation.runs import weights

from .conftest import Federate
from .test_methods import CASES, METHODS, small_client

#: Methods whose private model starts each round from the server's message.
SHARED = ("fedavg", "fedprox", "feddyn", "fedper", "fedrep", "cafedistill", "cafedistill-paper", "depthfl", "scalefl")


class Listener(SilentObserver):
    def __init__(self) -> None:
        self.phases, self.updates = 0, list[float]()

    def phase_finished(self, client: int, phase: str, steps: int) -> None:
        self.phases += 1

    def round_finished(self, row: Any) -> None:
        self.updates.append(row["comm/updates"])


@pytest.mark.slow
@pytest.mark.parametrize("name", SHARED)
def test_method_client_that_diverged_once_takes_part_again(
    name: str, federate: Federate, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = Client._train

    def diverging(self: Client, role: str, module: Any, round_idx: int, **options: Any) -> dict[str, float]:
        logs = train(self, role, module, round_idx, **options)
        if (self.number, role, round_idx) == (0, "private", 0):
            for parameter in self.networks["private"].parameters():
                parameter.data.fill_(math.nan)
        return logs

    monkeypatch.setattr(Client, "_train", diverging)
    run = federate(
        METHODS[name](), client=small_client(name), rounds=RoundOptions(rounds=2), observer=(listener := Listener())
    )
    summary = run.run()
    assert listener.updates == [2, 3]
    assert all(math.isfinite(client["score"]) for client in summary["clients"])
    assert all(tensor.isfinite().all() for tensor in weights(run).values())


@pytest.mark.slow
@pytest.mark.parametrize(("name", "task"), [case for case in CASES if "-" not in case[0]])
def test_method_diverged_run_finishes(name: str, task: str, federate: Federate) -> None:
    small = small_client(name)
    client = ClientOptions(
        local_epochs=1,
        private_model=small.private_model,
        exits=small.exits,
        optimizer={"class_path": "torch.optim.SGD", "init_args": {"lr": 1e30}},
    )
    summary = federate(METHODS[name](), task, client=client).run()
    assert all(client["local"] is None for client in summary["clients"])


def break_proxy(client: Client, what: str) -> None:
    """Make all weights of the proxy NaN, or so large that its outputs overflow."""
    for parameter in client.networks["proxy"].parameters():
        parameter.data.fill_({"nan": math.nan, "overflow": 1e30}[what])


@pytest.mark.parametrize("what", ["nan", "overflow"])
@pytest.mark.parametrize(
    "name", ["fedekd", "fedekd-none", "fedekd-feature", "fedekd-entropy", "fml", "fedkd", "fedtype", "fedtype-fedprox"]
)
def test_method_broken_global_proxy_leaves_the_private_model_finite(name: str, what: str, federate: Federate) -> None:
    run = federate(METHODS[name](), client=small_client(name))
    run.method.init_server(run.spec)
    client = run.engine.client(0)  # type: ignore[attr-defined]
    break_proxy(client, what)
    received = {key: tensor.clone() for key, tensor in client.networks["proxy"].state_dict().items()}
    initial = {key: tensor.clone() for key, tensor in client.networks["private"].state_dict().items()}
    run.method.receive(client, received, 1)
    run.method.prepare_update(client, 1)
    trained = client.networks["private"].state_dict()
    assert all(bool(tensor.isfinite().all()) for tensor in trained.values())
    assert not all(torch.equal(tensor, initial[key]) for key, tensor in trained.items())


def test_fedekd_broken_teacher_trains_as_the_local_baseline(federate: Federate) -> None:
    states = []
    for method in (FedeKD(), Local()):
        run = federate(method)
        run.method.init_server(run.spec)
        client = run.engine.client(0)  # type: ignore[attr-defined]
        received = {}
        if "proxy" in client.networks:
            break_proxy(client, "nan")
            received = dict(client.networks["proxy"].state_dict())
        run.method.receive(client, received, 1)
        states.append(client.networks["private"].state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[1])


def test_conformal_model_nonfinite_logits_gives_full_sets() -> None:
    logits = torch.randn(40, 3)
    logits[7, 1] = math.inf
    model = ConformalModel.calibrate(logits, torch.arange(40) % 3, 0.1, 0.001, torch.Generator())
    for others in (torch.randn(5, 3), torch.full((5, 3), math.nan)):
        assert model.sets(others, torch.Generator()).all()


def test_fedtype_diverged_proxy_keeps_lam(federate: Federate) -> None:
    run = federate(FedType())
    run.method.init_server(run.spec)
    client = run.engine.client(0)  # type: ignore[attr-defined]
    before = client.method_state["lam"]
    for parameter in client.networks["proxy"].parameters():
        parameter.data.fill_(math.nan)
    run.method.prepare_update(client, 0)
    assert client.method_state["lam"] == before


@pytest.mark.parametrize(
    ("options", "task", "words"),
    [
        (
            {"energy": "entropy"},
            "regression",
            r"method\.energy: expected one that is defined for regression, got 'entropy'",
        ),
        ({"consistency_weight": 0.5}, "regression", r"method\.consistency_weight: expected 0 for regression"),
    ],
)
def test_fedekd_incompatible_option_raises_before_training(
    options: dict[str, Any], task: str, words: str, federate: Federate
) -> None:
    run = federate(FedeKD(**options), task, observer=(listener := Listener()))
    with pytest.raises(UserError, match=words):
        run.run()
    assert listener.phases == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"gate": "nonsense"}, r"method\.gate: expected one of energy, .* got 'nonsense'"),
        ({"energy_of": "nonsense"}, r"method\.energy_of: expected one of .* got 'nonsense'"),
        ({"lambda_kd": math.inf}, r"method\.lambda_kd: expected a finite number of at least 0, got inf"),
        ({"beta": math.inf}, r"method\.beta: expected a finite number above 0, got inf"),
        ({"temperature": math.inf}, r"method\.temperature: expected a finite number above 0, got inf"),
        ({"private_optimizer_state": "cary"}, r"method\.private_optimizer_state: .* got 'cary'.* 'carry'"),
        ({"proxy_optimizer_state": "keep"}, r"method\.proxy_optimizer_state: .* got 'keep'"),
    ],
)
def test_fedekd_invalid_option_raises_user_error(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        FedeKD(**options)


def test_feddyn_diverged_training_keeps_gradients(federate: Federate) -> None:
    run = federate(FedDyn(alpha=0.1))
    run.method.init_server(run.spec)
    client = run.engine.client(0)  # type: ignore[attr-defined]
    run.method.receive(client, run.method.server_state["model"], 0)
    run.method.prepare_update(client, 0)
    before = {name: value.clone() for name, value in client.method_state["g"].items()}
    assert any(value.abs().max() > 0 for value in before.values())
    for parameter in client.networks["private"].parameters():
        parameter.data.fill_(math.nan)
    run.method.prepare_update(client, 1)
    assert all(torch.equal(value, before[name]) for name, value in client.method_state["g"].items())
