"""Evaluation mode for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def eval_mode(network: nn.Module) -> Iterator[None]:
    """Inside, a network and all its parts are in evaluation mode; afterwards each part is in the mode it was in."""
    modes = [(part, part.training) for part in network.modules()]
    if not any(training for _, training in modes):
        yield
        return
    network.eval()
    try:
        yield
    finally:
        if modes[0][1]:
            network.train()  # a network of one's own may do more in it than set a flag
        for part, training in modes:
            part.training = training
