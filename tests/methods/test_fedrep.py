"""FedRep: one of its two parts is held while the other learns, and only the representation travels."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedekd.errors import UserError
from fedekd.federation import Orchestrator, RoundOptions
from fedekd.methods import Client, ClientOptions, FedPer, FedRep, Local
from fedekd.methods.base import num_bytes
from fedekd.modules import ObjectiveModule, SupervisedModule

from .conftest import Federate, weights

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
    # Weight decay and momentum would move weights without a gradient, if they were not left out.
    sgd = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01}}
    return replace(ClientOptions(local_epochs=2, private_model=PROXY, optimizer=sgd), **values)


KINDS = pytest.mark.parametrize(
    ("client", "head"),
    [(options(), "head."), (options(exits=2), "heads."), (options(private_model=NORMED), "head.")],
    ids=["plain", "exits", "batch norm"],
)


def client_of(run: Orchestrator, number: int = 0) -> Any:
    engine: Any = run.engine
    return engine.client(number)


class Phases:
    """Notes, of each phase of a client's training, its role, its epochs and which weights it moved."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.moved: list[set[str]] = []
        self.asked: list[tuple[str, int, int | None]] = []
        real = Client.train

        def train(client: Client, role: str, module: ObjectiveModule, round_idx: int, **given: Any) -> Any:
            before = {name: weight.detach().clone() for name, weight in module.network.named_parameters()}
            recorded = real(client, role, module, round_idx, **given)
            after = dict(module.network.named_parameters())
            self.moved.append({name for name in before if not torch.equal(before[name], after[name])})
            self.asked.append((role, round_idx, given.get("epochs")))
            return recorded

        monkeypatch.setattr(Client, "train", train)


def upload_once(run: Orchestrator) -> Any:
    run.method.init_server(run.spec)
    client = client_of(run)
    run.method.receive(client, run.method.broadcast([0], 0).to(0), 0)
    return run.method.prepare_update(client, 0)


@KINDS
def test_first_the_head_alone_learns_then_the_representation_alone(
    client: ClientOptions, head: str, federate: Federate, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, phases = federate(FedRep(head_epochs=3), client=client), Phases(monkeypatch)
    upload_once(run)
    names = dict(client_of(run).networks["private"].named_parameters())
    heads = {name for name in names if name.startswith(head)}
    assert 0 < len(heads) < len(names)
    assert phases.moved == [heads, set(names) - heads]
    assert phases.asked == [("head", 0, 3), ("private", 0, None)]
    assert all(parameter.requires_grad for parameter in names.values())


@KINDS
def test_both_phases_are_plain_training_of_what_is_free(
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
        other.train(role, module, 0, epochs=epochs)
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, client_of(run).networks["private"].state_dict()[name]), name
        assert (name in update.state) == (not name.startswith(head))


@KINDS
def test_only_the_representation_travels(client: ClientOptions, head: str, federate: Federate) -> None:
    run = federate(FedRep(), client=client)
    run.run()
    model = run.method.server_state["model"]
    assert not any(name.startswith(head) for name in model)
    assert run.progress.bytes_up == 2 * 3 * num_bytes(model)
    assert run.progress.bytes_down == 3 * 3 * num_bytes(model)
    ours = weights(run)
    for name in client_of(run).networks["private"].state_dict():
        shared = torch.equal(ours[f"0/{name}"], ours[f"1/{name}"])
        assert shared == (name in model), name


def test_it_differs_from_fedper_by_its_phases_alone(federate: Federate) -> None:
    ours, theirs = (federate(method, client=options(exits=2)) for method in (FedRep(), FedPer()))
    for run in (ours, theirs):
        run.run()
    assert ours.progress.bytes_up == theirs.progress.bytes_up
    assert ours.method.server_state["model"].keys() == theirs.method.server_state["model"].keys()
    assert any(not torch.equal(tensor, weights(theirs)[name]) for name, tensor in weights(ours).items())


def test_epochs_of_the_head_come_on_top_and_delta_is_against_as_many_rounds_of_local(federate: Federate) -> None:
    rounds = RoundOptions(rounds=3)
    run = federate(FedRep(head_epochs=5), client=options(), rounds=rounds)
    run.run()
    assert [client_of(run, number).supervised_epochs for number in range(3)] == [3 * 2] * 3
    local = federate(Local(), client=options(), rounds=rounds)
    local.run()
    for row in run.progress.history:
        for number in range(3):
            alone = local.progress.history[int(row["round"]) - 1][f"client_{number}/accuracy"]
            assert row[f"client_{number}/local"] == alone


@pytest.mark.parametrize("phase", ["head", "private"])
def test_all_weights_may_learn_again_even_if_training_fails(
    phase: str, federate: Federate, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Client.train

    def train(client: Client, role: str, *given: Any, **named: Any) -> Any:
        if role == phase:
            raise ZeroDivisionError
        return real(client, role, *given, **named)

    run = federate(FedRep(), client=options())
    network = client_of(run).networks["private"]
    network.fully_connected.requires_grad_(False)  # whoever holds a part for good gets it back held
    monkeypatch.setattr(Client, "train", train)
    with pytest.raises(ZeroDivisionError):
        upload_once(run)
    held = {name for name, parameter in network.named_parameters() if not parameter.requires_grad}
    assert held == {"fully_connected.1.weight", "fully_connected.1.bias"}


def test_a_part_of_ones_own_choice_is_the_head(federate: Federate, monkeypatch: pytest.MonkeyPatch) -> None:
    run, phases = federate(FedRep(personal=["head", "fully_connected"]), client=options()), Phases(monkeypatch)
    upload_once(run)
    assert {name.split(".")[0] for name in phases.moved[0]} == {"head", "fully_connected"}
    assert {name.split(".")[0] for name in phases.moved[1]} == {"convolutions"}


@pytest.mark.parametrize(
    ("personal", "words"),
    [
        ([], r"method\.personal is \[\], which leaves FedRep no head to train"),
        (["neck"], r"method\.personal is \['neck'\], but client\.private_model has no part 'neck'"),
        (["convolutions", "fully_connected", "head"], r"method\.personal is .*, which leaves nothing to share"),
    ],
)
def test_parts_that_leave_nothing_to_do_are_told_before_training(
    personal: list[str], words: str, federate: Federate
) -> None:
    run = federate(FedRep(personal=personal), client=options())
    with pytest.raises(UserError, match=words) as told:
        run.run()
    assert "\n" not in str(told.value)
    assert not run.progress.local


@pytest.mark.parametrize("epochs", [0, -1])
def test_the_head_must_be_trained(epochs: int) -> None:
    with pytest.raises(UserError, match=rf"method\.head_epochs is {epochs}, and must be at least 1"):
        FedRep(head_epochs=epochs)
