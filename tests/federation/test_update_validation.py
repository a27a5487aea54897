"""UpdateValidator accepts valid updates and names what is wrong with others."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fedekd.federation import UpdateValidator

SENT = {"w": torch.zeros(2, 3), "b": torch.zeros(3), "n": torch.tensor(4)}


def changed(**tensors: Tensor) -> dict[str, Tensor]:
    return {**SENT, **tensors}


def test_check_valid_update_returns_none() -> None:
    assert UpdateValidator().check(changed(w=torch.randn(2, 3), n=torch.tensor(5)), SENT) is None
    assert UpdateValidator().check({}, {}) is None


@pytest.mark.parametrize(
    ("update", "words"),
    [
        ({"w": SENT["w"], "b": SENT["b"]}, "key 'n' is missing"),
        (changed(x=torch.zeros(1)), "key 'x' was not sent to the client"),
        (changed(w=torch.zeros(3, 2)), "'w': expected shape (2, 3), got (3, 2)"),
        (changed(b=torch.zeros(3, dtype=torch.float64)), "'b': expected torch.float32, got torch.float64"),
        (changed(b=torch.tensor([0.0, torch.nan, 0.0])), "'b': expected finite values, got NaN or infinity"),
        (changed(b=torch.tensor([0.0, -torch.inf, 0.0])), "'b': expected finite values, got NaN or infinity"),
    ],
)
def test_check_invalid_update_returns_the_reason(update: dict[str, Tensor], words: str) -> None:
    assert UpdateValidator().check(update, SENT) == words


def test_check_norm_is_of_the_difference_to_the_message() -> None:
    sent = {"w": torch.full((4,), 100.0)}
    update = {"w": torch.full((4,), 103.0)}  # at distance 6
    assert UpdateValidator(max_norm=6.01).check(update, sent) is None
    reason = UpdateValidator(max_norm=5.99).check(update, sent)
    assert reason == "max_update_norm: expected a 2-norm of at most 5.99, got 6"
    opposite = {"w": torch.full((4,), 3e38)}, {"w": torch.full((4,), -3e38)}
    assert UpdateValidator(max_norm=1.0).check(*opposite) is not None
