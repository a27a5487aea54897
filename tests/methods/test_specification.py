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
        ("Adagrad", {}, None),
    ],
)
def test_spec_optimizer_is_fused_unless_another_form_is_given(name: str, init_args: dict[str, Any], fused: Any) -> None:
    assert optimizer(name, **init_args).defaults["fused"] is fused


@pytest.mark.parametrize(
    ("name", "init_args", "words"),
    [
        ("Adam", {"lr": -1.0, "eps": 1e-8}, r"optimizer\.lr: expected a value that torch.optim.Adam accepts, got -1.0"),
        ("Adam", {"betas": [2.0, 0.9]}, r"optimizer\.betas: .*got \[2.0, 0.9\]. It reports: Invalid beta parameter"),
        ("Adam", {"rate": 0.1}, r"optimizer\.rate: .*unexpected keyword argument"),
        ("Adam", {"fused": True, "differentiable": True}, r"optimizer\.differentiable: .*got True"),
        ("Adam", {"differentiable": True}, r"optimizer\.differentiable: "),
        ("SGD", {"momentum": -1.0, "lr": 0.1}, r"optimizer\.momentum: .*got -1.0. It reports: Invalid momentum value"),
        ("SGD", {"nesterov": True}, r"optimizer\.nesterov: .*Nesterov momentum requires a momentum"),
        ("SGD", {"weight_decay": -1.0}, r"optimizer\.weight_decay: "),
        ("SGD", {"lr": -1.0, "momentum": -1.0}, r"optimizer: expected arguments that torch.optim.SGD accepts"),
        ("Muon", {}, r"optimizer: .*only supports 2D parameters"),
        ("Nope", {}, r"optimizer: .*has no attribute 'Nope'"),
    ],
)
def test_client_options_invalid_optimizer_argument_is_named(name: str, init_args: dict[str, Any], words: str) -> None:
    """When the options are built, not when training begins."""
    state = torch.get_rng_state()
    with pytest.raises(UserError, match=words):
        ClientOptions(optimizer={"class_path": f"torch.optim.{name}", "init_args": init_args})
    assert torch.equal(torch.get_rng_state(), state)


def test_spec_capturable_optimizer_on_a_cpu_raises() -> None:
    with pytest.raises(UserError, match=r"optimizer\.capturable: expected false with --trainer\.accelerator cpu"):
        optimizer("Adam", capturable=True)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"local_epochs": 0}, "client.local_epochs: expected at least 1, got 0"),
        ({"exits": 0}, "client.exits: expected at least 1, or null, got 0"),
        ({"exits": []}, "client.exits: expected at least 1, or null"),
        ({"exits": [3, -1]}, "client.exits: expected at least 1, or null"),
        ({"exit_grid": 0}, "client.exit_grid: expected 1 to 64, got 0"),
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
