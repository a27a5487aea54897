"""Comparison of the results of two runs of one federation."""

from __future__ import annotations

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
    if state is None or other_state is None or state.keys() != other_state.keys():
        return False
    return all(torch.equal(state[name], other_state[name]) for name in state)


def last_server_state(run: Path) -> dict[str, Any] | None:
    """Return the server state of the last checkpoint; None without a checkpoint."""
    checkpoint, _ = CheckpointStore(run / "checkpoints").load()
    return None if checkpoint is None else dict(checkpoint.server)
