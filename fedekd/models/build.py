"""Models by name: a class of this package, of torchvision, or of the user's own."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
from torch import nn

from fedekd.errors import UserError, nearest
from fedekd.models.cnn import height_and_width
from fedekd.models.image_classifier import ImageClassifier

_LONGEST_HINT = 200  # torchvision.models has 200 names: no help in one line of an error


def build_model(
    spec: Any,
    *,
    in_channels: int,
    image_size: int | Sequence[int],
    num_classes: int,
    flag: str = "model",
) -> nn.Module:
    """Build a model for images of the given channels and size.

    What the data decide (the three numbers) is passed on as far as the model's signature takes it; a
    function that takes `**kwargs`, as torchvision's do, is given `num_classes`. A model without an
    `in_channels` of its own is wrapped in `ImageClassifier`. Nothing is seeded here: the initial weights
    come from torch's global generator, so the caller seeds it first.

    Args:
        spec: A class path (`torchvision.models.resnet18`) or the bare name of a model of `fedekd.models`;
            or a mapping, or an object, with `class_path` and optionally `init_args`.
        in_channels: Channels of an image.
        image_size: Height and width of an image; a single number is a square.
        num_classes: Outputs: the number of classes, or 1 for regression.
        flag: What to call `spec` in an error.

    Returns:
        A new model, on the CPU.

    Raises:
        UserError: There is no such model, its arguments are wrong, or `init_args` contradict the data.

    Example:
        >>> model = build_model("ProxyCNN", in_channels=1, image_size=28, num_classes=10)
        >>> type(model).__name__, model.head.out_features
        ('ProxyCNN', 10)
    """
    class_path, init_args = _parse(spec, flag)
    factory = _locate(class_path, flag)
    facts = {"in_channels": in_channels, "image_size": image_size, "num_classes": num_classes}
    for name in facts.keys() & init_args.keys():
        if not _same(name, init_args[name], facts[name]):
            raise UserError(f"{flag}: {name} is {init_args[name]}, but the data have {facts[name]}; leave it out")
    parameters = inspect.signature(factory).parameters
    taken = facts.keys() & parameters.keys()
    hidden: dict[str, Any] = {}
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        taken |= {"num_classes"}
        hidden = _torchvision_arguments(factory, height_and_width(image_size))
    try:
        model = factory(**{**hidden, **{name: facts[name] for name in taken}, **init_args})
        if isinstance(model, nn.Module) and "in_channels" not in parameters:
            model = ImageClassifier(model, num_classes=num_classes, in_channels=in_channels)
    except (TypeError, ValueError, KeyError, AssertionError, RuntimeError, OSError) as error:
        raise UserError(f"{flag} '{class_path}': {_said(error)}") from error
    if not isinstance(model, nn.Module):
        raise UserError(f"{flag} '{class_path}' gives a {type(model).__name__}, not a torch.nn.Module")
    return model


def check_model(
    model: nn.Module, *, in_channels: int, image_size: int | Sequence[int], num_outputs: int, flag: str = "model"
) -> None:
    """See a model answer two black images: what does not fit is told before anything is trained.

    Its mode (training or evaluation) and its buffers stay what they were.

    Args:
        model: On any device, in any floating-point type.
        in_channels: Channels of an image.
        image_size: Height and width of an image; a single number is a square.
        num_outputs: Classes, or 1 for regression.
        flag: What to call the model in an error.

    Raises:
        UserError: The model fails, or its output (each one, if it gives several) is no tensor (2, num_outputs).

    Example:
        >>> check_model(nn.Flatten(), in_channels=1, image_size=8, num_outputs=64)
        >>> check_model(nn.Flatten(), in_channels=1, image_size=8, num_outputs=10)
        Traceback (most recent call last):
        ...
        fedekd.errors.UserError: model Flatten gives (2, 64) for 2 images; (2, 10) is needed
    """
    height, width = height_and_width(image_size)
    like = next((parameter for parameter in model.parameters() if parameter.is_floating_point()), torch.empty(0))
    images = torch.zeros(2, in_channels, height, width, device=like.device, dtype=like.dtype)
    name = type(getattr(model, "backbone", model)).__name__
    try:
        with eval_mode(model), torch.no_grad():
            output = model(images)
    except Exception as error:  # a model of one's own may fail in any way
        shape = f"{in_channels} x {height} x {width}"
        raise UserError(f"{flag} {name} cannot take images of {shape}: {_said(error)}") from error
    for each in output if isinstance(output, list | tuple) else [output]:
        if not isinstance(each, torch.Tensor) or each.shape != (2, num_outputs):
            given = tuple(each.shape) if isinstance(each, torch.Tensor) else f"a {type(each).__name__}"
            raise UserError(f"{flag} {name} gives {given} for 2 images; {(2, num_outputs)} is needed")


@contextmanager
def eval_mode(network: nn.Module) -> Iterator[None]:
    """Context manager: set the network to eval mode, and restore each module's previous mode on exit."""
    modes = [(module, module.training) for module in network.modules()]
    if not any(training for _, training in modes):
        yield
        return
    network.eval()
    try:
        yield
    finally:
        if modes[0][1]:
            network.train()  # a user's network may override train()
        for module, training in modes:
            module.training = training


def _torchvision_arguments(factory: Callable[..., Any], size: tuple[int, int]) -> dict[str, Any]:
    """What some of torchvision's builders must be told through their `**kwargs`."""
    package, _, family = factory.__module__.rpartition(".")
    if package != "torchvision.models":
        return {}
    # Auxiliary heads would make the training output a tuple.
    plain: dict[str, Any] = {"aux_logits": False, "init_weights": True}
    hidden: dict[str, dict[str, Any]] = {
        "vision_transformer": {"image_size": size[0]},
        "maxvit": {"input_size": size},
        "googlenet": plain,
        "inception": plain,
    }
    return hidden.get(family, {})


def _said(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _parse(spec: Any, flag: str) -> tuple[str, dict[str, Any]]:
    if isinstance(spec, str):
        return spec, {}
    fields = _as_dict(spec)
    class_path = fields.get("class_path")
    if not isinstance(class_path, str):
        raise UserError(f"{flag} must be a class path, or have a class_path and init_args, but is {spec!r}")
    return class_path, _as_dict(fields.get("init_args") or {})


def _as_dict(fields: Any) -> dict[str, Any]:
    return dict(fields) if isinstance(fields, Mapping) else dict(getattr(fields, "__dict__", {}))


def _locate(class_path: str, flag: str) -> Callable[..., Any]:
    module_name, _, name = class_path.rpartition(".")
    try:
        module = import_module(module_name or "fedekd.models")
    except (ImportError, TypeError, ValueError) as error:  # the last two: a relative path, an empty part
        raise UserError(f"{flag} '{class_path}' cannot be imported: {error}") from error
    factory = getattr(module, name, None)
    if callable(factory):
        return factory  # type: ignore[no-any-return]
    names = [known for known in dir(module) if not known.startswith("_") and callable(getattr(module, known))]
    if not module_name:
        names = [known for known in names if _is_model(getattr(module, known))]
    hint = nearest(name, names)
    shown = f"; {hint}" if len(hint) <= _LONGEST_HINT else ""
    raise UserError(f"{flag} '{class_path}': {module.__name__} has no '{name}'{shown}")


def _is_model(candidate: Any) -> bool:
    if not (isinstance(candidate, type) and issubclass(candidate, nn.Module)):
        return False
    needed = {name for name, fact in inspect.signature(candidate).parameters.items() if fact.default is fact.empty}
    return needed <= {"in_channels", "image_size", "num_classes"}  # a part of a network needs more than the data


def _same(name: str, given: Any, fact: Any) -> bool:
    return bool(height_and_width(given) == height_and_width(fact) if name == "image_size" else given == fact)
