"""Weights of a network from a file."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from fedekd.atomic import digest
from fedekd.errors import UserError, describe_error, require, shorten, shorten_path
from fedekd.models.freezing import head_prefixes
from fedekd.models.image_classifier import ImageClassifier
from fedekd.models.multi_exit import MultiExitNetwork

State = Mapping[str, Tensor]

_SAME_NETWORK = "Give class_path and init_args of the trained network"
_EXPORT = "Export the model: fedekd export RUN --client K --format safetensors"

#: How to write a file that can be read.
_SAVE = "Save it by torch.save(network.state_dict(), FILE)"

#: Name of a tensor in a head of a `MultiExitNetwork`.
_HEAD = re.compile(r"heads\.(\d+)\.")

METADATA_KEY = "fedekd"
"""Key of the specification in the metadata of an exported safetensors file."""

#: Tensors that an error names.
_NAMED = 3


def read_weights(path: str, option: str) -> bytes:
    """Return the content of a file of weights.

    Args:
        path: Its path.
        option: Name of the option in errors.

    Raises:
        UserError: If it cannot be read.
    """
    try:
        return Path(path).expanduser().read_bytes()
    except OSError as error:
        reason = "does not exist" if isinstance(error, FileNotFoundError) else f"cannot be read: {error.strerror}"
        raise UserError(f"{option}: expected a file, got {shorten_path(repr(path))}, which {reason}") from error


def unpack_weights(data: bytes, path: str, option: str) -> State:
    """Return the tensors of a file by name; no code in it is run.

    Args:
        data: Content of the file.
        path: Its path, for errors.
        option: Name of the option in errors.

    Raises:
        UserError: If it is not a `state_dict`, or its tensors are sparse, quantized or complex.
    """
    if path.endswith(".safetensors"):
        tensors, metadata = unpack_safetensors(data, path, option)
        state = _private_tensors(tensors, metadata, path, option)
        require(bool(state), option, "a file with a private model", shorten_path(path))
        return state
    try:
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # a file of another kind may raise any exception of torch
        reason = "objects other than tensors" if "unsupported" in str(error).lower() else describe_error(error, 80)
        raise UserError(
            f"{option}: expected tensors, which torch.load reads with weights_only=True, got"
            f" {shorten_path(repr(path))} with {reason.rstrip('.')}. {_SAVE}"
        ) from error
    if not (isinstance(state, Mapping) and state and all(isinstance(item, Tensor) for item in state.values())):
        content = type(state).__name__
        if isinstance(state, Mapping):
            content = f"with {', '.join(map(str, list(state)[:_NAMED]))}" if state else "empty"
        raise UserError(
            f"{option}: expected a state_dict, got {shorten_path(repr(path))} ({shorten(content)}). {_SAVE}"
        )
    for name, tensor in state.items():
        kind = _unsupported_kind(tensor)
        require(kind is None, option, "dense tensors of real numbers", f"{shorten(str(name), 40)} of {kind}", _SAVE)
    return state


def _unsupported_kind(tensor: Tensor) -> str | None:
    """Return the kind of a tensor that cannot be a weight; None of one that can."""
    if tensor.is_meta:
        return "the meta device"
    if tensor.is_quantized or tensor.is_complex():
        return str(tensor.dtype)
    return None if tensor.layout is torch.strided else str(tensor.layout)


def unpack_safetensors(content: bytes, path: str, option: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata of a safetensors file.

    Args:
        content: Content of the file.
        path: Its path, for errors.
        option: Name of the option in errors.

    Raises:
        UserError: If it is another file, or safetensors is not installed.
    """
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load
    except ImportError as error:
        raise UserError(
            f"{option}: expected the package safetensors to read {shorten_path(repr(path))}. Install it by: pip install"
            " 'fedekd[export]'"
        ) from error
    try:
        tensors: dict[str, Tensor] = load(content)
        length = int.from_bytes(content[:8], "little")
        header: dict[str, dict[str, str]] = json.loads(content[8 : 8 + length])
    except (SafetensorError, ValueError, KeyError) as error:
        raise UserError(
            f"{option}: expected a safetensors file, got {shorten_path(repr(path))} with {describe_error(error, 80)}"
        ) from error
    return tensors, header.get("__metadata__", {})


def _private_tensors(tensors: State, metadata: Mapping[str, str], path: str, option: str) -> State:
    """Return the tensors of the private model of an exported one."""
    try:
        specification = json.loads(metadata.get(METADATA_KEY, "{}"))
        is_ensemble, roles = bool(specification.get("members")), list(specification.get("networks", {}))
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{option}: expected a file of fedekd export, or one without the metadata '{METADATA_KEY}', got"
            f" {shorten_path(repr(path))}"
        ) from error
    if is_ensemble:
        return {name.removeprefix("private."): tensors[name] for name in tensors if name.startswith("private.")}
    others = tuple(f"{role}." for role in roles[1:])
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(others)}


def stored_weights(path: str, sha256: str, option: str) -> State:
    """Read and verify a file of weights.

    Args:
        path: Its path.
        sha256: Expected SHA-256.
        option: Name of the option in errors.

    Raises:
        UserError: If it cannot be read, has another content, or is not a file of weights.
    """
    content = read_weights(path, option)
    if digest(content) != sha256:  # in another process or on another machine, or replaced during the run
        actual = f"{shorten_path(path)} with {digest(content)[:12]}"
        raise UserError(f"{option}: expected the file with SHA-256 {sha256[:12]}, got {actual}")
    return unpack_weights(content, path, option)


def count_exits(state: State) -> int | None:
    """Return the number of exits of a network from its tensors; None for a plain one."""
    numbers = [int(match[1]) for match in map(_HEAD.match, state) if match]
    return max(numbers) + 1 if numbers and any(name.startswith("stages.") for name in state) else None


def load_weights(
    network: nn.Module,
    state: State,
    option: str,
    *,
    num_outputs: int,
    channels: int | None = None,
    unused: tuple[str, ...] = (),
    keeps_new_head: bool = False,
) -> None:
    """Load the tensors of a file into a network.

    Args:
        network: The network; it is changed.
        state: Tensors of the file, with the names of the network, or of the plain one in an `ImageClassifier`.
        option: Name of the option in errors.
        num_outputs: Number of classes; 1 for regression.
        channels: Channels of an image, for the error; None for features.
        unused: Prefixes of tensors that are not loaded.
        keeps_new_head: Keep the initial weights of the last linear layers if the file has others of another number of
            outputs, or none.

    Raises:
        UserError: If other names or shapes differ, or a tensor is not finite. The message has the first ones.
    """
    if isinstance(network, ImageClassifier):
        state = _with_wrapped_names(network, state)
    expected: State = network.state_dict()
    name = type(getattr(network, "backbone", network)).__name__
    if isinstance(network, MultiExitNetwork):
        name = f"the network with {network.num_exits} exits"
    if unused:
        state, expected = (
            {key: tensor for key, tensor in part.items() if not key.startswith(unused)} for part in (state, expected)
        )
    if keeps_new_head:
        state, expected = _without_other_heads(network, state, expected)
    _require_names(state, expected, name, option)
    _require_shapes(state, expected, name, option, num_outputs, channels)
    for key, tensor in state.items():
        require(bool(tensor.isfinite().all()), option, "finite values", f"NaN or infinity in {shorten(key)}")
    network.load_state_dict({**network.state_dict(), **state})


def _without_other_heads(network: nn.Module, state: State, expected: State) -> tuple[State, State]:
    """Leave out the last linear layers of another number of outputs."""
    heads = []
    for prefix in head_prefixes(network):
        names = [name for name in expected if name.startswith(prefix)]
        others = [name for name in names if name not in state or state[name].shape[:1] != expected[name].shape[:1]]
        if len(others) == len(names):
            heads += names
    kept = [{name: tensor for name, tensor in part.items() if name not in heads} for part in (state, expected)]
    return kept[0], kept[1]


def _require_names(state: State, expected: State, name: str, option: str) -> None:
    for keys, words in (
        ([key for key in expected if key not in state], "without"),
        ([key for key in state if key not in expected], "that also has"),
    ):
        if keys:
            rest = f" and {len(keys) - _NAMED} more" if len(keys) > _NAMED else ""
            exits = count_exits(state)
            if any(".lora_A." in key for key in state):
                hint = f"Its network has adapters. {_EXPORT}"
            elif exits is not None and count_exits(expected) is None:
                hint = f"Its network has exits: set client.exits {exits}"
            else:
                hint = _SAME_NETWORK
            raise UserError(
                f"{option}: expected the tensors of {name}, got a file {words}"
                f" {', '.join(repr(shorten(key, 40)) for key in keys[:_NAMED])}{rest}. {hint}"
            )


def _require_shapes(
    state: State, expected: State, name: str, option: str, num_outputs: int, channels: int | None
) -> None:
    for key in expected:
        shape, stored = tuple(expected[key].shape), tuple(state[key].shape)
        if shape == stored:
            continue
        is_same_but_one = [len(shape) == len(stored) and _without(shape, i) == _without(stored, i) for i in (0, 1)]
        if is_same_but_one[0] and shape[:1] == (num_outputs,):
            raise UserError(
                f"{option}: expected a network of {num_outputs} classes, as in the data, got one of {stored[0]}"
                f" ({shorten(key)})"
            )
        if is_same_but_one[1] and len(shape) == 4 and shape[1] == channels:
            raise UserError(
                f"{option}: expected a network for images with {channels} channels, as in the data, got one for"
                f" {stored[1]} ({shorten(key)})"
            )
        count = sum(expected[other].shape != state[other].shape for other in expected) - 1
        rest = f", and {count} more of another shape" if count else ""
        raise UserError(f"{option}: expected {shorten(key)} of shape {shape} for {name}, got {stored}{rest}")


def _without(shape: tuple[int, ...], index: int) -> tuple[int, ...]:
    return shape[:index] + shape[index + 1 :]


def _with_wrapped_names(network: ImageClassifier, state: State) -> State:
    """Rename the tensors of a plain classifier as `ImageClassifier` does."""
    backbone = network.backbone.state_dict()
    heads = {key.rpartition(".")[0] for key in state if key not in backbone}
    if len(heads) > 1 or not state.keys() & backbone.keys():
        return state
    return {
        f"backbone.{key}" if key in backbone else f"head.{key.rpartition('.')[2]}": tensor
        for key, tensor in state.items()
    }
