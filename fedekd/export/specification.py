"""Specification of an exported model: from plain values to a network."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, cast

import torch
from torch import Tensor, nn

from fedekd.data import FederatedDataModule
from fedekd.early_exit import ExitPolicy
from fedekd.errors import UserError, describe_error, require
from fedekd.export.inputs import InputFormat, PixelScaling, TablePreprocessing
from fedekd.export.served import ServedNetwork
from fedekd.global_state import isolated_rng
from fedekd.methods import Client
from fedekd.methods.serving import CANDIDATE
from fedekd.models import MultiExitNetwork, build_ensemble, build_model, multi_exit
from fedekd.models.lora import merged
from fedekd.tasks import Task, require_task

FORMAT = 1
"""Version of the specification; other versions are rejected."""

_PACKAGES = ("fedekd.models", "torchvision.models", "timm")
"""Packages whose networks are built without `trusted_modules`."""

_DTYPES = {"float32": torch.float32, "float64": torch.float64}

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class ModelSpecification:
    """Specification of a deployed model, without its tensors.

    Args:
        task: `classification` or `regression`.
        inputs: Raw inputs.
        input_shape: Channels, height and width of an image, or number of features after preprocessing.
        num_outputs: Number of classes; 1 for regression.
        classes: Names of the classes or grades, in the order of their numbers; empty for real values.
        networks: By role, the values of `FederationSpec.describe_model`; one, or the members of an ensemble, or also
            the `proxy` of a policy with the score `agreement`.
        members: Roles of the members of an ensemble; empty for one network.
        dtype: `float32` or `float64`.
        target_shift: Added to the outputs in regression, after `target_scale`.
        target_scale: Factor from outputs to the unit of the targets in regression.
        statistics: Preprocessing of a table, see `TablePreprocessing`; empty for images.
        policy: JSON text of the exit policy; None without one.
        margins: See `ServedNetwork`.
    """

    task: Task
    inputs: InputFormat
    input_shape: tuple[int, ...]
    num_outputs: int
    classes: tuple[str, ...]
    networks: Mapping[str, Mapping[str, Any]]
    members: tuple[str, ...] = ()
    dtype: str = "float32"
    target_shift: float = 0.0
    target_scale: float = 1.0
    statistics: Mapping[str, Any] = field(default_factory=dict)
    policy: str | None = None
    margins: tuple[float, ...] = ()

    @property
    def deployed(self) -> str:
        """Role of the network, if it is one."""
        return next(iter(self.networks))

    def to_json(self) -> str:
        """Serialize without loss; `from_json` is the inverse.

        Raises:
            UserError: If an argument of a network is not a plain value.
        """
        scales = [str(value) if value == float("inf") else value for value in self.statistics.get("scales", ())]
        values = vars(self) | {"format": FORMAT, "inputs": self.inputs.to_json()}
        if self.statistics:
            values["statistics"] = {**self.statistics, "scales": scales}  # JSON has no infinity
        try:
            return json.dumps(values, allow_nan=False)
        except (TypeError, ValueError) as error:
            reason = describe_error(error, 120)
            raise UserError(f"client.private_model: expected plain arguments for an export, got {reason}") from error

    @classmethod
    def from_json(cls, text: str) -> ModelSpecification:
        """Deserialize the text of `to_json`.

        Raises:
            UserError: If it is not a specification of this version.
        """
        try:
            values = json.loads(text)
            version = values.pop("format")
            require(version == FORMAT, "format of the export", str(FORMAT), version)
            for name in ("input_shape", "classes", "members", "margins"):
                values[name] = tuple(values[name])
            return cls(**values | {"inputs": InputFormat.from_json(values["inputs"])})
        except UserError:
            raise
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise UserError(f"export: expected a specification of fedekd, got {describe_error(error)}") from error

    @property
    def modules(self) -> tuple[str, ...]:
        """Modules of the class paths."""
        return tuple(values["class_path"].rpartition(".")[0] for values in self.networks.values())

    def build(self, state: State, trusted_modules: Sequence[str] = ()) -> nn.Module:
        """Build the network with its tensors.

        Args:
            state: Tensors by name; those of an ensemble have the prefix of their member.
            trusted_modules: Modules or packages that may be imported for a network, besides `fedekd.models`,
                `torchvision.models` and `timm`.

        Returns:
            Network on the CPU in evaluation mode: plain, with exits, or an ensemble. Its inputs are preprocessed ones.

        Raises:
            UserError: If a class path is not one of a network of these packages, or the network cannot be built.
        """
        for values in self.networks.values():
            _require_network(values["class_path"], trusted_modules)
        if not self.members:
            return self._network(self.deployed, _without_prefix(state, "", self._other_prefixes))
        members = {role: self._network(role, _without_prefix(state, f"{role}.")) for role in self.members}
        tensors = _without_prefix(state, "ensemble.")
        return build_ensemble(members, tensors["weights"], tensors["offsets"], self.task).eval()

    @property
    def _other_prefixes(self) -> tuple[str, ...]:
        return tuple(f"{role}." for role in self.networks if role != self.deployed)

    def build_served(self, state: State, trusted_modules: Sequence[str] = ()) -> ServedNetwork:
        """Build the deployed model, from raw inputs to predictions; see `build`."""
        network = self.build(state, trusted_modules)
        policy = None if self.policy is None else ExitPolicy.from_json(self.policy)
        proxy = None
        if policy is not None and policy.uses_proxy:
            proxy = self._network("proxy", _without_prefix(state, "proxy."))
        return self.serve(network, policy, proxy)

    def serve(self, network: nn.Module, policy: ExitPolicy | None, proxy: nn.Module | None) -> ServedNetwork:
        """Add preprocessing and exit policy to a network."""
        scaling = self.target_shift, self.target_scale
        return ServedNetwork(network, self.preprocessing, self.task, policy, proxy, *scaling, self.margins)

    @property
    def preprocessing(self) -> nn.Module:
        """Module from raw inputs to inputs of the network."""
        if self.inputs.kind == "table":
            return TablePreprocessing(self.inputs.columns, dict(self.statistics), _DTYPES[self.dtype])
        return PixelScaling(_DTYPES[self.dtype])

    def _network(self, role: str, state: State) -> nn.Module:
        values = self.networks[role]
        model = {"class_path": values["class_path"], "init_args": values["init_args"]}
        with isolated_rng(0):  # all initial weights are replaced
            network = build_model(model, input_shape=self.input_shape, num_classes=self.num_outputs)
            if values["exits"] is not None:
                network = multi_exit(
                    network,
                    self.num_outputs,
                    values["exits"],
                    grid=values["exit_grid"],
                    cifar_stem=values["cifar_stem"],
                )
        if values["depth"] is not None and isinstance(network, MultiExitNetwork):
            network = network.shallow(values["depth"])
        network.to(_DTYPES[self.dtype]).load_state_dict(state)
        return network.eval()


def _require_network(class_path: str, trusted_modules: Sequence[str]) -> None:
    """Check that a class path is one of a network, before anything is called.

    Raises:
        UserError: If it is neither an `nn.Module` of a known package, a builder of torchvision or timm, nor of a
            trusted module.
    """
    module_name, _, name = class_path.rpartition(".")
    if _is_within(module_name, trusted_modules):
        return
    factory = None
    if _is_within(module_name, _PACKAGES):
        try:
            factory = getattr(import_module(module_name), name, None)
        except ImportError as error:
            raise UserError(f"class_path: expected a network, got {class_path!r}. {describe_error(error)}") from error
    is_network = isinstance(factory, type) and issubclass(factory, nn.Module)
    require(
        is_network or _is_builder(factory),
        "class_path",
        f"a network of {', '.join(_PACKAGES)}",
        class_path,
        f"If you trust the file, load it with trusted_modules=({module_name!r},)",
    )


def _is_within(module_name: str, packages: Sequence[str]) -> bool:
    return any(f"{module_name}.".startswith(f"{package}.") for package in packages)


def _is_builder(factory: Any) -> bool:
    """Check for a registered function of torchvision or timm that returns a network."""
    if not inspect.isfunction(factory):
        return False
    package, name = factory.__module__.partition(".")[0], factory.__name__
    if package == "torchvision":
        from torchvision.models import list_models

        return name in list_models()
    if package == "timm":
        from timm import create_model, is_model

        return factory is create_model or is_model(name)
    return False


def _without_prefix(state: State, prefix: str, others: tuple[str, ...] = ()) -> State:
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in state.items()
        if name.startswith(prefix) and not (others and name.startswith(others))
    }


def specify(data: FederatedDataModule, client: Client, policy: ExitPolicy | None) -> ModelSpecification:
    """Specify the deployed model of a client.

    Args:
        data: Data module of the run, which has the preprocessing of tables.
        client: Client of a finished run.
        policy: Its exit policy, if it was calibrated.

    Raises:
        UserError: If the weights are in half precision.
    """
    spec, samples, role = client.spec, client.samples, client.deployed_role
    task = require_task(spec.task)
    serving = client.deployed_serving
    members = () if serving is None else serving.members
    role = "private" if role == CANDIDATE else role  # a candidate without members is the private model
    roles = [*(members or (role,)), *(["proxy"] if policy is not None and policy.uses_proxy else [])]
    dtype = str(spec.trainer.dtype).removeprefix("torch.")
    require(
        dtype in _DTYPES, "trainer.precision", "weights in float32 or float64 for an export", spec.trainer.precision
    )
    inputs = _input_format(data, client)
    statistics: dict[str, Any] = {}
    if inputs.kind == "table":
        transformer = data.transformer(client.number)
        statistics = TablePreprocessing.from_transformer(inputs.columns, transformer, spec.trainer.dtype).statistics
    is_real = not samples.num_classes
    return ModelSpecification(
        task=task,
        inputs=inputs,
        input_shape=samples.input_shape,
        num_outputs=spec.num_outputs,
        classes=samples.class_names,
        networks={name: _describe(client, name) for name in dict.fromkeys(roles)},
        members=tuple(members),
        dtype=dtype,
        target_shift=client.splits.target_shift if is_real else 0.0,
        target_scale=client.splits.target_scale if is_real else 1.0,
        statistics=statistics,
        policy=None if policy is None else policy.to_json(),
    )


def deployed_tensors(client: Client, specification: ModelSpecification) -> dict[str, Tensor]:
    """Return copies of the tensors of the deployed model on the CPU.

    Adapters are merged.
    """
    networks = {role: client.networks[role] for role in specification.networks}
    if not specification.members:
        networks[specification.deployed] = client.deployed_model  # of which an exit may be deployed
    elif client.candidate is not None and client.candidate.depth is not None:
        networks["private"] = cast(MultiExitNetwork, networks["private"]).shallow(client.candidate.depth)
    networks = {role: merged(network) for role, network in networks.items()}
    if not specification.members:
        tensors = dict(networks[specification.deployed].state_dict())
        others = [role for role in specification.networks if role != specification.deployed]
    else:
        serving = client.deployed_serving
        assert serving is not None
        tensors = {"ensemble.weights": serving.weights, "ensemble.offsets": serving.offsets}
        others = list(specification.networks)
    for role in others:
        tensors |= {f"{role}.{name}": tensor for name, tensor in networks[role].state_dict().items()}
    return {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }


def _describe(client: Client, role: str) -> dict[str, Any]:
    """Describe the network of a role, or its deployed first stages."""
    description = client.spec.describe_model(_model_of(role), client.number)
    depth = None if client.candidate is None or role != "private" else client.candidate.depth
    return description if depth is None else description | {"depth": depth}


def _model_of(role: str) -> str:
    """Return the kind of network of a role: `private` or `proxy`."""
    return "proxy" if role.startswith(("proxy", "tuned")) else "private"


def _input_format(data: FederatedDataModule, client: Client) -> InputFormat:
    samples, options = client.samples, data.read_options
    if samples.columns:
        return InputFormat("table", (len(samples.columns),), samples.columns)
    if samples.inputs.dtype == torch.uint8:
        return InputFormat("pixels", samples.input_shape, is_resized=options.image_size is not None)
    bounds = None if options.value_range is None else (float(options.value_range[0]), float(options.value_range[1]))
    return InputFormat(
        "scaled_pixels", samples.input_shape, is_resized=options.image_size is not None, value_range=bounds
    )
