"""Hash of a network's architecture and weights."""

from __future__ import annotations

import inspect
import weakref
from functools import cache
from hashlib import sha256
from types import BuiltinFunctionType, FunctionType
from typing import Any

from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from fedekd.errors import UserError
from fedekd.models.digest import tensor_contents


def network_fingerprint(network: nn.Module) -> str:
    """Hash the modules, parameters and buffers of a network.

    Names, shapes and dtypes are included. Memory layout and device do not matter. A module is identified by its class
    and its plain settings: the same weights with another activation, or with another number of attention heads, give
    another fingerprint. Settings that a module does not store under the name of the argument are not included.

    Args:
        network: Any module.

    Returns:
        SHA-256 digest, 64 hexadecimal digits.

    Example:
        >>> import torch
        >>> torch.manual_seed(0)  # doctest: +ELLIPSIS
        <torch...>
        >>> layer = nn.Linear(2, 2)
        >>> network_fingerprint(layer) == network_fingerprint(layer.to(torch.float64))
        False
    """
    digest = sha256()
    for name, part in network.named_modules():
        digest.update(f"{name}:{type(part).__qualname__}:{part.extra_repr()}:{_settings(part)};".encode())
    for content in tensor_contents(network.state_dict() | dict(network.named_buffers())):  # with non-persistent buffers
        digest.update(content)
    return digest.hexdigest()


def _settings(part: nn.Module) -> str:
    """Plain constructor arguments that are stored under their own name."""
    names = sorted(inspect.signature(type(part).__init__).parameters)
    values = {name: _plain(getattr(part, name, None)) for name in names if name != "self"}
    return str([(name, value) for name, value in values.items() if value is not None])


def _plain(value: Any) -> Any:
    """Number, string, function name or list of these, else None."""
    if isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, FunctionType | BuiltinFunctionType):
        return f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, list | tuple):
        items = [_plain(item) for item in value]
        return None if None in items else items
    return None


class FingerprintCheck:
    """Comparison of networks with fingerprints; hashes an unchanged network once.

    A network is hashed again after one of its modules or tensors was replaced or written to in place, and after any
    optimizer step in this process. In-place writes to `tensor.data` are not noticed.
    """

    def __init__(self) -> None:
        self._checked: dict[str, tuple[weakref.ref[nn.Module], tuple[int, ...]]] = {}

    def __reduce__(self) -> tuple[type[FingerprintCheck], tuple[()]]:
        """Pickle without the networks that were checked in this process."""
        return FingerprintCheck, ()

    def require(self, role: str, network: nn.Module, fingerprint: str) -> None:
        """Raise an error if the network has another fingerprint.

        Args:
            role: `network` or `proxy`, for the error message.
            network: The network to check.
            fingerprint: The expected fingerprint; empty accepts any network.

        Raises:
            UserError: The fingerprints differ.
        """
        if not fingerprint:
            return
        state = _weights_state(network)
        if role in self._checked:
            checked, checked_state = self._checked[role]
            if checked() is network and checked_state == state:
                return
        actual = network_fingerprint(network)
        if actual != fingerprint:
            raise UserError(
                f"exit policy: expected the {role} {fingerprint[:12]} it was calibrated for, got {actual[:12]}."
                f" The guarantee is about one {role} only; calibrate this one"
            )
        self._checked[role] = weakref.ref(network), state


class _OptimizerSteps:
    """Number of optimizer steps in this process.

    Fused optimizers change tensors without raising their version counter.
    """

    def __init__(self) -> None:
        self.count = 0
        register_optimizer_step_post_hook(self._increment)

    def _increment(self, *arguments: Any) -> None:
        self.count += 1


@cache
def _optimizer_steps() -> _OptimizerSteps:
    return _OptimizerSteps()


def _weights_state(network: nn.Module) -> tuple[int, ...]:
    """Identities and version counters of all modules and tensors."""
    # Computed per batch: reading the dictionaries is 5 times as fast as parameters() and buffers().
    state = [_optimizer_steps().count]
    for part in network.modules():
        state.append(id(part))
        for tensors in (part._parameters, part._buffers):
            for tensor in tensors.values():
                if tensor is not None:
                    state += (id(tensor), tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version)
    return tuple(state)
