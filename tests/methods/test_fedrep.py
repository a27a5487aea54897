"""FedRep: alternating training of head and representation, and exchange of the representation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedekd.errors import UserError
from fedekd.federation import Orchestrator, RoundOptions
from fedekd.methods import Client, ClientOptions, FedPer, FedRep, Local
from fedekd.methods.base import state_dict_bytes
from fedekd.modules import ObjectiveModule, SupervisedModule
from tests.federation.runs import weights

from .conftest import Federate, client_of

PROXY = {"class_path": "fedekd.models.ProxyCNN"}


class Normed(nn.Module):
    """A small network with BatchNorm, whose last layer is `head`."""

    def __init__(self, in_channels: int = 1, image_size: Any = 8, num_classes: int = 3) -> None:
        super().__init__()
        self.base = nn.Sequential(nn.Conv2d(in_channels, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())
        self.head = nn.LazyLinear(num_classes)
        self(torch.zeros(2, in_channels, *image_size))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.base(x))
        return logits


NORMED = {"class_path": f"{__name__}.Normed"}


def options(**values: Any) -> ClientOptions:
    # Weight decay and momentum would change frozen weights, if the optimizer updated them.
    sgd = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01}}
    return replace(ClientOptions(local_epochs=2, private_model=PROXY, optimizer=sgd), **values)


KINDS = pytest.mark.parametrize(
    ("client", "head"),
    [(options(), "head."), (options(exits=2), "heads."), (options(private_model=NORMED), "head.")],
    ids=["plain", "exits", "batch norm"],
)


class Phases:
    """Records role, round and epochs of each training phase, and the weights that it changed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.changed: list[set[str]] = []
        self.calls: list[tuple[str, int, int | None]] = []
        original = Client._train

        def train(client: Client, role: str, module: ObjectiveModule, round_idx: int, **options: Any) -> Any:
            before = {name: weight.detach().clone() for name, weight in module.network.named_parameters()}
            means = original(client, role, module, round_idx, **options)
            after = dict(module.network.named_parameters())
            self.changed.append({name for name in before if not torch.equal(before[name], after[name])})
            self.calls.append((role, round_idx, options.get("epochs")))
            return means

        monkeypatch.setattr(Client, "_train", train)


def upload_once(run: Orchestrator) -> Any:
    run.method.init_server(run.spec)
    client = client_of(run)
    run.method.receive(client, run.method.broadcast([0], 0).to(0), 0)
    return run.method.prepare_update(client, 0)


@KINDS
def test_fedrep_trains_head_then_representation(
    client: ClientOptions, head: str, federate: Federate, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, phases = federate(FedRep(head_epochs=3), client=client), Phases(monkeypatch)
    upload_once(run)
    names = dict(client_of(run).networks["private"].named_parameters())
    heads = {name for name in names if name.startswith(head)}
    assert 0 < len(heads) < len(names)
    assert phases.changed == [heads, set(names) - heads]
    assert phases.calls == [("head", 0, 3), ("private", 0, None)]
    assert all(parameter.requires_grad for parameter in names.values())


@KINDS
def test_fedrep_phases_equal_training_of_unfrozen_parameters(
    client: ClientOptions, head: str, federate: Federate, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = federate(FedRep(head_epochs=3), client=client)
    update = upload_once(run)
    by_hand = federate(FedRep(head_epochs=3), client=client)
    other = client_of(by_hand)
    network = other.networks["private"]
    server = by_hand.spec.build_model("private", "server").state_dict()
    own = {name: tensor for name, tensor in network.state_dict().items() if name.startswith(head)}
    network.load_state_dict({**server, **own})
    for role, epochs in (("head", 3), ("private", 2)):
        free = [p for name, p in network.named_parameters() if name.startswith(head) == (role == "head")]
        module = SupervisedModule(network, "classification", lambda every, free=free: other.spec.optimizer(free))
        other._train(role, module, 0, epochs=epochs)
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, client_of(run).networks["private"].state_dict()[name]), name
        assert (name in update.state) == (not name.startswith(head))


@KINDS
def test_fedrep_exchanges_only_representation(client: ClientOptions, head: str, federate: Federate) -> None:
    run = federate(FedRep(), client=client)
    run.run()
    model = run.method.server_state["model"]
    assert not any(name.startswith(head) for name in model)
    assert run.progress.bytes_up == 2 * 3 * state_dict_bytes(model)
    assert run.progress.bytes_down == 3 * 3 * state_dict_bytes(model)
    ours = weights(run)
    for name in client_of(run).networks["private"].state_dict():
        shared = torch.equal(ours[f"0/{name}"], ours[f"1/{name}"])
        assert shared == (name in model), name


def test_fedrep_has_traffic_of_fedper_and_other_weights(federate: Federate) -> None:
    ours, theirs = (federate(method, client=options(exits=2)) for method in (FedRep(), FedPer()))
    for run in (ours, theirs):
        run.run()
    assert ours.progress.bytes_up == theirs.progress.bytes_up
    assert ours.method.server_state["model"].keys() == theirs.method.server_state["model"].keys()
    assert any(not torch.equal(tensor, weights(theirs)[name]) for name, tensor in weights(ours).items())


def test_fedrep_head_epochs_are_not_counted_for_local_baseline(federate: Federate) -> None:
    rounds = RoundOptions(rounds=3)
    run = federate(FedRep(head_epochs=5), client=options(), rounds=rounds)
    run.run()
    assert [client_of(run, number).supervised_epochs for number in range(3)] == [3 * 2] * 3
    local = federate(Local(), client=options(), rounds=rounds)
    local.run()
    for row in run.progress.history:
        for number in range(3):
            local_score = local.progress.history[int(row["round"]) - 1][f"client_{number}/accuracy"]
            assert row[f"client_{number}/local"] == local_score


@pytest.mark.parametrize("phase", ["head", "private"])
def test_fedrep_failed_training_restores_requires_grad(
    phase: str, federate: Federate, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Client._train

    def train(client: Client, role: str, *args: Any, **options: Any) -> Any:
        if role == phase:
            raise ZeroDivisionError
        return original(client, role, *args, **options)

    run = federate(FedRep(), client=options())
    network = client_of(run).networks["private"]
    network.fully_connected.requires_grad_(False)  # frozen by the user: stays frozen
    monkeypatch.setattr(Client, "_train", train)
    with pytest.raises(ZeroDivisionError):
        upload_once(run)
    frozen = {name for name, parameter in network.named_parameters() if not parameter.requires_grad}
    assert frozen == {"fully_connected.1.weight", "fully_connected.1.bias"}


def test_fedrep_personal_option_selects_head(federate: Federate, monkeypatch: pytest.MonkeyPatch) -> None:
    run, phases = federate(FedRep(personal=["head", "fully_connected"]), client=options()), Phases(monkeypatch)
    upload_once(run)
    assert {name.split(".")[0] for name in phases.changed[0]} == {"head", "fully_connected"}
    assert {name.split(".")[0] for name in phases.changed[1]} == {"convolutions"}


@pytest.mark.parametrize(
    ("personal", "words"),
    [
        ([], r"method\.personal: expected at least one module for FedRep"),
        (["neck"], r"method\.personal: expected modules of client\.private_model, got 'neck'"),
        (["convolutions", "fully_connected", "head"], r"method\.personal: expected to leave a shared part"),
    ],
)
def test_fedrep_invalid_personal_raises_before_training(personal: list[str], words: str, federate: Federate) -> None:
    run = federate(FedRep(personal=personal), client=options())
    with pytest.raises(UserError, match=words) as error:
        run.run()
    assert "\n" not in str(error.value)
    assert not run.progress.local


@pytest.mark.parametrize("epochs", [0, -1])
def test_fedrep_head_epochs_below_1_raise_user_error(epochs: int) -> None:
    with pytest.raises(UserError, match=rf"method\.head_epochs: expected at least 1, got {epochs}"):
        FedRep(head_epochs=epochs)
