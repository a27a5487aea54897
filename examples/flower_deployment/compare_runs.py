"""Comparison of the results of two runs of one federation."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fedekd.federation.checkpoint import CheckpointStore


def has_equal_metrics(run: Path, other: Path) -> bool:
    """Return True if the metrics.csv of two run folders are equal, byte for byte."""
    return (run / "metrics.csv").read_bytes() == (other / "metrics.csv").read_bytes()


def has_equal_server_state(run: Path, other: Path) -> bool:
    """Return True if two runs ended with bitwise equal server states."""
    state, other_state = last_server_state(run), last_server_state(other)
    return state is not None and _is_equal(state, other_state)


def _is_equal(one: Any, other: Any) -> bool:
    """Compare tensors, plain values and mappings of them."""
    if isinstance(one, Mapping):
        is_same_kind = isinstance(other, Mapping) and one.keys() == other.keys()
        return is_same_kind and all(_is_equal(one[name], other[name]) for name in one)
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    return bool(one == other)


def last_server_state(run: Path) -> dict[str, Any] | None:
    """Return the server state of the last checkpoint; None without a checkpoint."""
    checkpoint, _ = CheckpointStore(run / "checkpoints").load()
    return None if checkpoint is None else dict(checkpoint.server)
