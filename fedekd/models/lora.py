"""Low-rank adapters (LoRA) of a frozen network, through peft."""

from __future__ import annotations

import copy
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from fedekd.errors import UserError, listed, require
from fedekd.global_state import isolated_rng
from fedekd.models.build import eval_mode
from fedekd.models.freezing import freeze_parameters, head_prefixes
from fedekd.models.multi_exit import MultiExitNetwork

#: Layers that can have an adapter; subclasses may compute something else, as those of timm with standardised weights.
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)

#: Attribute of the layers to which `add_adapters` has added one: a user's network may have adapters of its own.
_MARK = "_has_added_adapter"

#: Layers without an adapter, in errors.
_WITHOUT = (
    "Layers with groups, dilation or another padding than zeros, shared layers, and those whose weights the network"
    " reads without calling them have none."
)

ALL_LINEAR = "all-linear"
"""Value of `target_modules`: all linear layers."""


@dataclass(frozen=True)
class LoraOptions:
    r"""Adapters of the private model, with the names of `peft.LoraConfig`.

    A layer with frozen weight W computes $(W + \frac{\alpha}{r} B A) x$, with `lora_alpha` as alpha. B is 0 at first.

    Args:
        r: Rank of the adapters, at least 1.
        lora_alpha: Scale of the adapters, above 0; it is divided by r.
        lora_dropout: Dropout of the inputs of the adapters, in [0, 1).
        target_modules: Linear and convolutional layers with an adapter: ends of their names, as in [conv1, conv2]; or
            a regular expression of whole names; or all-linear. null is all of them but the heads.
        modules_to_save: Further modules that are trained in full, by the ends of their names, such as norms. The last
            linear layer, and with exits all heads, are trained in any case. null adds none.

    Raises:
        UserError: If a value is out of range.

    Example:
        >>> LoraOptions(r=0)
        Traceback (most recent call last):
        ...
        fedekd.errors.UserError: client.lora.r: expected a whole number of at least 1, got 0

    Reference:
        Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, ICLR 2022, Eq. 3.
    """

    r: int = 8
    lora_alpha: float = 8.0
    lora_dropout: float = 0.0
    target_modules: Sequence[str] | str | None = None
    modules_to_save: Sequence[str] | None = None

    def __post_init__(self) -> None:
        r, scale, dropout, targets = self.r, self.lora_alpha, self.lora_dropout, self.target_modules
        is_whole = isinstance(r, int) and not isinstance(r, bool)
        require(is_whole and r >= 1, "client.lora.r", "a whole number of at least 1", r)
        require(_is_number(scale) and scale > 0, "client.lora.lora_alpha", "a number above 0", scale)
        is_rate = _is_number(dropout) and 0 <= dropout < 1
        require(is_rate, "client.lora.lora_dropout", "a number in [0, 1)", dropout)
        allowed = "at least one name, a regular expression, all-linear or null"
        is_valid = targets is None or (isinstance(targets, str | Sequence) and len(targets) > 0)
        require(is_valid, "client.lora.target_modules", allowed, targets)
        if isinstance(targets, str):
            try:
                re.compile(targets)
            except re.error as error:
                require(False, "client.lora.target_modules", "a regular expression", targets, f"It has {error}")
        saved = self.modules_to_save
        is_list = saved is None or (isinstance(saved, Sequence) and not isinstance(saved, str))
        require(is_list, "client.lora.modules_to_save", "a list of names, or null", self.modules_to_save)

    @classmethod
    def of(cls, values: LoraOptions | Mapping[str, Any]) -> LoraOptions:
        """Return options from plain values.

        Raises:
            UserError: If a name is unknown, or a value is out of range.
        """
        if isinstance(values, LoraOptions):
            return values
        names = [field.name for field in fields(cls)]
        is_known = isinstance(values, Mapping) and values.keys() <= set(names)
        require(is_known, "client.lora", f"a mapping of {', '.join(names)}, or null", values)
        return cls(**values)


def add_adapters(network: nn.Module, options: LoraOptions, input_shape: Sequence[int]) -> None:
    """Add adapters to layers of a network, and freeze all but them and the heads.

    Layers with groups, dilation or another padding than zeros, layers that are used in several places or share weights,
    and layers with hooks, whose adapters cannot be merged, have none; nor have layers whose weights the network reads
    without calling them, as in `nn.MultiheadAttention`. Initial adapters come from torch's global generator.

    Args:
        network: The network on the CPU; it is changed.
        options: Options of the adapters.
        input_shape: Channels, height and width of an image, or number of features.

    Raises:
        UserError: If peft is not installed, no layer can have an adapter, or a name matches none.
    """
    peft = _import_peft()
    named = dict(network.named_modules())
    kind = type(getattr(network, "backbone", network)).__name__
    has_adapters = any(hasattr(part, "lora_A") for part in network.modules())
    require(not has_adapters, "client.lora", "null for a network with adapters of its own", kind)
    heads = ["heads"] if isinstance(network, MultiExitNetwork) else [name[:-1] for name in head_prefixes(network)]
    saved = _matching(list(named), options.modules_to_save or (), "modules_to_save", kind)
    kept = tuple(f"{name}." for name in (*heads, *saved))
    layers = [name for name in _called_layers(network, input_shape) if not f"{name}.".startswith(kept)]
    require(
        bool(layers),
        "client.lora",
        "a network with linear or convolutional layers besides its head",
        kind,
        _WITHOUT,
    )
    targets = _targets(layers, named, options.target_modules, kind)
    config = peft.LoraConfig(
        r=options.r,
        lora_alpha=options.lora_alpha,
        lora_dropout=options.lora_dropout,
        target_modules="|".join(map(re.escape, targets)),
    )
    _inject(peft, config, network, kept)


def _inject(peft: Any, config: Any, network: nn.Module, kept: tuple[str, ...]) -> None:
    """Add the adapters, and freeze all but them and the parameters of `kept`."""
    before = {id(parameter): parameter.requires_grad for parameter in network.parameters()}
    peft.inject_adapter_in_model(config, network)
    vars(network).pop("peft_config", None)  # of peft's own functions
    for part in network.modules():
        if hasattr(part, "lora_A"):
            setattr(part, _MARK, True)
    frozen = set()
    for name, parameter in network.named_parameters():
        if id(parameter) in before:
            parameter.requires_grad_(before[id(parameter)])  # peft freezes the heads, too
            if not name.startswith(kept):
                frozen.add(id(parameter))
    freeze_parameters(network, frozen)


def _import_peft() -> Any:
    try:
        return import_module("peft")
    except ImportError as error:
        raise UserError(
            "client.lora: expected the package peft, which is not installed. Install it by: pip install 'fedekd[lora]'"
        ) from error


def _targets(
    layers: list[str], named: Mapping[str, nn.Module], patterns: Sequence[str] | str | None, kind: str
) -> list[str]:
    """Return the names of the layers that get an adapter.

    Raises:
        UserError: If a pattern matches none.
    """
    if patterns is None:
        return layers
    if not isinstance(patterns, str):
        return _matching(layers, patterns, "target_modules", kind)
    if patterns == ALL_LINEAR:
        targets = [name for name in layers if isinstance(named[name], nn.Linear)]
    else:
        targets = [name for name in layers if re.fullmatch(patterns, name)]
    hint = f"Its layers are {listed(layers)}"
    require(bool(targets), "client.lora.target_modules", f"a pattern of layers of {kind}", patterns, hint)
    return targets


def _matching(names: list[str], ends: Sequence[str], option: str, kind: str) -> list[str]:
    """Return the names that end in one of the given names.

    Raises:
        UserError: If one of them matches none.
    """
    matches = {end: [name for name in names if f".{name}".endswith(f".{end}")] for end in ends}
    for end in ends:
        what = "layers" if option == "target_modules" else "modules"
        hint = f"Its {what} are {listed([name for name in names if name])}"
        require(bool(end and matches[end]), f"client.lora.{option}", f"names of {what} of {kind}", end, hint)
    chosen = {name for group in matches.values() for name in group}
    return [name for name in names if name in chosen]


def _called_layers(network: nn.Module, input_shape: Sequence[int]) -> list[str]:
    """Return the names of the layers that can have an adapter, in order."""
    places = Counter(id(part) for _, part in network.named_modules(remove_duplicate=False))
    places += Counter(id(parameter) for _, parameter in network.named_parameters(remove_duplicate=False))
    named = {name: part for name, part in network.named_modules() if _can_adapt(part) and _is_single(part, places)}
    called = set[str]()

    def recorded(name: str, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def record(*inputs: Tensor) -> Tensor:
            called.add(name)
            return forward(*inputs)

        return record

    try:
        for name, part in named.items():
            part.forward = recorded(name, part.forward)  # with a hook, torch's attention has no fast path
        with isolated_rng(0), eval_mode(network), torch.no_grad():
            network(torch.zeros(2, *input_shape))
    except Exception:  # `check_model` explains what the network does not accept
        return list(named)
    finally:
        for part in named.values():
            vars(part).pop("forward", None)
    return [name for name in named if name in called]


def _is_single(part: nn.Module, places: Counter[int]) -> bool:
    """Return True for a layer that is in one place, as are its weights.

    Args:
        part: The layer.
        places: Number of places of each module and parameter, by `id`.
    """
    return all(places[id(item)] == 1 for item in (part, *part.parameters()))


def _can_adapt(part: nn.Module) -> bool:
    """Return True for a layer whose adapter is a layer of the same kind."""
    if type(part) not in _LAYERS or "forward" in vars(part) or part._forward_pre_hooks or part._forward_hooks:
        return False
    if isinstance(part, nn.Linear):
        return True
    settings: Any = part
    is_plain = settings.padding_mode == "zeros" and settings.groups == 1
    return is_plain and all(step == 1 for step in settings.dilation)


def merged(network: nn.Module) -> nn.Module:
    """Return a network with the adapters of `add_adapters` merged into its weights.

    Args:
        network: Any network; it is not changed.

    Returns:
        A copy without adapters, with the names of tensors of the plain network; the network itself if it has none.

    Raises:
        UserError: If an adapter is not finite.
    """
    if not any(_is_adapted(part) for part in network.modules()):
        return network
    network = copy.deepcopy(network)
    for name, part in [*network.named_modules()]:
        if _is_adapted(part):
            layer: Any = part
            try:
                if not layer.merged:
                    layer.merge(safe_merge=True)
            except ValueError as error:  # of peft
                raise UserError(f"client.lora: expected finite adapters, got NaN or infinity in {name}") from error
            parent, _, attribute = name.rpartition(".")
            setattr(network.get_submodule(parent), attribute, layer.get_base_layer())
    return network


def _is_adapted(part: nn.Module) -> bool:
    return getattr(part, _MARK, False)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
