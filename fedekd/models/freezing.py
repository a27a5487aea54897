"""Frozen parts of a network: their parameters and statistics do not change.

Frozen tensors are equal at all clients, so that methods leave them out of what is exchanged: neither an average, nor a
narrower `wire_dtype`, nor the noise of `privacy` changes them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from fedekd.errors import require, shorten
from fedekd.models.image_classifier import last_linear
from fedekd.models.multi_exit import ExitHead, MultiExitNetwork

BACKBONE = "backbone"
"""Freezes all but the last linear layer, or all but the heads of the exits."""

#: Attribute of a module: names of its own tensors that are frozen. Unlike `requires_grad`, no method changes it.
_MARK = "_frozen_tensors"


def head_prefixes(network: nn.Module) -> list[str]:
    """Return the prefixes of the tensors of the last linear layers, one per exit.

    Example:
        >>> from fedekd.models import PrivateCNN, multi_exit
        >>> head_prefixes(PrivateCNN()), head_prefixes(multi_exit(PrivateCNN(), num_classes=10, exits=2))
        (['head.'], ['heads.0.linear.', 'heads.1.'])
    """
    if isinstance(network, MultiExitNetwork):
        exits = enumerate(network.heads)
        return [f"heads.{number}.{'linear.' if isinstance(head, ExitHead) else ''}" for number, head in exits]
    if isinstance(getattr(network, "head", None), nn.Linear):
        return ["head."]
    name, head = last_linear(network)
    return [] if head is None else [f"{name}."]


def freeze(network: nn.Module, patterns: Sequence[str] | str, option: str = "client.freeze") -> None:
    """Freeze parameters by name, and the buffers of frozen layers.

    A layer whose parameters are all frozen keeps its buffers, such as the statistics of BatchNorm, and stays in
    evaluation mode. So does a layer without parameters, such as BatchNorm without `affine`, if all parameters of the
    smallest module around it that has any are frozen.

    Args:
        network: The network; it is changed.
        patterns: Patterns of parameter names, as in `fnmatch`; or `backbone`.
        option: Name of the option in errors.

    Raises:
        UserError: If a pattern matches no parameter, or no parameter is left to train.

    Example:
        >>> from fedekd.models import PrivateCNN
        >>> network = PrivateCNN()
        >>> freeze(network, ["convolutions.*"])
        >>> [name for name, parameter in network.named_parameters() if parameter.requires_grad]
        ['fully_connected.1.weight', 'fully_connected.1.bias', 'head.weight', 'head.bias']
    """
    named = dict(network.named_parameters(remove_duplicate=False))
    if patterns == BACKBONE:
        heads = ("heads.",) if isinstance(network, MultiExitNetwork) else tuple(head_prefixes(network))
        require(bool(heads), option, "patterns for a network without a linear layer", patterns)
        frozen = {id(parameter) for name, parameter in named.items() if not name.startswith(heads)}
    else:
        frozen = set()
        for pattern in patterns:
            names = [name for name in named if fnmatchcase(name, pattern)]
            hint = f"Its parameters are {shorten(', '.join(named), 150)}"
            kind = type(getattr(network, "backbone", network)).__name__
            require(bool(names), option, f"patterns that match a parameter of {kind}", pattern, hint)
            frozen |= {id(named[name]) for name in names}
    left = any(parameter.requires_grad and id(parameter) not in frozen for parameter in named.values())
    require(left, option, "patterns that leave a parameter to train", patterns)
    freeze_parameters(network, frozen)


def freeze_parameters(network: nn.Module, frozen: set[int]) -> None:
    """Freeze parameters by identity, and the buffers of frozen layers.

    Args:
        network: The network; it is changed.
        frozen: `id` of each parameter to freeze.
    """
    for parameter in network.parameters():
        if id(parameter) in frozen:
            parameter.requires_grad_(False)
    _mark(network, frozen, within=False)
    keep_frozen_statistics(network)


def _mark(part: nn.Module, frozen: set[int], within: bool) -> None:
    """Record the frozen tensors of a module and of its submodules."""
    parameters = [*part.parameters()]
    is_frozen = all(id(parameter) in frozen for parameter in parameters) if parameters else within
    names = [name for name, tensor in part._parameters.items() if id(tensor) in frozen]
    names += [name for name in part._buffers if is_frozen and name not in part._non_persistent_buffers_set]
    if names:
        setattr(part, _MARK, tuple(names))
    for child in part.children():
        _mark(child, frozen, is_frozen)


def _marked(network: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the names of frozen tensors, and the modules that own them."""
    for prefix, part in network.named_modules(remove_duplicate=False):
        for name in getattr(part, _MARK, ()):
            yield f"{prefix}.{name}" if prefix else name, part


def frozen_names(network: nn.Module) -> set[str]:
    """Return the names of the tensors in `state_dict` that `freeze` has frozen."""
    return {name for name, _ in _marked(network)}


def keeps_statistics(part: nn.Module) -> bool:
    """Return True for a layer with frozen buffers, such as BatchNorm statistics."""
    return any(name in part._buffers for name in getattr(part, _MARK, ()))


def keep_frozen_statistics(network: nn.Module) -> None:
    """Set layers with frozen buffers to evaluation mode, without their submodules."""
    for part in network.modules():
        if keeps_statistics(part):
            part.training = False


def trained_parameters(network: nn.Module) -> list[nn.Parameter]:
    """Return the parameters for the optimizer: all that `freeze` has not frozen."""
    frozen = {id(part._parameters.get(name.rpartition(".")[2])) for name, part in _marked(network)}
    return [parameter for parameter in network.parameters() if id(parameter) not in frozen]


def exchanged_tensors(network: nn.Module) -> dict[str, Tensor]:
    """Return the state of a network without frozen tensors."""
    frozen = frozen_names(network)
    return {name: tensor for name, tensor in network.state_dict().items() if name not in frozen}


def load_exchanged(network: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load tensors of `exchanged_tensors`, and keep the frozen ones."""
    state = network.state_dict()
    network.load_state_dict({**tensors, **{name: state[name] for name in frozen_names(network)}})
