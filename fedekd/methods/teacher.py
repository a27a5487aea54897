"""External teacher: a trained, frozen network with weights from a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from fedekd.atomic import digest
from fedekd.class_paths import class_path_of
from fedekd.errors import require, shorten
from fedekd.methods.specification import FederationSpec
from fedekd.models import MultiExitNetwork, check_model
from fedekd.models.weights import count_exits, load_weights, read_weights, stored_weights

OPTION = "method.teacher"
"""Name of the option in errors."""

_WEIGHTS = f"{OPTION}.weights"


@dataclass(frozen=True)
class ExternalTeacher:
    """A trained, frozen network, described by configuration.

    It is built where it is used, and is not part of a client's state. The digest of its file is part of a run's
    identity: a run cannot be resumed with other weights.

    Attributes:
        class_path: The network, as `client.private_model`.
        init_args: Its arguments.
        weights: Path of a file with its `state_dict`, or of `fedekd export --format safetensors`; None if the network
            has trained weights when it is built.
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
        require(weights is None or isinstance(weights, str), _WEIGHTS, "a path or null", weights)
        class_path, init_args = class_path_of(OPTION, fields)
        return cls(class_path, init_args, weights, "" if weights is None else digest(read_weights(weights, _WEIGHTS)))

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
        state = None if self.weights is None else stored_weights(self.weights, self.sha256, _WEIGHTS)
        model = {"class_path": self.class_path, "init_args": self.init_args}
        network = spec.build_network(model, OPTION, exits=None if state is None else count_exits(state))
        if state is not None:
            exits = range(network.num_exits - 1) if isinstance(network, MultiExitNetwork) else ()
            unused = tuple(f"heads.{number}." for number in exits)  # the last exit teaches
            load_weights(network, state, _WEIGHTS, num_outputs=spec.num_outputs, unused=unused)
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
            require(is_trained, _WEIGHTS, expected, None)
        plain = network.float().cpu().requires_grad_(True)
        check_model(plain, input_shape=spec.input_shape, num_outputs=spec.num_outputs, flag=OPTION)
