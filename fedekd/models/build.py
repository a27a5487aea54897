"""Build and check models by class path."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
from torch import nn

from fedekd.errors import UserError, nearest, shorten
from fedekd.models.cnn import height_and_width
from fedekd.models.image_classifier import ImageClassifier


def build_model(
    spec: Any,
    *,
    in_channels: int,
    image_size: int | Sequence[int],
    num_classes: int,
    flag: str = "model",
) -> nn.Module:
    """Build a model for images of the given channels and size.

    `in_channels`, `image_size` and `num_classes` are passed if the model's signature has them; a function with
    `**kwargs`, as in torchvision, gets `num_classes`. A model without `in_channels` is wrapped in `ImageClassifier`.
    Initial weights come from torch's global generator; seed it before the call.

    Args:
        spec: A class path (`torchvision.models.resnet18`) or the bare name of a model of `fedekd.models`;
            or a mapping or object with `class_path` and optionally `init_args`.
        in_channels: Channels of an image.
        image_size: Height and width of an image; a single number is a square.
        num_classes: Number of classes; 1 for regression.
        flag: Name of the option in errors.

    Returns:
        A new model, on the CPU.

    Raises:
        UserError: If there is no such model, its arguments are invalid, or `init_args` contradict the data.

    Example:
        >>> model = build_model("ProxyCNN", in_channels=1, image_size=28, num_classes=10)
        >>> type(model).__name__, model.head.out_features
        ('ProxyCNN', 10)
    """
    class_path, init_args = _parse(spec, flag)
    factory = _locate(class_path, flag)
    data_args = {"in_channels": in_channels, "image_size": image_size, "num_classes": num_classes}
    for name in data_args.keys() & init_args.keys():
        if not _same(name, init_args[name], data_args[name]):
            raise UserError(f"{flag}: expected {name} {data_args[name]} as in the data, got {init_args[name]}. Omit it")
    parameters = inspect.signature(factory).parameters
    accepted = data_args.keys() & parameters.keys()
    extra: dict[str, Any] = {}
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        accepted |= {"num_classes"}
        extra = _torchvision_arguments(factory, height_and_width(image_size))
    try:
        model = factory(**{**extra, **{name: data_args[name] for name in accepted}, **init_args})
        if isinstance(model, nn.Module) and "in_channels" not in parameters:
            model = ImageClassifier(model, num_classes=num_classes, in_channels=in_channels)
    except (TypeError, ValueError, KeyError, AssertionError, RuntimeError, OSError) as error:
        raise UserError(f"{flag} '{class_path}': {_one_line(error)}") from error
    if not isinstance(model, nn.Module):
        raise UserError(f"{flag}: expected a torch.nn.Module from '{class_path}', got a {type(model).__name__}")
    return model


def check_model(
    model: nn.Module, *, in_channels: int, image_size: int | Sequence[int], num_outputs: int, flag: str = "model"
) -> None:
    """Check the output shape of a model on two black images, before training.

    Its mode and its buffers are not changed.

    Args:
        model: Model on any device, in any floating-point type.
        in_channels: Channels of an image.
        image_size: Height and width of an image; a single number is a square.
        num_outputs: Number of classes; 1 for regression.
        flag: Name of the option in errors.

    Raises:
        UserError: If the model fails, or an output (of any exit) is not a tensor (2, num_outputs).

    Example:
        >>> check_model(nn.Flatten(), in_channels=1, image_size=8, num_outputs=64)
        >>> check_model(nn.Flatten(), in_channels=1, image_size=8, num_outputs=10)
        Traceback (most recent call last):
        ...
        fedekd.errors.UserError: model Flatten: expected output (2, 10) for 2 images, got (2, 64)
    """
    height, width = height_and_width(image_size)
    like = next((parameter for parameter in model.parameters() if parameter.is_floating_point()), torch.empty(0))
    images = torch.zeros(2, in_channels, height, width, device=like.device, dtype=like.dtype)
    name = type(getattr(model, "backbone", model)).__name__
    try:
        with eval_mode(model), torch.no_grad():
            output = model(images)
    except Exception as error:  # a user's model may raise anything
        shape = f"{in_channels} x {height} x {width}"
        raise UserError(
            f"{flag} {name}: expected to accept images of {shape}. It failed: {_one_line(error)}"
        ) from error
    for logits in output if isinstance(output, list | tuple) else [output]:
        if not isinstance(logits, torch.Tensor) or logits.shape != (2, num_outputs):
            actual = tuple(logits.shape) if isinstance(logits, torch.Tensor) else f"a {type(logits).__name__}"
            raise UserError(f"{flag} {name}: expected output {(2, num_outputs)} for 2 images, got {actual}")


@contextmanager
def eval_mode(network: nn.Module) -> Iterator[None]:
    """Context manager: eval mode; restores each module's previous mode on exit."""
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
    """Return the `**kwargs` that some of torchvision's builders require."""
    package, _, family = factory.__module__.rpartition(".")
    if package != "torchvision.models":
        return {}
    # With auxiliary heads the training output would be a tuple.
    plain: dict[str, Any] = {"aux_logits": False, "init_weights": True}
    extra: dict[str, dict[str, Any]] = {
        "vision_transformer": {"image_size": size[0]},
        "maxvit": {"input_size": size},
        "googlenet": plain,
        "inception": plain,
    }
    return extra.get(family, {})


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _parse(spec: Any, flag: str) -> tuple[str, dict[str, Any]]:
    if isinstance(spec, str):
        return spec, {}
    fields = _as_dict(spec)
    class_path = fields.get("class_path")
    if not isinstance(class_path, str):
        raise UserError(f"{flag}: expected a class path, or class_path and init_args, got {spec!r}")
    return class_path, _as_dict(fields.get("init_args") or {})


def _as_dict(fields: Any) -> dict[str, Any]:
    return dict(fields) if isinstance(fields, Mapping) else dict(getattr(fields, "__dict__", {}))


def _locate(class_path: str, flag: str) -> Callable[..., Any]:
    module_name, _, name = class_path.rpartition(".")
    try:
        module = import_module(module_name or "fedekd.models")
    except (ImportError, TypeError, ValueError) as error:  # the last two: a relative path, an empty part
        raise UserError(f"{flag}: expected an importable model, got {shorten(repr(class_path))}. {error}") from error
    factory = getattr(module, name, None)
    if callable(factory):
        return factory  # type: ignore[no-any-return]
    names = [known for known in dir(module) if not known.startswith("_") and callable(getattr(module, known))]
    if not module_name:
        names = [known for known in names if _is_model(getattr(module, known))]
    raise UserError(f"{flag}: expected a model of {module.__name__}, got {shorten(repr(name))}. {nearest(name, names)}")


def _is_model(candidate: Any) -> bool:
    if not (isinstance(candidate, type) and issubclass(candidate, nn.Module)):
        return False
    parameters = inspect.signature(candidate).parameters.items()
    required = {name for name, parameter in parameters if parameter.default is parameter.empty}
    return required <= {"in_channels", "image_size", "num_classes"}  # a layer requires more than these


def _same(name: str, value: Any, data_value: Any) -> bool:
    equal = height_and_width(value) == height_and_width(data_value) if name == "image_size" else value == data_value
    return bool(equal)
