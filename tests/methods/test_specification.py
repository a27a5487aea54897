"""What a client's optimizer is built with."""

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
def test_fused_where_it_is_safe_and_nothing_else_was_asked(name: str, init_args: dict[str, Any], fused: Any) -> None:
    assert optimizer(name, **init_args).defaults["fused"] is fused


@pytest.mark.parametrize(
    ("name", "init_args"),
    [("Adam", {"lr": -1.0}), ("Adam", {"rate": 0.1}), ("Adam", {"fused": True, "differentiable": True})],
)
def test_what_an_optimizer_does_not_take_is_told(name: str, init_args: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"client.optimizer torch.optim.Adam does not take"):
        optimizer(name, **init_args)
