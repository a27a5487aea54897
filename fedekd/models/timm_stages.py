"""Split a network of timm at the modules of its `feature_info`; check the result.

timm itself is not imported: the networks have all that is needed.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fedekd.errors import UserError, describe_error, shorten
from fedekd.global_state import isolated_rng
from fedekd.models.multi_exit import Layout
from fedekd.models.stage_split import Stages, StageSplit, equal_groups, merge_deepest, take_out

_MIN_REDUCTION = 4  # features at a stride of 2 belong to the stem of most networks
_VIT_EXITS = 4
_TOLERANCE = 1e-9  # in float64, relative to the largest output


class _CannotSplitError(Exception):
    """Raised with the reason why a network is not a sequence of modules."""


class _Stem(nn.Module):
    """First step: `forward_features` of a network without its later modules."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.network.forward_features(x)  # type: ignore[operator]
        return features


class _Pooling(nn.Module):
    """Last step: `forward_head` of a network, with pooling, dropout and linear layer."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.network.forward_head(x)  # type: ignore[operator]
        return output


@dataclass(frozen=True)
class _Recipe:
    """Where a network is split.

    Attributes:
        called: Paths of modules in the order in which `forward_features` calls them.
        ends: Number of modules up to the end of each stage.
        is_isotropic: True if all stages have the same resolution, as in transformers.
        layout: Layout of the outputs of the stages; None infers it.
        image_size: Size of images that the network accepts.
    """

    called: list[str]
    ends: list[int]
    is_isotropic: bool
    layout: Layout | None
    image_size: tuple[int, int]

    def stages(self, network: nn.Module) -> Stages:
        """Return the stages of a network, which share its modules."""
        within = {path.partition(".")[0] for path in self.called}
        of_head = {name for name, _ in network.named_children() if name not in within}
        modules = [network.get_submodule(path) for path in self.called]
        bounds = [*self.ends[:-1], len(modules)]
        stages: Stages = [[_Stem(_without(network, {*self.called[bounds[0] :], *of_head}))]]
        stages += [modules[start:stop] for start, stop in pairwise(bounds)]
        pooling = _without(network, within)
        pooling._parameters, pooling._buffers = {}, {}  # class token and position embedding belong to the stem
        stages[-1].append(_Pooling(pooling))
        return stages


def is_of_timm(network: nn.Module) -> bool:
    """Return whether a network's class is one of timm."""
    return type(network).__module__.partition(".")[0] == "timm"


def split_timm(network: Any) -> StageSplit:
    """Split a network of timm into stages whose composition is the network.

    The stages end at the modules of `feature_info` with a reduction of at least 4. This is checked on a copy in
    float64, with random norms and biases, in evaluation and in training mode.

    Args:
        network: A network whose class is one of timm. It is not modified.

    Raises:
        UserError: If the outputs of network and stages differ, as in a network with several branches, or its
            classifier is not a linear layer.
    """
    key = _architecture(network)
    try:
        if key not in _recipes:  # a check takes seconds, and clients build equal networks
            probe = _Probe.of(network)
            recipe = _recipe(probe)
            _check(probe, recipe)
            _recipes[key] = recipe
    except Exception as error:  # any network of timm, with any layers
        is_known = isinstance(error, _CannotSplitError)
        reason = str(error) if is_known else f"its modules cannot be called in sequence ({describe_error(error, 80)})"
        raise UserError(
            f"model: expected a network of timm that is a sequence of modules to add exits, got {_name(network)}:"
            f" {reason}. Pass its stages as split=[...]"
        ) from error
    recipe, head = _recipes[key], network.get_classifier()
    return StageSplit(
        recipe.stages(network),
        equal_groups if recipe.is_isotropic else merge_deepest,
        min(_VIT_EXITS, len(recipe.ends)) if recipe.is_isotropic else None,
        recipe.layout,
        recipe.image_size,
        head if isinstance(head, nn.Linear) else None,
    )


def _name(network: nn.Module) -> str:
    architecture = (getattr(network, "pretrained_cfg", None) or {}).get("architecture", "")
    return shorten(f"{architecture} ({type(network).__name__})" if architecture else type(network).__name__)


#: Checked recipes of this process, by architecture.
_recipes: dict[str, _Recipe] = {}


def _architecture(network: nn.Module) -> str:
    """Return a text that is equal for equal modules, shapes and settings."""
    plain = {
        name: value for name, value in vars(network).items() if isinstance(value, bool | int | float | str | tuple)
    }
    settings = {name: value for name, value in plain.items() if name != "training"}
    shapes = [(name, tuple(tensor.shape)) for name, tensor in network.state_dict().items()]
    return f"{type(network)} {settings} {_fixed_size(network)} {shapes} {network!r}"


def _fixed_size(network: Any) -> Any:
    return getattr(getattr(network, "patch_embed", None), "img_size", None)


class _Probe(NamedTuple):
    """Copy of a network in float64 on the CPU, with its outputs for two images.

    Attributes:
        network: The copy.
        images: Images of a size that the network accepts.
        outputs: Outputs in training mode, and then, with the statistics of that pass, in evaluation mode.
    """

    network: Any
    images: Tensor
    outputs: dict[bool, Tensor]

    @classmethod
    def of(cls, network: nn.Module) -> _Probe:
        """Copy a network and run it.

        Raises:
            _CannotSplitError: If it accepts none of the sizes that are tried.
        """
        probe = copy.deepcopy(network).to("cpu", torch.float64)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in probe.parameters():  # zero-initialised branches and small scales would hide a mistake
                if parameter.ndim <= 1 or not parameter.any():
                    parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype), alpha=0.3)
        fixed = _fixed_size(network)
        given = (getattr(network, "pretrained_cfg", None) or {}).get("input_size", (3, 224, 224))[1:]
        channels = next(part.in_channels for part in network.modules() if isinstance(part, nn.Conv2d))
        for size in [fixed] if fixed else [(48, 32), (64, 64), given]:
            images = torch.randn(2, channels, *size, generator=generator, dtype=torch.float64)
            try:
                return cls(probe, images, {training: _run(probe, images, training) for training in (True, False)})
            except Exception as error:  # images of another size than those for which the network was built
                reason = describe_error(error)
        raise _CannotSplitError(f"it fails on images of {size[0]} x {size[1]}: {reason}")


def _run(network: nn.Module, images: Tensor, training: bool) -> Tensor:
    with isolated_rng(0), torch.no_grad():  # equal draws of dropout
        output: Tensor = network.train(training)(images)
    return output


def _recipe(probe: _Probe) -> _Recipe:
    """Find the modules after which a network is split.

    Raises:
        _CannotSplitError: If there are fewer than two, or the classifier is not one linear layer.
    """
    network = probe.network
    classifier = network.get_classifier()
    if not isinstance(classifier, nn.Linear | nn.Identity):
        raise _CannotSplitError(f"its classifier is not one linear layer but a {type(classifier).__name__}")
    reductions = {info["module"]: info["reduction"] for info in network.feature_info}
    called: dict[str, Tensor] = {}

    def record(_part: nn.Module, _given: Any, output: Tensor, path: str) -> None:
        called[path] = output

    parts = _parts(network, "", reductions)
    handles = [part.register_forward_hook(partial(record, path=path)) for path, part in parts]
    with torch.no_grad():
        network.eval().forward_features(probe.images)
    for handle in handles:
        handle.remove()
    names = [*called]
    ends = [number for number, path in enumerate(names, 1) if reductions.get(path, 0) >= _MIN_REDUCTION]
    if len(ends) < 2:
        raise _CannotSplitError("its feature_info names fewer than two modules that are called in sequence")
    is_isotropic = len({reductions[names[end - 1]] for end in ends}) == 1
    layout = _layout(network, called[names[ends[0] - 1]])
    return _Recipe(names, ends, is_isotropic, layout, (probe.images.shape[-2], probe.images.shape[-1]))


def _parts(module: nn.Module, prefix: str, features: Iterable[str]) -> Iterator[tuple[str, nn.Module]]:
    """Yield submodules; those that contain a module of `features` by their parts."""
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if any(feature.startswith(f"{path}.") for feature in features):
            yield from _parts(child, f"{path}.", features)
        else:
            yield path, child


def _layout(network: Any, output: Tensor) -> Layout | None:
    if output.ndim == 4:
        return "nhwc" if str(getattr(network, "output_fmt", "")) == "NHWC" else None
    has_class_token = getattr(network, "num_prefix_tokens", 0) > 0 and network.global_pool == "token"
    return "tokens" if has_class_token else "patches"


def _check(probe: _Probe, recipe: _Recipe) -> None:
    """Compare a network with its classifier after the composition of its stages.

    Raises:
        _CannotSplitError: If their outputs differ in one of the modes.
    """
    head = probe.network.get_classifier()
    stages = nn.Sequential(*(module for stage in recipe.stages(probe.network) for module in stage))
    take_out(head, stages)
    for training in (False, True):  # the second pass changes the statistics of BatchNorm
        expected = probe.outputs[training]
        actual = _run(nn.Sequential(stages, head), probe.images, training)
        error = (actual - expected).abs().max() if actual.shape == expected.shape else torch.inf
        if not error <= _TOLERANCE * expected.abs().max():
            raise _CannotSplitError("the composition of its modules has other outputs")


def _without(module: nn.Module, paths: set[str], prefix: str = "") -> nn.Module:
    """Return a copy with identities at the paths, and all other submodules shared."""
    part = copy.copy(module)
    part._parameters, part._buffers = dict(module._parameters), dict(module._buffers)
    part._modules = {}
    for name, child in module._modules.items():
        path = f"{prefix}{name}"
        if child is not None and path in paths:
            child = nn.Identity()
        elif child is not None and any(other.startswith(f"{path}.") for other in paths):
            child = _without(child, paths, f"{path}.")
        part._modules[name] = child
    return part
