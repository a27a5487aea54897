"""By what a network is known again: its weights, to the last bit."""

from __future__ import annotations

import inspect
from functools import cache
from hashlib import sha256
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook


def network_fingerprint(network: nn.Module) -> str:
    """SHA-256 (hex) of a network's parts and of its parameters and buffers, with their names, shapes and types.

    The layout in memory and the device do not count. Parts are known by their class and by their plain settings: a
    network of the same weights with another activation, or another number of attention heads, is another network.
    Settings that a part does not keep under the name of its argument are not seen.

    Example:
        >>> torch.manual_seed(0)  # doctest: +ELLIPSIS
        <torch...>
        >>> layer = nn.Linear(2, 2)
        >>> network_fingerprint(layer) == network_fingerprint(layer.to(torch.float64))
        False
    """
    digest = sha256()
    for name, part in network.named_modules():
        digest.update(f"{name}:{type(part).__qualname__}:{part.extra_repr()}:{_settings(part)};".encode())
    for name, tensor in (network.state_dict() | dict(network.named_buffers())).items():  # also those never saved
        digest.update(f"{name}:{tuple(tensor.shape)}:{tensor.dtype};".encode())
        content = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(content.view(torch.uint8).numpy().tobytes() if content.numel() else b"")
    return digest.hexdigest()


def _settings(part: nn.Module) -> str:
    """What a part was made with, as far as it is plain and kept under its own name; not what it counts as it runs."""
    names = sorted(inspect.signature(type(part).__init__).parameters)
    values = {name: _plain(getattr(part, name, None)) for name in names if name != "self"}
    return str([(name, value) for name, value in values.items() if value is not None])


def _plain(value: Any) -> Any:
    """A setting that is alike in every process: a number, a text, a function's name, or a list of these; else None."""
    if isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, FunctionType | BuiltinFunctionType):
        return f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, list | tuple):
        parts = [_plain(each) for each in value]
        return None if None in parts else parts
    return None


class _Steps:
    """Counts all steps of all optimizers: fused ones write to tensors behind the back of autograd's counter."""

    def __init__(self) -> None:
        self.count = 0
        register_optimizer_step_post_hook(self._step)

    def _step(self, *arguments: Any) -> None:
        self.count += 1


@cache
def _steps() -> _Steps:
    return _Steps()


def weights_state(network: nn.Module) -> tuple[int, ...]:
    """What changes when a part is replaced, or a parameter or buffer; much cheaper than a fingerprint.

    It also changes with any step of any optimizer. What is written to `tensor.data` in place goes past it.
    """
    # By hand, as this is done for every batch: parameters() and buffers() take five times as long.
    state = [_steps().count]
    for part in network.modules():
        state.append(id(part))
        for tensors in (part._parameters, part._buffers):
            for tensor in tensors.values():
                if tensor is not None:
                    state += (id(tensor), tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version)
    return tuple(state)
