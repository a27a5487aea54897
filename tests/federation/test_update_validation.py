"""The guard lets sound updates through, and names what is wrong with others."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fedekd.federation import UpdateValidator

SENT = {"w": torch.zeros(2, 3), "b": torch.zeros(3), "n": torch.tensor(4)}


def changed(**tensors: Tensor) -> dict[str, Tensor]:
    return {**SENT, **tensors}


def test_a_sound_update_is_accepted() -> None:
    assert UpdateValidator().objection(changed(w=torch.randn(2, 3), n=torch.tensor(5)), SENT) is None
    assert UpdateValidator().objection({}, {}) is None


@pytest.mark.parametrize(
    ("update", "words"),
    [
        ({"w": SENT["w"], "b": SENT["b"]}, "lacks 'n'"),
        (changed(x=torch.zeros(1)), "'x', which the client was not sent"),
        (changed(w=torch.zeros(3, 2)), r"'w' has shape \(3, 2\) instead of \(2, 3\)"),
        (changed(b=torch.zeros(3, dtype=torch.float64)), "float64 instead of torch.float32"),
        (changed(b=torch.tensor([0.0, torch.nan, 0.0])), "'b' holds values that are not finite"),
        (changed(b=torch.tensor([0.0, -torch.inf, 0.0])), "not finite"),
    ],
)
def test_what_is_wrong_is_named(update: dict[str, Tensor], words: str) -> None:
    objection = UpdateValidator().objection(update, SENT)
    assert objection is not None
    import re

    assert re.search(words, objection)


def test_norm_is_of_the_difference_to_what_was_sent() -> None:
    sent = {"w": torch.full((4,), 100.0)}
    update = {"w": torch.full((4,), 103.0)}  # at distance 6
    assert UpdateValidator(max_norm=6.01).objection(update, sent) is None
    objection = UpdateValidator(max_norm=5.99).objection(update, sent)
    assert objection is not None
    assert "norm is 6, above max_update_norm 5.99" in objection
    assert (
        UpdateValidator(max_norm=1.0).objection({"w": torch.full((4,), 3e38)}, {"w": torch.full((4,), -3e38)})
        is not None
    )
