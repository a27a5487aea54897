"""State dicts as bytes: the same state gives the same bytes, and reading them runs no code."""

from __future__ import annotations

import hashlib
import io
import sys
from typing import Any

import torch
from torch import Tensor


def _canonical(state: Any) -> Any:
    """The same nested state on the CPU, as plain containers with one object for equal strings.

    Pickle writes a string that it has met before as a reference. Without this, a state that was read from a file
    would give other bytes than the same state that was computed.
    """
    if isinstance(state, Tensor):
        return state.detach().cpu()
    if isinstance(state, dict):
        return {_canonical(key): _canonical(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(_canonical(value) for value in state)
    return sys.intern(state) if isinstance(state, str) else state


def pack(state: Any) -> bytes:
    """A nested state of tensors, numbers and strings as bytes that depend on nothing else."""
    buffer = io.BytesIO()  # given a path, torch.save would write the file's name into the file
    torch.save(_canonical(state), buffer)
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
