"""What an update must be before it is averaged: like what the client was sent, and finite."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from fedekd.methods import StateDict


@dataclass(frozen=True)
class UpdateValidator:
    """Refuses updates that would spoil the average.

    Args:
        max_norm: The largest accepted 2-norm of the difference to what was sent; None sets no bound.
    """

    max_norm: float | None = None

    def objection(self, update: StateDict, sent: StateDict) -> str | None:
        """Why an update is refused, in a few words; None if it is accepted.

        Args:
            update: What the client sends.
            sent: What the client was sent; names, shapes and dtypes must be the same.
        """
        if missing := sent.keys() - update.keys():
            return f"it lacks {sorted(missing)[0]!r}"
        if unknown := update.keys() - sent.keys():
            return f"it holds {sorted(unknown)[0]!r}, which the client was not sent"
        squared = 0.0
        for name, tensor in update.items():
            model = sent[name]
            if tensor.shape != model.shape:
                return f"{name!r} has shape {tuple(tensor.shape)} instead of {tuple(model.shape)}"
            if tensor.dtype != model.dtype:
                return f"{name!r} is {tensor.dtype} instead of {model.dtype}"
            if tensor.is_floating_point():
                if not bool(torch.isfinite(tensor).all()):
                    return f"{name!r} holds values that are not finite"
                if self.max_norm is not None:
                    squared += float((tensor.double() - model.to(tensor.device).double()).square().sum())
        if self.max_norm is not None and not math.sqrt(squared) <= self.max_norm:
            return f"its norm is {math.sqrt(squared):.4g}, above max_update_norm {self.max_norm:g}"
        return None
