"""Specification of a federation: from plain values to networks and optimizers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from fedekd.data import Samples
from fedekd.errors import UserError, require
from fedekd.global_state import isolated_rng
from fedekd.methods.options import WEIGHTS, ClientOptions, ModelSpec, build_optimizer, build_scheduler
from fedekd.metrics import METRICS, MetricSpec, primary_metric, select_metrics
from fedekd.models import MultiExitNetwork, build_model, multi_exit
from fedekd.models.build import parse_model
from fedekd.models.digest import tensors_fingerprint
from fedekd.models.freezing import freeze, frozen_names
from fedekd.models.lora import add_adapters
from fedekd.models.pretrained import without_pretrained_weights
from fedekd.models.weights import State, count_exits, load_weights, stored_weights
from fedekd.modules import TrainerFactory
from fedekd.seeding import derive_seed
from fedekd.tasks import Task

#: Largest image side for the CIFAR stem of a ResNet with exits: torchvision's stem reduces 32 pixels to 8.
_CIFAR_STEM_SIZE = 64

#: Weights by file and digest: a process builds the networks of many clients.
_stored_weights = lru_cache(maxsize=1)(stored_weights)

#: Channels, height and width.
_IMAGE_DIMENSIONS = 3


class DataSpec(Protocol):
    """Properties of the data that `FederationSpec.from_parts` reads."""

    batch_size: int
    eval_batch_size: int

    @property
    def transform(self) -> Any:
        """Augmentation of training samples, as plain values; None for none."""
        ...

    @property
    def samples(self) -> Samples:
        """The samples; only the shape of an input, the classes and the task are read."""
        ...


class FrozenBase(NamedTuple):
    """Frozen tensors of a private model that can be rebuilt from its specification.

    Attributes:
        names: Names of the tensors, sorted.
        sha256: `tensors_fingerprint` of them in this order.
    """

    names: tuple[str, ...]
    sha256: str


@dataclass(frozen=True)
class FederationSpec:
    """Build equal networks and optimizers on the server and on every client.

    It holds plain values only, so that it can be sent to other processes and sites.

    Attributes:
        task: `classification` or `regression`.
        input_shape: Channels, height and width of an image, or number of features.
        num_outputs: Number of classes; 1 for regression.
        batch_size: Samples per training batch.
        eval_batch_size: Samples per evaluation batch.
        seed: Seed of the run.
        client: Options of the clients.
        trainer: Device, precision and threads, resolved for this machine.
        num_clients: Number of clients.
        rounds: Number of rounds.
        metric: Name of the primary metric of the run; empty for that of the task.
        transform: Augmentation of training samples, as plain values; see `build_transform`. Default None.
        select_round: Round that each client deploys: `last`, or `best` on its tuning split. Default last.

    Raises:
        UserError: If the numbers of models and of clients differ, `client.depths` is given without exits, or an option
            needs another one.
    """

    task: Task
    input_shape: tuple[int, ...]
    num_outputs: int
    batch_size: int
    eval_batch_size: int
    seed: int
    client: ClientOptions
    trainer: TrainerFactory
    num_clients: int
    rounds: int
    metric: str = ""
    transform: Any = None
    select_round: str = "last"

    def __post_init__(self) -> None:
        models = self.client.private_model
        require(
            isinstance(models, Mapping) or len(models) == self.num_clients,
            "client.private_model",
            f"one model, or {self.num_clients} (data.num_clients)",
            len(models),
        )
        require(
            self.client.depths is None
            or all(self.client.exits_for(number) is not None for number in range(self.num_clients)),
            "client.depths",
            "null without exits",
            self.client.depths,
            "Set --client.exits to a number of stages.",
        )
        require(
            self.client.class_weights is None or self.task == "classification",
            "client.class_weights",
            "null for regression",
            self.client.class_weights,
        )
        init_args = self.client.optimizer.get("init_args") or {}
        require(
            self.trainer.allows_fused or not init_args.get("fused"),
            "client.optimizer.fused",
            f"null or false with --trainer.gradient_clip_val in precision {self.trainer.precision}",
            init_args.get("fused"),
        )
        capturable = bool(init_args.get("capturable"))
        require(
            not capturable or self.trainer.accelerator == "cuda",
            "client.optimizer.capturable",
            f"false with --trainer.accelerator {self.trainer.accelerator}",
            capturable,
        )

    @classmethod
    def from_parts(
        cls,
        data: DataSpec,
        client: ClientOptions,
        trainer: TrainerFactory,
        *,
        rounds: int,
        seed: int,
        num_clients: int,
        default_exits: int | None = None,
        metrics: Sequence[str] | None = None,
        select_round: str = "last",
    ) -> FederationSpec:
        """Create the specification from the parts of a run.

        Args:
            data: The data set, from which shapes, task and batch sizes are read.
            client: Options of the clients.
            trainer: How clients are trained; `auto` is resolved for this machine.
            rounds: Number of rounds.
            seed: Seed of the run.
            num_clients: Number of clients.
            default_exits: `Method.exits`: exits of the private model if `client.exits` is null.
            metrics: Metrics that the run reports, the primary one first; None for those of the task.
            select_round: Round that each client deploys: `last` or `best`.

        Raises:
            UserError: If a part is invalid.
        """
        samples = data.samples
        if default_exits is not None and client.exits is None:
            client = replace(client, exits=default_exits)
        return cls(
            task=samples.task,
            input_shape=samples.input_shape,
            num_outputs=samples.num_outputs,
            batch_size=data.batch_size,
            eval_batch_size=data.eval_batch_size,
            seed=seed,
            client=client,
            trainer=trainer.resolve(),
            num_clients=num_clients,
            rounds=rounds,
            metric=select_metrics(metrics, samples.task, samples.num_classes)[0].name,
            transform=data.transform,
            select_round=select_round,
        )

    @property
    def primary(self) -> MetricSpec:
        """Metric of the score, by which Delta is computed."""
        return METRICS[self.metric] if self.metric else primary_metric(self.task)

    def build_model(self, role: str, client_id: int | str) -> nn.Module:
        """Build a network with its initial weights, on the training device.

        Args:
            role: `private` or `proxy`.
            client_id: Number of a client, or `server`. Initial weights are seeded from (seed, client_id, role); from
                (seed, `server`, role) for a private model with pretrained weights or frozen parts.
        """
        is_private = role == "private"
        spec = self.client.model_for(client_id) if is_private else self.client.proxy_model
        option = f"client.{role}_model" + ("s" if is_private and self.client.private_models else "")
        is_equal = is_private and self.client.starts_equal(client_id)
        seed = derive_seed(self.seed, "server" if is_equal else client_id, role, "initial weights")
        with isolated_rng(seed, self.trainer.torch_device):
            network = self._plain_network(spec, option, replaces_head=is_private)
            if is_private:
                network = self._private_network(network, client_id)
        return self._on_device(network)

    def _private_network(self, network: nn.Module, client_id: int | str) -> nn.Module:
        """Apply weights, exits, frozen parameters and depth to a private model."""
        options, depth = self.client, self.depth(client_id)
        exits = options.exits_for(client_id)
        path = options.private_weights
        state = {} if path is None else _stored_weights(path, options.private_weights_sha256, WEIGHTS)
        has_exits = exits is not None and count_exits(state) is not None  # the file is of a network with exits
        if state and not has_exits:
            self._load_weights(network, state)
        if exits is not None:
            network = self._with_exits(
                network, client_id, keeps_stem=options.is_pretrained(client_id) and not has_exits
            )
        if has_exits:
            self._load_weights(network, state)
        if options.freeze is not None:
            freeze(network, options.freeze)
        if options.lora is not None:
            add_adapters(network, options.lora, self.input_shape)
        if depth is None or not isinstance(network, MultiExitNetwork):
            return network
        try:
            return network.shallow(depth)
        except UserError as error:
            raise UserError(f"client.depths {options.depths}: {error}") from error

    def frozen_base(self, client_id: int | str) -> FrozenBase | None:
        """Return the frozen tensors that come from pretrained weights.

        These are the ones that do not depend on the seed. States of clients omit them.

        Args:
            client_id: Number of a client, or `server`.

        Returns:
            None without frozen parts, without pretrained weights, or if all frozen tensors depend on the seed.
        """
        if not self.client.has_frozen_parts or not self.client.is_pretrained(client_id):
            return None
        key = self.architecture_key(client_id)
        if key not in self._frozen_bases:
            network = self.build_model("private", client_id)
            state, frozen = network.state_dict(), frozen_names(network)
            other = replace(self, seed=self.seed + 1).build_model("private", client_id).state_dict()
            names = tuple(sorted(name for name in frozen if torch.equal(state[name], other[name])))
            fingerprint = tensors_fingerprint({name: state[name] for name in names})
            self._frozen_bases[key] = FrozenBase(names, fingerprint) if names else None
        return self._frozen_bases[key]

    @cached_property
    def initial_proxy(self) -> State:
        """Weights with which the server's proxy starts."""
        return self.build_model("proxy", "server").state_dict()

    @cached_property
    def _frozen_bases(self) -> dict[str, FrozenBase | None]:
        """Results of `frozen_base` by architecture, for the life of this object."""
        return {}

    def describe_model(self, role: str, client_id: int | str) -> dict[str, Any]:
        """Return what `build_model` builds without its initial weights, as plain values.

        Args:
            role: `private` or `proxy`.
            client_id: Number of a client, or `server`.

        Returns:
            `class_path`, `init_args`, and for `fedekd.models.multi_exit` `exits`, `exit_grid` and `cifar_stem`; `depth`
            is the number of leading stages, None for all.
        """
        options, is_private = self.client, role == "private"
        class_path, init_args = parse_model(options.model_for(client_id) if is_private else options.proxy_model)
        exits = options.exits_for(client_id) if is_private else None
        path = options.private_weights if is_private else None
        state = {} if path is None else _stored_weights(path, options.private_weights_sha256, WEIGHTS)
        keeps_stem = is_private and options.is_pretrained(client_id) and count_exits(state) is None
        return {
            "class_path": class_path if "." in class_path else f"fedekd.models.{class_path}",
            "init_args": without_pretrained_weights(class_path, init_args),
            "exits": exits,
            "exit_grid": options.exit_grid,
            "cifar_stem": self._has_small_images and not keeps_stem,
            "depth": self.depth(client_id) if is_private else None,
        }

    def _load_weights(self, network: nn.Module, state: State) -> None:
        channels = self.input_shape[0] if len(self.input_shape) == _IMAGE_DIMENSIONS else None
        load_weights(network, state, WEIGHTS, num_outputs=self.num_outputs, channels=channels, keeps_new_head=True)

    def build_network(self, model: str | ModelSpec, option: str, exits: int | None = None) -> nn.Module:
        """Build a network that is not a client's model, such as a teacher.

        Args:
            model: The network, as `client.private_model`. Initial weights are seeded from (seed, option).
            option: Name of the option in errors.
            exits: Number of stages with one exit each, as `client.exits`; None keeps the network as it is.

        Returns:
            The network on the training device.

        Raises:
            UserError: If it cannot be built or split.
        """
        with isolated_rng(derive_seed(self.seed, option, "initial weights"), self.trainer.torch_device):
            network = self._plain_network(model, option)
            if exits is not None:
                try:
                    network = self._split(network, exits)
                except UserError as error:
                    raise UserError(f"{option}: {error}") from error
        return self._on_device(network)

    def _plain_network(self, model: str | ModelSpec, option: str, replaces_head: bool = False) -> nn.Module:
        return build_model(
            model,
            input_shape=self.input_shape,
            num_classes=self.num_outputs,
            flag=option,
            replaces_head=replaces_head,
        )

    def _on_device(self, network: nn.Module) -> nn.Module:
        network.to(self.trainer.torch_device, self.trainer.dtype)
        # In PyTorch's stubs, memory_format is a separate overload.
        return network.to(memory_format=self.trainer.memory_format)

    def _split(
        self, network: nn.Module, exits: int | None, grid: int = 1, keeps_stem: bool = False
    ) -> MultiExitNetwork:
        cifar_stem = self._has_small_images and not keeps_stem
        return multi_exit(network, self.num_outputs, exits, grid=grid, cifar_stem=cifar_stem)

    @property
    def _has_small_images(self) -> bool:
        return max(self.input_shape[1:], default=0) <= _CIFAR_STEM_SIZE

    def _with_exits(self, network: nn.Module, client_id: int | str, keeps_stem: bool) -> MultiExitNetwork:
        options = self.client
        try:
            return self._split(network, options.exits_for(client_id), options.exit_grid, keeps_stem)
        except UserError as error:
            raise UserError(f"client.exits {options.exits}: {error}") from error

    def build_multi_exit_model(self, method: str) -> MultiExitNetwork:
        """Build the server's private model, which must have exits.

        Args:
            method: Name of the method, for the error.

        Raises:
            UserError: If the task is regression, or the model has fewer than 2 exits.
        """
        require(
            self.task != "regression",
            "task",
            f"classification for method {method}",
            self.task,
            "Use FedAvg or FedeKD.",
        )
        network = self.build_model("private", "server")
        num_exits = network.num_exits if isinstance(network, MultiExitNetwork) else 0
        require(
            num_exits >= (2 if self.client.depths is None else 1),
            "client.exits",
            f"at least 2 for method {method}",
            self.client.exits,
        )
        assert isinstance(network, MultiExitNetwork)
        return network

    def require_one_architecture(self, method: str) -> None:
        """Check that all clients have the same private model.

        Args:
            method: Name of the method that averages private models, for the error.

        Raises:
            UserError: If models, exits or depths differ between clients.
        """
        model_option = "client.private_model" if self.client.private_models is None else "client.private_models"
        for option, value_for in (
            (model_option, self.client.model_for),
            ("client.exits", self.client.exits_for),
            ("client.depths", self.depth),
        ):
            values = [value_for(number) for number in range(self.num_clients)]
            require(
                all(value == values[0] for value in values),
                option,
                f"one value for all clients, because method {method} averages private models",
                values,
            )

    def architecture_key(self, client_id: int | str) -> str:
        """Return a key that is equal for clients with the same private architecture."""
        options = self.client
        return json.dumps(
            [options.model_for(client_id), options.exits_for(client_id), self.depth(client_id)], sort_keys=True
        )

    def depth(self, client_id: int | str) -> int | None:
        """Return a client's number of stages; None is all, `server` has the most."""
        depths = self.client.depths
        if depths is None or isinstance(depths, int):
            return depths
        if isinstance(client_id, int):
            return depths[client_id % len(depths)]
        return max(depths[: self.num_clients])

    def optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """Create the client's optimizer, in fused form where the result is the same.

        Raises:
            UserError: If the optimizer rejects its arguments.
        """
        return build_optimizer(self.client.optimizer, parameters, self.trainer.allows_fused)

    def scheduler(self, optimizer: torch.optim.Optimizer) -> LRScheduler:
        """Create the scheduler of an optimizer; needs `client.scheduler`."""
        assert self.client.scheduler is not None
        return build_scheduler(self.client.scheduler, optimizer)

    def hash_dict(self) -> dict[str, Any]:
        """Return the values that determine local training, for content hashes.

        Names are fixed, and newer options are left out at their defaults, so that a new option changes no hash.
        """
        values = asdict(self)
        for name in ("num_clients", "rounds", "metric", "select_round"):
            values.pop(name)
        values["trainer"].pop("device")  # equal devices give equal results
        self._drop_unused(values)
        if self.transform is None:
            values.pop("transform")
        values["client"].pop("private_weights")  # by content, wherever the file is
        for name in ("class_weights", "freeze", "lora", "private_weights_sha256"):
            if not values["client"][name]:
                values["client"].pop(name)
        if len(self.input_shape) == _IMAGE_DIMENSIONS:
            channels, *size = values.pop("input_shape")
            values |= {"in_channels": channels, "image_size": size}
        return values

    def _drop_unused(self, values: dict[str, Any]) -> None:
        """Remove callbacks, clipping, accumulation and scheduler where there is none."""
        trainer, client = values["trainer"], values["client"]
        if not self.trainer.callbacks:
            trainer.pop("callbacks")
        if self.trainer.gradient_clip_val is None:
            trainer.pop("gradient_clip_val")
            trainer.pop("gradient_clip_algorithm")
        if self.trainer.accumulate_grad_batches == 1:
            trainer.pop("accumulate_grad_batches")
        if self.client.scheduler is None:
            client.pop("scheduler")
            client.pop("scheduler_interval")
