"""How large a model is."""

from __future__ import annotations

from torch import nn


def num_parameters(module: nn.Module) -> int:
    """Number of parameters, trainable or not; shared ones count once, buffers not at all.

    Example:
        >>> num_parameters(nn.Linear(3, 2))
        8
    """
    return sum(parameter.numel() for parameter in module.parameters())
