"""State dicts as bytes: the same state gives the same bytes, and reading them runs no code."""

from __future__ import annotations

import hashlib
import io
from typing import Any

import torch
from torch import Tensor


def to_cpu(state: Any) -> Any:
    """The same nested state with every tensor on the CPU."""
    if isinstance(state, Tensor):
        return state.detach().cpu()
    if isinstance(state, dict):
        return {key: to_cpu(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(to_cpu(value) for value in state)
    return state


def pack(state: Any) -> bytes:
    """A nested state of tensors, numbers and strings as bytes that depend on nothing else."""
    buffer = io.BytesIO()  # given a path, torch.save would write the file's name into the file
    torch.save(to_cpu(state), buffer)
    return buffer.getvalue()


def unpack(content: bytes) -> Any:
    """The inverse of `pack`, on the CPU.

    Raises:
        Exception: Whatever torch says of bytes that are not a whole state of plain values.
    """
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def digest(content: bytes) -> str:
    """SHA-256 as hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()
