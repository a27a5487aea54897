"""External teacher: a trained, frozen network with weights from a file."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedekd.atomic import digest
from fedekd.class_paths import class_path_of
from fedekd.errors import UserError, describe_error, require, shorten, shorten_path
from fedekd.methods.specification import FederationSpec
from fedekd.models import ImageClassifier, MultiExitNetwork, check_model

OPTION = "method.teacher"
"""Name of the option in errors."""

#: How to write a file that can be read.
_SAVE = "Save it by torch.save(network.state_dict(), FILE)"

#: Name of a tensor in a head of a `MultiExitNetwork`.
_HEAD = re.compile(r"heads\.(\d+)\.")


@dataclass(frozen=True)
class ExternalTeacher:
    """A trained, frozen network, described by configuration.

    It is built where it is used, and is not part of a client's state. The digest of its file identifies a run: a run
    does not go on with other weights.

    Attributes:
        class_path: The network, as `client.private_model`.
        init_args: Its arguments.
        weights: Path of a file with its `state_dict`, or with the state of a client (`checkpoints/client-*.pt` of a
            run), whose private model is read; None if the network has trained weights when it is built.
        sha256: SHA-256 of the file; empty without one.
    """

    class_path: str
    init_args: dict[str, Any] = field(default_factory=dict)
    weights: str | None = None
    sha256: str = ""

    @classmethod
    def from_config(cls, value: Any) -> ExternalTeacher:
        """Create a teacher from `class_path`, `init_args` and `weights`.

        Raises:
            UserError: If it is another value, or the file cannot be read.
        """
        fields = dict(value) if isinstance(value, Mapping) else dict(getattr(value, "__dict__", {}))
        weights = fields.pop("weights", None)
        names = {"class_path", "init_args"}
        is_network = isinstance(fields.get("class_path"), str) and fields.keys() <= names
        require(is_network, OPTION, "class_path, and optionally init_args and weights, or null", value)
        require(weights is None or isinstance(weights, str), f"{OPTION}.weights", "a path or null", weights)
        class_path, init_args = class_path_of(OPTION, fields)
        return cls(class_path, init_args, weights, "" if weights is None else digest(read_weights(weights)))

    def build(self, spec: FederationSpec) -> nn.Module:
        """Build the network with its weights.

        Args:
            spec: Specification of the federation: shapes, device and floating-point type.

        Returns:
            The network on the training device, in evaluation mode and without gradients. Of a network with exits only
            the last exit is kept.

        Raises:
            UserError: If the file is missing or was changed, or does not fit the network or the data.
        """
        state = None if self.weights is None else self._state(self.weights)
        model = {"class_path": self.class_path, "init_args": self.init_args}
        network = spec.build_network(model, OPTION, exits=None if state is None else _num_exits(state))
        if state is not None:
            _load(network, state, spec.num_outputs)
        if isinstance(network, MultiExitNetwork):
            network = nn.Sequential(*network.stages, network.heads[-1])
        return network.eval().requires_grad_(False)

    def check(self, spec: FederationSpec) -> None:
        """Build the network, and run it on two samples.

        Raises:
            UserError: As `build`; or if the network does not fit the samples, or has random weights.
        """
        network = self.build(spec)
        if self.weights is None:
            other = self.build(replace(spec, seed=spec.seed + 1)).state_dict()
            is_trained = all(torch.equal(tensor, other[name]) for name, tensor in network.state_dict().items())
            expected = f"a file, because {shorten(self.class_path)} with these arguments has random weights"
            require(is_trained, f"{OPTION}.weights", expected, None)
        plain = network.float().cpu().requires_grad_(True)
        check_model(plain, input_shape=spec.input_shape, num_outputs=spec.num_outputs, flag=OPTION)

    def _state(self, weights: str) -> Mapping[str, Tensor]:
        content = read_weights(weights)
        if digest(content) != self.sha256:  # in another process or on another machine, or replaced during the run
            actual = f"{shorten_path(weights)} with {digest(content)[:12]}"
            raise UserError(f"{OPTION}.weights: expected the file with SHA-256 {self.sha256[:12]}, got {actual}")
        return unpack_weights(content, weights)


def read_weights(path: str) -> bytes:
    """Return the content of a file of weights.

    Raises:
        UserError: If it cannot be read.
    """
    try:
        return Path(path).expanduser().read_bytes()
    except OSError as error:
        reason = "does not exist" if isinstance(error, FileNotFoundError) else f"cannot be read: {error.strerror}"
        raise UserError(f"{OPTION}.weights: expected a file, got {shorten_path(repr(path))}, which {reason}") from error


def unpack_weights(content: bytes, path: str) -> Mapping[str, Tensor]:
    """Return the tensors of a file by name; no code in it is run.

    Args:
        content: Content of the file.
        path: Its path, for errors.

    Raises:
        UserError: If it is neither a `state_dict` nor the state of a client.
    """
    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # a file of another kind may raise any exception of torch
        reason = "objects other than tensors" if "unsupported" in str(error).lower() else describe_error(error, 80)
        raise UserError(
            f"{OPTION}.weights: expected tensors, which torch.load reads with weights_only=True, got"
            f" {shorten_path(repr(path))} with {reason}. {_SAVE}"
        ) from error
    networks = state.get("networks") if isinstance(state, Mapping) else None
    if isinstance(networks, Mapping) and "private" in networks:
        state = networks["private"]
    if not (isinstance(state, Mapping) and state and all(isinstance(item, Tensor) for item in state.values())):
        keys = f"with {', '.join(map(str, list(state)[:3]))}" if isinstance(state, Mapping) else type(state).__name__
        raise UserError(
            f"{OPTION}.weights: expected a state_dict or the state of a client, got {shorten_path(repr(path))}"
            f" ({shorten(keys)}). {_SAVE}"
        )
    return state


def _num_exits(state: Mapping[str, Tensor]) -> int | None:
    """Return the number of exits of a network from its tensors, or None."""
    numbers = [int(match[1]) for match in map(_HEAD.match, state) if match]
    return max(numbers) + 1 if numbers and any(name.startswith("stages.") for name in state) else None


def _load(network: nn.Module, state: Mapping[str, Tensor], num_outputs: int) -> None:
    """Load the tensors of a file.

    Of a network with exits, those of the stages and of the last head are loaded.

    Raises:
        UserError: If names or shapes differ, or a tensor is not finite.
    """
    expected, name = network.state_dict(), type(getattr(network, "backbone", network)).__name__
    if isinstance(network, MultiExitNetwork):
        unused = tuple(f"heads.{number}." for number in range(network.num_exits - 1))
        state = {key: tensor for key, tensor in state.items() if not key.startswith(unused)} if unused else state
        expected = {key: tensor for key, tensor in expected.items() if not (unused and key.startswith(unused))}
        name = f"the network with {network.num_exits} exits"
    elif isinstance(network, ImageClassifier):
        state = _with_wrapped_names(network, state)
    for key in [*expected, *state]:
        if (key in state) != (key in expected):
            difference = f"without {shorten(key)!r}" if key in expected else f"that also has {shorten(key)!r}"
            raise UserError(
                f"{OPTION}.weights: expected the tensors of {name}, got a file {difference}. Give class_path and"
                " init_args of the trained network"
            )
        shape, stored = tuple(expected[key].shape), tuple(state[key].shape)
        if shape != stored and shape[:1] == (num_outputs,) and shape[1:] == stored[1:]:
            raise UserError(
                f"{OPTION}.weights: expected a network of {num_outputs} classes, as in the data, got one of {stored[0]}"
                f" ({shorten(key)})"
            )
        require(shape == stored, f"{OPTION}.weights", f"{shorten(key)} of shape {shape} for {name}", stored)
        is_finite = bool(state[key].isfinite().all())
        require(is_finite, f"{OPTION}.weights", "finite values", f"NaN or infinity in {shorten(key)}")
    network.load_state_dict(state, strict=not isinstance(network, MultiExitNetwork))


def _with_wrapped_names(network: ImageClassifier, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Rename the tensors of a plain classifier as `ImageClassifier` does."""
    backbone = network.backbone.state_dict()
    heads = {key.rpartition(".")[0] for key in state if key not in backbone}
    if len(heads) != 1 or not state.keys() & backbone.keys():
        return state
    return {
        f"backbone.{key}" if key in backbone else f"head.{key.rpartition('.')[2]}": tensor
        for key, tensor in state.items()
    }
