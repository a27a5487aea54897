from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from fedekd.data import FederatedDataModule
from fedekd.errors import UserError
from fedekd.federation import Orchestrator
from fedekd.methods import ClientOptions, FedAvg
from fedekd.modules import TrainerFactory

SHARED = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
FROZEN = nn.Linear(64, 64).requires_grad_(False)


def whole(in_channels: int, num_classes: int) -> nn.Module:
    """Return one module for all clients."""
    return SHARED


def last_layer(in_channels: int, num_classes: int) -> nn.Module:
    """Return a module whose last layer all clients share."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), SHARED[1])


def frozen_layer(in_channels: int, num_classes: int) -> nn.Module:
    """Return a module with a frozen layer that all clients share."""
    return nn.Sequential(nn.Flatten(), FROZEN, nn.Linear(64, num_classes))


@pytest.fixture
def build(blobs: FederatedDataModule, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Build an orchestrator whose clients have the given models."""
    models = SimpleNamespace(__name__="users", whole=whole, last_layer=last_layer, frozen_layer=frozen_layer)
    monkeypatch.setitem(__import__("sys").modules, "users", models)

    def build(private: str, proxy: str = "ProxyCNN") -> Orchestrator:
        client = ClientOptions(private_model={"class_path": private}, proxy_model={"class_path": proxy})
        return Orchestrator(FedAvg(), blobs, client, TrainerFactory(accelerator="cpu", threads=1))

    return build


@pytest.mark.parametrize(
    ("private", "proxy", "option"),
    [
        ("users.whole", "ProxyCNN", "private"),
        ("users.last_layer", "ProxyCNN", "private"),
        ("PrivateCNN", "users.whole", "proxy"),
    ],
)
def test_check_models_shared_parameters_raise_one_line(build: Any, private: str, proxy: str, option: str) -> None:
    with pytest.raises(UserError, match=f"^client.{option}_model: expected new parameters in every model"):
        build(private, proxy)


def test_check_models_accepts_a_shared_frozen_layer(build: Any) -> None:
    build("users.frozen_layer")


def test_check_models_changes_no_global_generator(build: Any) -> None:
    state = torch.get_rng_state()
    build("PrivateCNN")
    assert torch.equal(torch.get_rng_state(), state)
