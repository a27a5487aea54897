"""Validation of client updates before they are averaged."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from fedekd.methods import StateDict


@dataclass(frozen=True)
class UpdateValidator:
    """Rejects updates of wrong structure, non-finite values or a too large norm.

    Args:
        max_norm: Largest accepted 2-norm of the difference between update and message; None sets no bound.
    """

    max_norm: float | None = None

    def check(self, update: StateDict, sent: StateDict) -> str | None:
        """Check an update.

        Args:
            update: State dict from the client.
            sent: State dict that the client received; keys, shapes and dtypes must be equal.

        Returns:
            The reason to reject it; None if it is valid.
        """
        if missing := sent.keys() - update.keys():
            return f"key {sorted(missing)[0]!r} is missing"
        if unknown := update.keys() - sent.keys():
            return f"key {sorted(unknown)[0]!r} was not sent to the client"
        squared = 0.0
        for name, tensor in update.items():
            reference = sent[name]
            if tensor.shape != reference.shape:
                return f"{name!r}: expected shape {tuple(reference.shape)}, got {tuple(tensor.shape)}"
            if tensor.dtype != reference.dtype:
                return f"{name!r}: expected {reference.dtype}, got {tensor.dtype}"
            if tensor.is_floating_point():
                if not bool(torch.isfinite(tensor).all()):
                    return f"{name!r}: expected finite values, got NaN or infinity"
                if self.max_norm is not None:
                    squared += float((tensor.double() - reference.to(tensor.device).double()).square().sum())
        if self.max_norm is not None and not math.sqrt(squared) <= self.max_norm:
            return f"max_update_norm: expected a 2-norm of at most {self.max_norm:g}, got {math.sqrt(squared):.4g}"
        return None
