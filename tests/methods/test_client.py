"""Client: training as a function of (seed, client, round, role, epoch), predictions and state."""

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
    """Client whose private model has dropout and BatchNorm."""
    spec = make_spec(client=ClientOptions(local_epochs=3))
    client = Client(1, blobs.clients[1], blobs.samples, spec)
    torch.manual_seed(0)
    client.networks["private"] = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.Linear(16, 3)
    )
    return client


def module(client: Client) -> SupervisedModule:
    return SupervisedModule(client.networks["private"], "classification", client.spec.optimizer)


def weights(client: Client) -> dict[str, Any]:
    return copy.deepcopy(client.networks["private"].state_dict())


def test_client_train_single_epochs_equal_one_phase(client: Client) -> None:
    start = weights(client)
    client.train_supervised(module(client), 2, carry_optimizer=True)
    at_once = weights(client)
    client.networks["private"].load_state_dict(start)
    client.optimizer_states.clear()
    for epoch in range(3):
        client.train_supervised(module(client), 2, epochs=1, first_epoch=epoch, carry_optimizer=True)
        torch.randn(100)  # other draws from the global generator in between
    in_turn = weights(client)
    assert all(torch.equal(at_once[name], in_turn[name]) for name in at_once)


@pytest.mark.parametrize("other", [{"round_idx": 3}, {"role": "other"}, {"first_epoch": 1}])
def test_client_train_order_depends_on_round_role_and_epoch(client: Client, other: dict[str, Any]) -> None:
    start = weights(client)
    results = []
    for arguments in ({}, {}, other):
        client.networks["private"].load_state_dict(start)
        client.train(**{"role": "head", "module": module(client), "round_idx": 2, **arguments})
        results.append(weights(client))
    assert all(torch.equal(results[0][name], results[1][name]) for name in start)
    assert any(not torch.equal(results[0][name], results[2][name]) for name in start)


def test_client_train_restores_global_generator(client: Client) -> None:
    torch.manual_seed(5)
    expected = torch.randn(3)
    torch.manual_seed(5)
    client.train_supervised(module(client), 0)
    assert torch.equal(torch.randn(3), expected)


def test_client_predict_keeps_order_of_split(client: Client) -> None:
    network = client.networks["private"].eval()
    output = client.predict("private", "train").output

    with torch.no_grad():
        expected = network(scale(client.samples.inputs[client.splits.train]))
    torch.testing.assert_close(output, expected)


def test_client_losses_use_precision_of_weights(client: Client) -> None:
    mixed = TrainerFactory(accelerator="cpu", precision="bf16-mixed", threads=1)
    client.spec = replace(client.spec, trainer=mixed)
    client.networks["private"] = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    plain = client.predict("private", "test", mixed=False).output
    with torch.no_grad():
        assert torch.equal(plain, client.networks["private"](scale(client.samples.inputs[client.splits.test])))
    assert not torch.equal(plain, client.predict("private", "test").output.float())
    # Nearly a tie: only one of the two precisions predicts class 1.
    targets = client.samples.targets[client.splits.test]
    layer = client.networks["private"][1]
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.copy_(torch.tensor([1.0, 1.001, 0.0]))  # in bfloat16 both are 1, and argmax returns the first
    assert torch.equal(client.held_out("test")[0], (targets != 1).double())


def test_client_state_dict_round_trip_restores_training(client: Client) -> None:
    client.train_supervised(module(client), 0, carry_optimizer=True)
    client.method_state = {"g": {"w": torch.ones(2)}}
    state = copy.deepcopy(client.state_dict())
    client.train_supervised(module(client), 1, carry_optimizer=True)
    after = weights(client)
    client.load_state_dict(copy.deepcopy(state))
    assert client.method_state["g"]["w"].sum() == 2
    assert client.supervised_epochs == 3
    client.train_supervised(module(client), 1, carry_optimizer=True)
    assert all(torch.equal(after[name], weights(client)[name]) for name in after)


def test_client_train_keeps_networks_on_device(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning's teardown moves them to the CPU after every phase."""
    moved = []
    monkeypatch.setattr(nn.Module, "cpu", lambda self: moved.append(self) or self)
    client.train_supervised(module(client), 1, carry_optimizer=True)
    assert moved == []
    assert client.loss_scales == {}
    assert client.optimizer_states["private"]["state"]


def test_client_train_supervised_counts_epochs_and_uses_next_round(client: Client) -> None:
    start = weights(client)
    results = []
    for round_idx in (None, 1):
        client.networks["private"].load_state_dict(start)
        client.supervised_epochs = 0
        client.train_supervised(module(client), round_idx)
        assert (client.supervised_epochs, client.supervised_rounds) == (3, 1)
        results.append(weights(client))
    assert all(torch.equal(results[0][name], results[1][name]) for name in start)
    client.train_supervised(module(client), epochs=2)
    assert (client.supervised_epochs, client.supervised_rounds) == (5, 1)


def test_client_train_private_role_raises_value_error(client: Client) -> None:
    with pytest.raises(ValueError, match=r"Use Client\.train_supervised"):
        client.train("private", module(client), 0)
    client.train("head", module(client), 0)
    assert client.supervised_epochs == 0


def test_client_lr_decay_counts_completed_rounds_unless_given(client: Client) -> None:
    client.spec = replace(client.spec, client=ClientOptions(local_epochs=1, lr_decay=0.5))
    factors = []
    for options in ({}, {}, {"decay_rounds": 1}):
        trained = module(client)
        client.train_supervised(trained, **options)  # type: ignore[arg-type]
        factors.append(trained.lr_factor)
    assert factors == [1.0, 0.5, 0.5]
