"""FederationSpec and ClientOptions: optimizers, and invalid values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fedekd.errors import UserError
from fedekd.methods import ClientOptions

from .conftest import make_spec


def optimizer(name: str, **init_args: Any) -> torch.optim.Optimizer:
    spec = {"class_path": f"torch.optim.{name}", "init_args": init_args}
    spec = make_spec(client=ClientOptions(optimizer=spec))
    return spec.optimizer(nn.Linear(2, 2).parameters())


@pytest.mark.parametrize(
    ("name", "init_args", "fused"),
    [
        ("Adam", {"lr": 0.1}, True),
        ("Adam", {"lr": 0.1, "fused": None, "foreach": None}, True),
        ("AdamW", {}, True),
        ("SGD", {"lr": 0.1}, True),
        ("Adam", {"fused": False}, False),
        ("Adam", {"foreach": True}, None),
        ("Adam", {"differentiable": True}, None),
        ("Adagrad", {}, None),
    ],
)
def test_spec_optimizer_is_fused_unless_another_form_is_given(name: str, init_args: dict[str, Any], fused: Any) -> None:
    assert optimizer(name, **init_args).defaults["fused"] is fused


@pytest.mark.parametrize(
    ("name", "init_args"),
    [("Adam", {"lr": -1.0}), ("Adam", {"rate": 0.1}), ("Adam", {"fused": True, "differentiable": True})],
)
def test_spec_optimizer_invalid_arguments_raise_user_error(name: str, init_args: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"client.optimizer: expected arguments of torch.optim.Adam, got"):
        optimizer(name, **init_args)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"local_epochs": 0}, "client.local_epochs: expected at least 1, got 0"),
        ({"exits": 0}, "client.exits: expected at least 1, or null, got 0"),
        ({"exits": []}, "client.exits: expected at least 1, or null"),
        ({"exits": [3, -1]}, "client.exits: expected at least 1, or null"),
        ({"exit_grid": 0}, "client.exit_grid: expected at least 1, got 0"),
        ({"lr_decay": 0}, "client.lr_decay: expected a number in"),
        ({"lr_decay": 1.5}, "client.lr_decay: expected a number in"),
        ({"optimizer": {}}, "client.optimizer: expected class_path and init_args"),
        ({"optimizer": {"class_path": "torch.optim.LBFGS"}}, "client.optimizer: .* got 'torch.optim.LBFGS'"),
        ({"depths": [1, 0]}, "client.depths: expected numbers of stages"),
        ({"depths": []}, "client.depths: expected numbers of stages"),
        ({"private_models": []}, "client.private_models: expected at least one model"),
    ],
)
def test_client_options_invalid_value_raises_one_line_user_error(values: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        ClientOptions(**values)
    assert "\n" not in str(error.value)
