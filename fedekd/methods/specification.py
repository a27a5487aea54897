"""What every client and the server are built from: models, data shape, optimizer and seeds, as plain values."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from fedekd.errors import UserError
from fedekd.models import MultiExitNetwork, build_model, multi_exit
from fedekd.modules import TrainerFactory
from fedekd.seeding import derive_seed
from fedekd.tasks import Task

Spec = Mapping[str, Any]  # {"class_path": ..., "init_args": {...}}

#: Up to this many pixels a side a ResNet with exits begins without reducing them: of 32, its stem would leave 8.
SMALL_IMAGE = 64

#: Optimizers of PyTorch's that no network here can be trained with, by name.
_UNFIT = {
    "LBFGS": "works out the loss several times in a step",
    "SparseAdam": "is for sparse gradients alone",
}

#: Optimizers whose fused form runs on CPUs too, and agrees with the plain one.
_FUSED = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)


@dataclass(frozen=True)
class ClientOptions:
    """What a client trains, and for how long.

    Args:
        local_epochs: Epochs of each training phase of a round, at least 1.
        private_model: The large model that stays with its client: class_path and init_args. A class of
            fedekd.models, or any image classifier, such as torchvision.models.resnet18. From Python a list gives
            each client a model of its own.
        private_models: In place of private_model several, dealt to the clients in turn: names, or class_path and
            init_args, as in [PrivateCNN, torchvision.models.resnet18]. Only the proxy is then alike everywhere.
        proxy_model: The small model that travels.
        optimizer: A torch.optim class: class_path and init_args.
        exits: Cut the private model into so many stages, each with an exit (see fedekd.models.multi_exit); null
            leaves it as it is, but for methods that need exits. A list is dealt to the clients in turn, as in
            [3, null]. A ResNet for images of up to 64 pixels is given a new stem, as is usual for them: 3x3, of
            stride 1, without a max-pool.
        exit_grid: The exits before the last pool their images to a grid of so many cells a side; 1 is the global
            average.
        depths: Clients that have less to compute with hold the first so many stages of the network alone, and their
            exits; a list is dealt to the clients in turn, as in [1, 2, 3]. Needs exits. Null gives all of them.
        lr_decay: The learning rate is multiplied by this after each round that a client is trained in, in (0, 1].
    """

    local_epochs: int = 2
    private_model: Spec | Sequence[Spec] = field(default_factory=lambda: {"class_path": "fedekd.models.PrivateCNN"})
    proxy_model: Spec = field(default_factory=lambda: {"class_path": "fedekd.models.ProxyCNN"})
    optimizer: Spec = field(default_factory=lambda: {"class_path": "torch.optim.Adam", "init_args": {"lr": 1e-4}})
    exits: int | Sequence[int | None] | None = None
    exit_grid: int = 1
    lr_decay: float = 1.0
    depths: int | Sequence[int] | None = None
    private_models: Sequence[str | Spec] | None = None

    def __post_init__(self) -> None:
        if self.local_epochs < 1:
            raise UserError(f"client.local_epochs is {self.local_epochs}, and must be at least 1")
        dealt = [self.exits] if isinstance(self.exits, int) else self.exits
        if dealt is not None and not (dealt and all(exits is None or exits >= 1 for exits in dealt)):
            raise UserError(f"client.exits is {self.exits}, and must be at least 1, or null")
        if self.exit_grid < 1:
            raise UserError(f"client.exit_grid is {self.exit_grid}, and must be at least 1")
        if not 0 < self.lr_decay <= 1:
            raise UserError(f"client.lr_decay is {self.lr_decay}, and must be above 0 and at most 1")
        if not isinstance(self.optimizer, Mapping) or "class_path" not in self.optimizer:
            raise UserError(f"client.optimizer is {self.optimizer!r}, and must have a class_path and init_args")
        package, _, name = self.optimizer["class_path"].rpartition(".")
        if package.startswith("torch.optim") and name in _UNFIT:
            raise UserError(f"client.optimizer is {package}.{name}, which {_UNFIT[name]}; take another")
        depths = [self.depths] if isinstance(self.depths, int) else self.depths
        if depths is not None and not (depths and min(depths) >= 1):
            raise UserError(f"client.depths is {self.depths}, and must be numbers of stages, at least 1, or null")
        if self.private_models is not None and not self.private_models:
            raise UserError("client.private_models is empty; it must name a model, or be null")

    def model_for(self, client_id: int | str) -> str | Spec:
        """The private model of a client, or the one that the server starts from: the first."""
        place = client_id if isinstance(client_id, int) else 0
        if self.private_models is not None:
            return self.private_models[place % len(self.private_models)]
        return self.private_model if isinstance(self.private_model, Mapping) else self.private_model[place]

    def exits_for(self, client_id: int | str) -> int | None:
        """Into how many stages a client's private model is cut; the server's as the first one's."""
        if isinstance(self.exits, Sequence):
            return self.exits[(client_id if isinstance(client_id, int) else 0) % len(self.exits)]
        return self.exits


@dataclass(frozen=True)
class FederationSpec:
    """Builds networks and optimizers alike wherever they are needed, from values that can travel.

    Attributes:
        task: `classification` or `regression`.
        in_channels: Channels of the images.
        image_size: Height and width of the images.
        num_outputs: Classes, or 1 for regression.
        batch_size: Samples of a training batch.
        eval_batch_size: Samples of an evaluation batch.
        seed: The federation's seed.
        num_clients: How many clients there are.
        rounds: How many rounds there will be.
        client: What a client trains.
        trainer: How it is trained; resolved.
    """

    task: Task
    in_channels: int
    image_size: tuple[int, int]
    num_outputs: int
    batch_size: int
    eval_batch_size: int
    seed: int
    client: ClientOptions
    trainer: TrainerFactory
    num_clients: int
    rounds: int

    def __post_init__(self) -> None:
        models = self.client.private_model
        if not isinstance(models, Mapping) and len(models) != self.num_clients:
            raise UserError(
                f"client.private_model lists {len(models)} models, and data.num_clients is {self.num_clients}"
            )
        if self.client.depths is not None and any(self.client.exits_for(n) is None for n in range(self.num_clients)):
            raise UserError("client.depths needs a network with exits; set --client.exits to a number of stages")

    def build_model(self, role: str, client_id: int | str) -> nn.Module:
        """A freshly initialized network on the training device.

        Args:
            role: `private` or `proxy`: which of the client's model specs.
            client_id: A client's number, or `server`; each has initial weights of its own.
        """
        spec = self.client.proxy_model if role == "proxy" else self.client.model_for(client_id)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(self.seed, client_id, role, "initial weights"))
            network = build_model(
                spec,
                in_channels=self.in_channels,
                image_size=self.image_size,
                num_classes=self.num_outputs,
                flag=f"client.{role}_model{'' if role == 'proxy' or self.client.private_models is None else 's'}",
            )
            if role == "private" and self.client.exits_for(client_id) is not None:
                network = self._with_exits(network, client_id)
        network.to(self.trainer.torch_device, self.trainer.dtype)
        # Of the layout, PyTorch's own stubs know only a call of its own.
        return network.to(memory_format=self.trainer.memory_format)

    def _with_exits(self, network: nn.Module, client_id: int | str) -> nn.Module:
        depth = self.depth(client_id)
        try:
            small = max(self.image_size) <= SMALL_IMAGE
            whole = multi_exit(
                network,
                self.num_outputs,
                self.client.exits_for(client_id),
                grid=self.client.exit_grid,
                cifar_stem=small,
            )
        except UserError as error:
            raise UserError(f"client.exits is {self.client.exits}: {error}") from error
        if depth is None:
            return whole
        try:
            return whole.shallow(depth)
        except UserError as error:
            raise UserError(f"client.depths is {self.client.depths}: {error}") from error

    def require_one_architecture(self, method: str) -> None:
        """Hold the clients to one private model.

        Raises:
            UserError: If they have several; it names the method that cannot use them.
        """
        if any(self.client.model_for(number) != self.client.model_for("server") for number in range(self.num_clients)):
            flag = "client.private_model" if self.client.private_models is None else "client.private_models"
            raise UserError(f"method {method} averages private models, and {flag} lists different ones")
        for name, dealt in (("exits", self.client.exits_for), ("depths", self.depth)):
            if len({dealt(number) for number in range(self.num_clients)}) > 1:
                raise UserError(f"method {method} averages private models, and client.{name} is not the same for all")

    def architecture_key(self, client_id: int | str) -> str:
        """What a client's private model is made from; clients of one kind have one architecture."""
        said = self.client
        return json.dumps([said.model_for(client_id), said.exits_for(client_id), self.depth(client_id)], sort_keys=True)

    def require_exits(self, method: str) -> MultiExitNetwork:
        """The server's network, which must have exits to distil.

        Raises:
            UserError: If it has not two exits at least, or there are no classes; it names the method.
        """
        if self.task == "regression":
            raise UserError(f"method {method} distils classes, and the task is regression; use FedAvg or FedeKD")
        network = self.build_model("private", "server")
        one = isinstance(network, MultiExitNetwork) and network.num_exits == 1 and self.client.depths is None
        if not isinstance(network, MultiExitNetwork) or one:
            raise UserError(f"method {method} needs exits; set --client.exits to a number of stages, at least 2")
        return network

    def depth(self, client_id: int | str) -> int | None:
        """How many stages a client has; the server has as many as the deepest of them. None is all of them."""
        depths = self.client.depths
        if depths is None or isinstance(depths, int):
            return depths
        if isinstance(client_id, int):
            return depths[client_id % len(depths)]
        return max(depths[: self.num_clients])

    def optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """The client's optimizer over `parameters`, fused where that is the same and faster on every device."""
        class_path, init_args = (
            self.client.optimizer["class_path"],
            dict(self.client.optimizer.get("init_args") or {}),
        )
        module, _, name = class_path.rpartition(".")
        optimizer_class = getattr(importlib.import_module(module), name)
        # jsonargparse fills in the defaults, so "not said" arrives as None.
        unsaid = init_args.get("fused") is None
        if unsaid and optimizer_class in _FUSED and not (init_args.get("foreach") or init_args.get("differentiable")):
            init_args["fused"] = True
        try:
            optimizer: torch.optim.Optimizer = optimizer_class(parameters, **init_args)
        except (TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"client.optimizer {class_path} does not take {init_args}: {error}") from error
        return optimizer

    def hash_dict(self) -> dict[str, Any]:
        """Everything here that decides what a client trains on its own, as plain values; for content hashes."""
        values = asdict(self)
        for name in ("num_clients", "rounds"):
            values.pop(name)
        values["trainer"].pop("device")  # which of several equal devices it was
        return values
