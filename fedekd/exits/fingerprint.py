"""By what a network is known again: its weights, to the last bit."""

from __future__ import annotations

from hashlib import sha256

import torch
from torch import nn


def network_fingerprint(network: nn.Module) -> str:
    """SHA-256 (hex) of a network's parts and of its parameters and buffers, with their names, shapes and types.

    The layout in memory and the device do not count. Parts are known by their class and by their plain settings: a
    network of the same weights with another activation, or another number of attention heads, is another network.

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
    for name, tensor in network.state_dict().items():
        digest.update(f"{name}:{tuple(tensor.shape)}:{tensor.dtype};".encode())
        content = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(content.view(torch.uint8).numpy().tobytes() if content.numel() else b"")
    return digest.hexdigest()


def _settings(part: nn.Module) -> str:
    """Public attributes that are plain values, save for the mode."""
    plain = (bool, int, float, str, tuple, type(None))
    found = {name: value for name, value in vars(part).items() if name[0] != "_" and isinstance(value, plain)}
    return str(sorted((name, value) for name, value in found.items() if name != "training"))


def weights_state(network: nn.Module) -> tuple[int, ...]:
    """What changes when a part is replaced, or a parameter or buffer; much cheaper than a fingerprint.

    What is written in place is seen by autograd's counter alone: `tensor.data.add_` and fused optimizers go past it.
    """
    # By hand, as this is done for every batch: parameters() and buffers() take five times as long.
    state: list[int] = []
    for part in network.modules():
        state.append(id(part))
        for tensors in (part._parameters, part._buffers):
            for tensor in tensors.values():
                if tensor is not None:
                    state += (id(tensor), tensor.data_ptr(), tensor._version)
    return tuple(state)
