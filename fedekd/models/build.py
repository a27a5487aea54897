"""Build and check models by class path."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from fedekd.errors import UserError, describe_error, nearest, shorten
from fedekd.global_state import isolated_rng
from fedekd.models.cnn import height_and_width
from fedekd.models.image_classifier import ImageClassifier
from fedekd.models.pretrained import build_pretrained, has_pretrained_weights


def build_model(
    spec: Any,
    *,
    input_shape: Sequence[int],
    num_classes: int,
    flag: str = "model",
    replaces_head: bool = False,
) -> nn.Module:
    """Build a model for images or features of the given shape.

    For images `in_channels`, `image_size` and `num_classes` are passed if the model's signature has them; a function
    with `**kwargs`, as in torchvision, gets `num_classes`; one of timm also gets `in_chans`, and `img_size` if the
    network is for images of one size. A model without `in_channels` is wrapped in `ImageClassifier`. For features
    `in_features` and `num_classes` are passed. A model whose output is a mapping or an object with `logits`, as in
    Hugging Face, returns its logits only. Initial weights come from torch's global generator; seed it before the call.

    Args:
        spec: A class path (`torchvision.models.resnet18`) or the bare name of a model of `fedekd.models`;
            or a mapping or object with `class_path` and optionally `init_args` and `dict_kwargs`, as in jsonargparse:
            arguments that the signature names, and others.
        input_shape: Channels, height and width of an image, or number of features.
        num_classes: Number of classes; 1 for regression.
        flag: Name of the option in errors.
        replaces_head: For a model of torchvision with `weights` of other classes, replace its last linear layer by a
            new one; False is an error then. The weights are read once per process.

    Returns:
        A new model, on the CPU.

    Raises:
        UserError: If there is no such model, its arguments are invalid, or `init_args` contradict the data.

    Example:
        >>> model = build_model("ProxyCNN", input_shape=(1, 28, 28), num_classes=10)
        >>> type(model).__name__, model.head.out_features
        ('ProxyCNN', 10)
    """
    class_path, init_args = parse_model(spec, flag)
    factory = _locate(class_path, flag)
    is_image = len(input_shape) == 3
    parameters = inspect.signature(factory).parameters
    _require_kind(factory, parameters, is_image, flag)
    data_args: dict[str, Any] = {"num_classes": num_classes}
    if is_image:
        data_args |= {"in_channels": input_shape[0], "image_size": tuple(input_shape[1:])}
    else:
        data_args |= {"in_features": input_shape[0]}
    for name in data_args.keys() & init_args.keys():
        if not _same(name, init_args[name], data_args[name]):
            raise UserError(f"{flag}: expected {name} {data_args[name]} as in the data, got {init_args[name]}. Omit it")
    accepted = data_args.keys() & parameters.keys()
    extra: dict[str, Any] = {}
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        accepted |= {"num_classes"}
        extra = _package_arguments(factory, init_args, input_shape) if is_image else {}
    arguments = {**extra, **{name: data_args[name] for name in accepted}, **init_args}
    # timm's builders adapt the last layer themselves.
    is_replaced = replaces_head and class_path.startswith("torchvision.")
    is_replaced = is_replaced and has_pretrained_weights(class_path, init_args)
    try:
        model = build_pretrained(factory, arguments, num_classes) if is_replaced else factory(**arguments)
        if isinstance(model, nn.Module):
            _return_logits(model)
        if isinstance(model, nn.Module) and is_image and "in_channels" not in parameters:
            _require_plain_tensors(model)
            repeat = "in_chans" not in extra
            model = ImageClassifier(model, num_classes=num_classes, in_channels=input_shape[0], repeat=repeat)
    except UserError as error:
        raise UserError(f"{flag} '{class_path}': {error}") from error
    except Exception as error:  # a user's constructor may raise anything
        raise UserError(f"{flag} '{class_path}': {describe_error(error)}") from error
    return _checked(model, class_path, flag)


def _checked(model: Any, class_path: str, flag: str) -> nn.Module:
    """Check what a builder returned.

    Raises:
        UserError: If it is not a module whose parameters and buffers can be averaged.
    """
    if not isinstance(model, nn.Module):
        raise UserError(f"{flag}: expected a torch.nn.Module from '{class_path}', got a {type(model).__name__}")
    try:
        _require_plain_tensors(model)
    except UserError as error:
        raise UserError(f"{flag} '{class_path}': {error}") from error
    return model


def _return_logits(model: nn.Module) -> None:
    """Let a user's model return the logits of an output that has more."""
    if type(model).__module__.partition(".")[0] not in ("fedekd", "torchvision", "timm"):
        model.register_forward_hook(_logits_of)


def _logits_of(model: nn.Module, inputs: Any, output: Any) -> Any:
    """Return the logits of a mapping or object; None leaves the output unchanged."""
    if isinstance(output, torch.Tensor):
        return None
    return output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)


def _require_kind(factory: Callable[..., Any], parameters: Mapping[str, Any], is_image: bool, flag: str) -> None:
    """Check that a model is not one of images for a table, or the reverse.

    Raises:
        UserError: If it is; the message has the models to choose.
    """
    module = getattr(factory, "__module__", None) or ""
    of_images = "in_channels" in parameters or module.partition(".")[0] in ("torchvision", "timm")
    of_features = "in_features" in parameters and not of_images
    if of_features if is_image else of_images:
        kinds = ("images", "a table", "PrivateCNN", "ProxyCNN") if is_image else ("a table", "images", "MLP", "MLP")
        raise UserError(
            f"{flag}: expected a model for {kinds[0]}, got {getattr(factory, '__name__', factory)}, a model for"
            f" {kinds[1]}. Set --client.private_model {kinds[2]} --client.proxy_model {kinds[3]}"
        )


def _require_plain_tensors(model: nn.Module) -> None:
    """Check that all parameters and buffers have values that can be averaged.

    Raises:
        UserError: If one is lazy, or on the meta device.
    """
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if is_lazy(tensor):
            raise UserError(f"expected initialised parameters, got the lazy '{name}'. Give its layer the input size")
        if tensor.is_meta:
            raise UserError(f"expected parameters with values, got '{name}' on the meta device")


def check_model(model: nn.Module, *, input_shape: Sequence[int], num_outputs: int, flag: str = "model") -> None:
    """Check a model on two samples of zeros, in training and in evaluation mode.

    Its mode, its buffers and the random generators are not changed.

    Args:
        model: Model on any device, in any floating-point type.
        input_shape: Channels, height and width of an image, or number of features.
        num_outputs: Number of classes; 1 for regression.
        flag: Name of the option in errors.

    Raises:
        UserError: If the model fails or has nothing to train, or its output is not the same number of tensors
            (2, num_outputs) in both modes: one tensor, or a plain list or tuple of one tensor per exit.

    Example:
        >>> check_model(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), input_shape=(1, 8, 8), num_outputs=10)
        >>> check_model(nn.Sequential(nn.Flatten(), nn.Linear(64, 9)), input_shape=(1, 8, 8), num_outputs=10)
        Traceback (most recent call last):
        ...
        fedekd.errors.UserError: model Sequential: expected output (2, 10) for 2 samples, got (2, 9) in evaluation mode
    """
    backbone = getattr(model, "backbone", model)
    name = f"{flag} {type(backbone).__name__}"
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trainable:
        count = sum(1 for _ in model.parameters())
        actual = f"none of {count}: all are frozen (requires_grad is False)" if count else "a model without parameters"
        raise UserError(f"{name}: expected at least one parameter to train, got {actual}")
    like = next((parameter for parameter in trainable if parameter.is_floating_point()), torch.empty(0))
    inputs = torch.zeros(2, *input_shape, device=like.device, dtype=like.dtype)
    auxiliary = f" Set --{flag}.aux_logits false." if getattr(backbone, "aux_logits", False) else ""
    exits = {}
    # A forward pass in training mode changes the statistics of BatchNorm, and draws for dropout.
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        for mode in ("evaluation", "training"):
            hint = auxiliary if mode == "training" else ""
            try:
                with isolated_rng(0, like.device), _mode(model, mode == "training"):
                    output = model(inputs)
            except Exception as error:  # a user's model may raise anything
                what = f"images of {' x '.join(map(str, input_shape))}" if len(input_shape) == 3 else "features"
                raise UserError(
                    f"{name}: expected to accept {what}. It failed in {mode} mode: {describe_error(error)}.{hint}"
                ) from error
            exits[mode] = _require_logits(output, (2, num_outputs), name, mode, hint)
    finally:
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
    if len(exits["training"]) != len(exits["evaluation"]):
        raise UserError(
            f"{name}: expected as many outputs in training as in evaluation mode, got {len(exits['training'])} and"
            f" {len(exits['evaluation'])}.{auxiliary}"
        )
    if not any(logits.requires_grad for logits in exits["training"]):
        raise UserError(f"{name}: expected outputs with a gradient in training mode, got detached ones")
    _require_state_dict(model, name)


def _require_logits(output: Any, shape: tuple[int, int], name: str, mode: str, hint: str) -> list[torch.Tensor]:
    """Return the logits of each exit.

    Raises:
        UserError: If the output is neither one tensor of the shape nor a plain list or tuple of them.
    """
    if not isinstance(output, torch.Tensor) and (type(output) not in (list, tuple) or not output):
        kind = "an empty one" if type(output) in (list, tuple) else f"a {type(output).__name__}"
        hint = hint or (" Return its logits." if hasattr(output, "logits") else "")
        raise UserError(
            f"{name}: expected a tensor {shape} for 2 samples, or a plain list or tuple with one per exit, got {kind}"
            f" in {mode} mode.{hint}"
        )
    exits = [output] if isinstance(output, torch.Tensor) else list(output)
    for logits in exits:
        is_tensor = isinstance(logits, torch.Tensor)
        if not is_tensor or logits.shape != shape or not logits.is_floating_point():
            actual = f"a {type(logits).__name__}"
            if is_tensor:
                actual = str(tuple(logits.shape)) if logits.shape != shape else str(logits.dtype)
            raise UserError(
                f"{name}: expected output {shape} for 2 samples, got {actual} in {mode} mode"
                f"{'.' + hint if hint else ''}"
            )
    return exits


def _require_state_dict(model: nn.Module, name: str) -> None:
    """Check that a model's state consists of tensors, and can be loaded again.

    Raises:
        UserError: If it has other values, or loading it fails.
    """
    state = model.state_dict()
    for key, value in state.items():
        if not isinstance(value, torch.Tensor):
            raise UserError(f"{name}: expected tensors in state_dict(), got a {type(value).__name__} for '{key}'")
    try:
        model.load_state_dict(state)
    except Exception as error:  # from a user's hook
        raise UserError(f"{name}: expected to load its own state_dict(). It failed: {describe_error(error)}") from error


@contextmanager
def eval_mode(network: nn.Module) -> Iterator[None]:
    """Context manager: eval mode; restores each module's previous mode on exit."""
    with _mode(network, training=False):
        yield


@contextmanager
def _mode(network: nn.Module, training: bool) -> Iterator[None]:
    modes = [(module, module.training) for module in network.modules()]
    if all(before == training for _, before in modes):
        yield
        return
    network.train(training)
    try:
        yield
    finally:
        if modes[0][1] != training:
            network.train(modes[0][1])  # a user's network may override train()
        for module, before in modes:
            if module.training != before:
                module.training = before


def _package_arguments(
    factory: Callable[..., Any], init_args: Mapping[str, Any], input_shape: Sequence[int]
) -> dict[str, Any]:
    """Return the `**kwargs` for the data of builders of torchvision and timm."""
    channels, *size = input_shape
    if factory.__module__.partition(".")[0] != "timm":
        return _torchvision_arguments(factory, (size[0], size[1]))
    from timm import get_pretrained_cfg

    configuration = get_pretrained_cfg(init_args.get("model_name", factory.__name__))
    has_fixed_size = configuration is not None and configuration.fixed_input_size
    return {"in_chans": channels, **({"img_size": tuple(size)} if has_fixed_size else {})}


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


def parse_model(spec: Any, flag: str = "model") -> tuple[str, dict[str, Any]]:
    """Return the class path and the arguments of a specification of `build_model`.

    Raises:
        UserError: If it has no class path.
    """
    if isinstance(spec, str):
        return spec, {}
    fields = _as_dict(spec)
    class_path = fields.get("class_path")
    if not isinstance(class_path, str):
        raise UserError(f"{flag}: expected a class path, or class_path and init_args, got {spec!r}")
    # jsonargparse puts arguments that a signature does not name into dict_kwargs.
    return class_path, {**_as_dict(fields.get("init_args") or {}), **_as_dict(fields.get("dict_kwargs") or {})}


def _as_dict(fields: Any) -> dict[str, Any]:
    return dict(fields) if isinstance(fields, Mapping) else dict(getattr(fields, "__dict__", {}))


def _locate(class_path: str, flag: str) -> Callable[..., Any]:
    module_name, _, name = class_path.rpartition(".")
    try:
        module = import_module(module_name or "fedekd.models")
    except Exception as error:  # a user's module may raise anything
        raise UserError(
            f"{flag}: expected an importable model, got {shorten(repr(class_path))}. {describe_error(error)}"
        ) from error
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
    return required <= {"in_channels", "image_size", "in_features", "num_classes"}  # a layer requires more than these


def _same(name: str, value: Any, data_value: Any) -> bool:
    equal = height_and_width(value) == height_and_width(data_value) if name == "image_size" else value == data_value
    return bool(equal)
