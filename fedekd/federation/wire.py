"""Conversion of messages to the floating-point type in which they travel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from fedekd.errors import UserError
from fedekd.methods import Broadcast, ClientUpdate, StateDict

Dtypes = Mapping[str, torch.dtype]
"""Original dtype of each tensor that is converted for transport, by name."""

#: Values of `--wire_dtype`: unchanged dtypes, or at most 16 bits per floating-point number.
WIRE_DTYPES = ("float32", "float16")

_LARGEST = torch.finfo(torch.float16).max


def to_wire(broadcast: Broadcast, wire_dtype: str) -> tuple[Broadcast, Dtypes]:
    """Convert a broadcast for transport.

    Args:
        broadcast: Message of the server.
        wire_dtype: One of `WIRE_DTYPES`. float32 changes nothing. float16 converts floating-point tensors of more than
            16 bits, with a relative error of at most 2^-11 from 6.1e-5 on.

    Returns:
        The message, and the original dtypes of its converted tensors.

    Raises:
        UserError: If a finite value is beyond the range of float16.
    """
    if wire_dtype == "float32":
        return broadcast, {}
    states = [broadcast.shared, *broadcast.personal.values()]
    dtypes = {name: tensor.dtype for state in states for name, tensor in state.items() if _is_wide(tensor)}
    shared = _to_half(broadcast.shared)
    return Broadcast(shared, {number: _to_half(state) for number, state in broadcast.personal.items()}), dtypes


def update_to_wire(update: ClientUpdate, dtypes: Dtypes) -> ClientUpdate:
    """Convert a client's update as the message that it received.

    A value beyond the range becomes infinite, and the server rejects the update. A tensor whose dtype differs from that
    of the message is not converted, so that the server rejects it, too.

    Args:
        update: Update of a method.
        dtypes: Result of `to_wire`.
    """
    return replace(update, state=state_to_wire(update.state, dtypes)) if dtypes else update


def state_to_wire(state: StateDict, dtypes: Dtypes) -> StateDict:
    """Convert the tensors of an update; see `update_to_wire`."""
    return {
        name: tensor.detach().to(torch.float16) if name in dtypes and tensor.dtype == dtypes[name] else tensor
        for name, tensor in state.items()
    }


def from_wire(state: StateDict, dtypes: Dtypes) -> StateDict:
    """Convert received tensors to their dtypes before transport.

    Args:
        state: Received tensors.
        dtypes: Result of `to_wire`.
    """
    return {name: tensor.to(dtypes.get(name, tensor.dtype)) for name, tensor in state.items()} if dtypes else state


def updates_from_wire(updates: list[ClientUpdate], dtypes: Dtypes) -> list[ClientUpdate]:
    """Convert valid updates to the dtypes of the server state."""
    return [replace(update, state=from_wire(update.state, dtypes)) for update in updates] if dtypes else updates


def _is_wide(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.itemsize > torch.float16.itemsize


def _to_half(state: StateDict) -> StateDict:
    """Convert wide floating-point tensors to float16.

    Raises:
        UserError: If a finite value becomes infinite.
    """
    converted = dict(state)
    for name, tensor in state.items():
        if _is_wide(tensor):
            converted[name] = tensor.detach().to(torch.float16)
            beyond = tensor[converted[name].isinf() & tensor.isfinite()]
            if len(beyond):
                raise UserError(
                    f"wire_dtype: expected float32 for values above {_LARGEST:g}, got float16 and"
                    f" {float(beyond.abs().max()):.4g} in {name!r}"
                )
    return converted
