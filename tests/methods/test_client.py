"""A client's training is a function of (seed, client, round, role, epoch)."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from fedekd.data import FederatedDataModule, scale
from fedekd.methods import Client, ClientOptions
from fedekd.modules import SupervisedModule, TrainerFactory

from .conftest import make_spec


@pytest.fixture
def client(blobs: FederatedDataModule) -> Client:
    """A client whose private model has dropout and BatchNorm."""
    spec = make_spec(client=ClientOptions(local_epochs=3))
    client = Client(1, blobs.clients[1], blobs.images, spec)
    torch.manual_seed(0)
    client.networks["private"] = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.Linear(16, 3)
    )
    return client


def module(client: Client) -> SupervisedModule:
    return SupervisedModule(client.networks["private"], "classification", client.spec.optimizer)


def weights(client: Client) -> dict[str, Any]:
    return copy.deepcopy(client.networks["private"].state_dict())


def test_epochs_in_turn_are_epochs_in_one_go(client: Client) -> None:
    start = weights(client)
    client.train("private", module(client), 2, carry_optimizer=True)
    at_once = weights(client)
    client.networks["private"].load_state_dict(start)
    client.optimizer_states.clear()
    for epoch in range(3):
        client.train("private", module(client), 2, epochs=1, first_epoch=epoch, carry_optimizer=True)
        torch.randn(100)  # somebody else draws in between
    in_turn = weights(client)
    assert all(torch.equal(at_once[name], in_turn[name]) for name in at_once)


@pytest.mark.parametrize("other", [{"round_idx": 3}, {"role": "proxy"}, {"first_epoch": 1}])
def test_another_purpose_draws_another_order(client: Client, other: dict[str, Any]) -> None:
    start = weights(client)
    results = []
    for arguments in ({}, {}, other):
        client.networks["private"].load_state_dict(start)
        client.train(**{"role": "private", "module": module(client), "round_idx": 2, **arguments})
        results.append(weights(client))
    assert all(torch.equal(results[0][name], results[1][name]) for name in start)
    assert any(not torch.equal(results[0][name], results[2][name]) for name in start)


def test_training_leaves_the_global_generator_as_it_was(client: Client) -> None:
    torch.manual_seed(5)
    expected = torch.randn(3)
    torch.manual_seed(5)
    client.train("private", module(client), 0)
    assert torch.equal(torch.randn(3), expected)


def test_predictions_come_in_the_order_of_the_split(client: Client) -> None:
    network = client.networks["private"].eval()
    output = client.predict("private", "train").output

    with torch.no_grad():
        expected = network(scale(client.images.pixels[client.splits.train]))
    torch.testing.assert_close(output, expected)


def test_losses_are_those_of_the_model_that_is_used_later(client: Client) -> None:
    """Which answers in the precision of its weights, whatever it was trained in."""
    mixed = TrainerFactory(accelerator="cpu", precision="bf16-mixed", threads=1)
    client.spec = replace(client.spec, trainer=mixed)
    client.networks["private"] = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    plain = client.predict("private", "test", mixed=False).output
    with torch.no_grad():
        assert torch.equal(plain, client.networks["private"](scale(client.images.pixels[client.splits.test])))
    assert not torch.equal(plain, client.predict("private", "test").output.float())
    # A label that only one of the two precisions finds: nearly a tie.
    targets = client.images.targets[client.splits.test]
    layer = client.networks["private"][1]
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.copy_(torch.tensor([1.0, 1.001, 0.0]))  # in bfloat16 both are 1, and the first is taken
    assert torch.equal(client.losses("test"), (targets != 1).double())


def test_state_dict_round_trip(client: Client) -> None:
    client.train("private", module(client), 0, carry_optimizer=True)
    client.method_state = {"g": {"w": torch.ones(2)}}
    client.supervised_epochs = 3
    state = copy.deepcopy(client.state_dict())
    client.train("private", module(client), 1, carry_optimizer=True)
    after = weights(client)
    client.load_state_dict(copy.deepcopy(state))
    assert client.method_state["g"]["w"].sum() == 2
    client.train("private", module(client), 1, carry_optimizer=True)
    assert all(torch.equal(after[name], weights(client)[name]) for name in after)


def test_networks_stay_where_they_were_trained(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning's teardown would move them to the CPU after every phase."""
    moved = []
    monkeypatch.setattr(nn.Module, "cpu", lambda self: moved.append(self) or self)
    client.train("private", module(client), 1, carry_optimizer=True)
    assert moved == []
    assert client.loss_scales == {}
    assert client.optimizer_states["private"]["state"]
