"""Options of a client: its models, its optimizer, and how long it trains."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from fedekd.atomic import digest
from fedekd.errors import UserError, require, require_choice, shorten
from fedekd.global_state import isolated_rng
from fedekd.models.build import parse_model
from fedekd.models.freezing import BACKBONE
from fedekd.models.lora import LoraOptions
from fedekd.models.pretrained import has_pretrained_weights
from fedekd.models.weights import read_weights
from fedekd.modules.schedule import Interval

ModelSpec = Mapping[str, Any]
"""`class_path` and optionally `init_args`."""

WEIGHTS = "client.private_weights"
"""Name of the option in errors."""

#: Optimizers of PyTorch that cannot train a client's network, with the reason.
_UNSUPPORTED_OPTIMIZERS = {
    "LBFGS": "it evaluates the loss several times per step",
    "SparseAdam": "it accepts sparse gradients only",
}

#: Optimizers with a fused form that runs on CPUs and gives the same result.
_FUSED = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)

#: Arguments of PyTorch's schedulers that are functions, given by their import path.
_FUNCTIONS = ("lr_lambda", "scale_fn")

#: Scheduler steps that are tried before training.
_MOST_STEPS = 100_000


def build_optimizer(
    spec: ModelSpec, parameters: Iterable[nn.Parameter], allow_fused: bool = True
) -> torch.optim.Optimizer:
    """Create an optimizer, in fused form where the result is the same.

    Args:
        spec: `class_path` and optionally `init_args`.
        parameters: The parameters to train.
        allow_fused: False for the plain form unless the arguments have another one.
    """
    init_args = dict(spec.get("init_args") or {})
    optimizer_class: Any = _imported(spec["class_path"])
    # jsonargparse fills in defaults, so an option that was not given is None.
    is_default = init_args.get("fused") is None
    uses_other_form = init_args.get("foreach") or init_args.get("differentiable")
    if allow_fused and is_default and optimizer_class in _FUSED and not uses_other_form:
        init_args["fused"] = True
    optimizer: torch.optim.Optimizer = optimizer_class(parameters, **init_args)
    if optimizer_class is torch.optim.SGD and is_default and init_args.get("momentum"):
        optimizer.register_load_state_dict_post_hook(_unfuse_partial_momentum)
    return optimizer


def _unfuse_partial_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Disable the fused form if the loaded state lacks momentum of some parameters.

    PyTorch's fused SGD raises a TypeError there, as after FML has dropped the proxy's state.
    """
    for group in optimizer.param_groups:
        if 0 < sum(parameter in optimizer.state for parameter in group["params"]) < len(group["params"]):
            group["fused"] = False


def build_scheduler(spec: ModelSpec, optimizer: torch.optim.Optimizer) -> LRScheduler:
    """Create the learning rate scheduler of an optimizer.

    Args:
        spec: `class_path` and optionally `init_args`. Functions, such as `lr_lambda`, are given by their import path.
        optimizer: The optimizer whose learning rates are scheduled.
    """
    arguments = {
        name: _imported(value) if name in _FUNCTIONS and isinstance(value, str) else value
        for name, value in (spec.get("init_args") or {}).items()
    }
    scheduler: LRScheduler = _imported(spec["class_path"])(optimizer, **arguments)
    return scheduler


def scheduler_paths(spec: ModelSpec | None) -> Iterator[str]:
    """Yield the import paths in the specification of a scheduler."""
    if spec is not None:
        yield spec["class_path"]
        for name, value in (spec.get("init_args") or {}).items():
            if name in _FUNCTIONS and isinstance(value, str):
                yield value


def _imported(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)


def check_optimizer(spec: ModelSpec) -> None:
    """Build an optimizer and take one step on two small parameters.

    Args:
        spec: `class_path` and optionally `init_args`.

    Raises:
        UserError: If the optimizer rejects its arguments; the message names the argument whose default is accepted.
    """
    _require_accepted("client.optimizer", spec, _failure)


def check_scheduler(spec: ModelSpec, optimizer: ModelSpec, steps: int = 1) -> None:
    """Build a scheduler and take steps on the optimizer of two small parameters.

    Args:
        spec: The scheduler: `class_path` and optionally `init_args`.
        optimizer: The optimizer, likewise.
        steps: Number of steps, of which the first 100,000 are taken. Default 1.

    Raises:
        UserError: If the scheduler needs a metric, rejects its arguments, ends before these steps, or has state other
            than plain values; the message names the argument whose default is accepted.
    """

    def failure(scheduler: ModelSpec) -> Exception | None:
        return _failure(optimizer, scheduler, min(steps, _MOST_STEPS))

    _require_accepted("client.scheduler", spec, failure)


def _require_accepted(option: str, spec: ModelSpec, failure: Callable[[ModelSpec], Exception | None]) -> None:
    """Raise a UserError if a class fails.

    It names the argument without which the class does not fail, if there is one.
    """
    error = failure(spec)
    if error is None:
        return
    if isinstance(error, UserError):
        raise error
    class_path, init_args = spec["class_path"], dict(spec.get("init_args") or {})
    for name, value in init_args.items():
        rest = {key: other for key, other in init_args.items() if key != name}
        if failure({"class_path": class_path, "init_args": rest}) is None:
            option, expected, actual = f"{option}.{name}", "a value that", value
            break
    else:
        expected, actual = "arguments that", init_args
    raise UserError(
        f"{option}: expected {expected} {shorten(class_path)} accepts, got {shorten(repr(actual))}."
        f" It reports: {shorten(str(error) or type(error).__name__, 160)}"
    ) from error


def _failure(spec: ModelSpec, scheduler: ModelSpec | None = None, steps: int = 1) -> Exception | None:
    """Return the error of using an optimizer and a scheduler, if there is one."""
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in ((1, 1), (1,))]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    try:
        with isolated_rng(0):
            optimizer = build_optimizer(spec, parameters)
            if not (spec.get("init_args") or {}).get("capturable"):  # needs parameters on CUDA
                optimizer.step()
            if scheduler is not None:
                _use_scheduler(scheduler, optimizer, steps)
    except Exception as error:  # a user's optimizer may raise anything
        return error
    return None


def _use_scheduler(spec: ModelSpec, optimizer: torch.optim.Optimizer, steps: int) -> None:
    """Build a scheduler, and take some steps.

    Raises:
        UserError: If it is no scheduler, needs a metric, or has state that no checkpoint can hold.
    """
    scheduler = build_scheduler(spec, optimizer)
    allowed = isinstance(scheduler, LRScheduler) and not isinstance(scheduler, ReduceLROnPlateau)
    require(
        allowed,
        "client.scheduler",
        "a scheduler that needs no metric",
        spec["class_path"],
        "A phase has no validation batches: use another, such as CosineAnnealingLR.",
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*`lr_scheduler.step\\(\\)` before `optimizer.step\\(\\)`")
        for _ in range(steps):
            scheduler.step()
    for name, value in scheduler.state_dict().items():
        require(
            _is_plain(value),
            "client.scheduler",
            f"a state_dict of numbers, text and tensors in {type(scheduler).__name__}",
            {name: value},
        )


def _is_plain(value: Any) -> bool:
    """Return whether a checkpoint can hold a value."""
    if isinstance(value, Mapping):
        return all(map(_is_plain, (*value, *value.values())))
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str | Tensor)


@dataclass(frozen=True)
class ClientOptions:
    """Models, optimizer and epochs of a client.

    Args:
        local_epochs: Epochs of each training phase of a round, at least 1.
        private_model: The large model, which stays on its client: class_path and init_args. A class of fedekd.models,
            or an image classifier such as torchvision.models.resnet18. From Python, a list gives one model per client.
        private_models: Several private models instead of private_model, assigned to the clients round-robin: names, or
            class_path and init_args, as in [PrivateCNN, torchvision.models.resnet18]. All clients share one proxy
            architecture.
        proxy_model: The small model, which is exchanged with the server: class_path and init_args.
        optimizer: A class of torch.optim: class_path and init_args.
        exits: Number of stages into which the private model is split, each with an exit (fedekd.models.multi_exit), at
            least 1; null keeps the model as it is, unless the method needs exits. A list is assigned to the clients
            round-robin, as in [3, null]. For images of up to 64 pixels a ResNet gets the usual CIFAR stem: 3x3
            convolution, stride 1, no max-pool.
        exit_grid: Cells per side of the pooling in the exits before the last, 1 to 64; 1 is global average pooling.
        depths: Number of leading stages that a client holds, with their exits, at least 1; for clients with less
            compute. A list is assigned round-robin, as in [1, 2, 3]. Requires exits; null gives all stages.
        lr_decay: Factor of the learning rate per supervised round of the client, in (0, 1].
        scheduler: A class of torch.optim.lr_scheduler, or a function of the optimizer that returns such an object:
            class_path and init_args. The schedule of each network continues from round to round, even if its optimizer
            state is reset. lr_decay multiplies its rates. null keeps the rates.
        scheduler_interval: epoch steps the scheduler after each epoch, step after each step of the optimizer.
        class_weights: balanced weights the cross-entropy of each client's training samples by n / (k n_c), with n_c of
            n training samples in class c and k classes among them, also in the local baseline; null weights all
            samples equally.
        private_weights: File with initial weights of the private model: a state_dict written by torch.save, or a
            model.safetensors of fedekd export. A last linear layer with another number of outputs is replaced by a new
            one. Every process and site needs the file under this path; null for none.
        freeze: Parameters of the private model that are not trained: patterns of their names, as in
            ['backbone.conv1.*', 'backbone.layer1.*'], each of which must match; or backbone for all but the last
            linear layer, or for a network with exits all but the heads. BatchNorm in frozen parts keeps its
            statistics. Frozen tensors are not exchanged. With weights from a file, of torchvision or of timm, or with
            frozen parts, initial weights are equal at all clients; null trains all.
        lora: Low-rank adapters of the private model, as in lora.r 8, through peft (pip install 'fedekd[lora]'). All
            other weights are frozen, except the last linear layer, or the heads of a network with exits. null trains
            all.

    Raises:
        UserError: If a value is out of range, or the file of the weights cannot be read.
    """

    local_epochs: int = 2
    private_model: ModelSpec | Sequence[ModelSpec] = field(
        default_factory=lambda: {"class_path": "fedekd.models.PrivateCNN"}
    )
    proxy_model: ModelSpec = field(default_factory=lambda: {"class_path": "fedekd.models.ProxyCNN"})
    optimizer: ModelSpec = field(default_factory=lambda: {"class_path": "torch.optim.Adam", "init_args": {"lr": 1e-4}})
    exits: int | Sequence[int | None] | None = None
    exit_grid: int = 1
    lr_decay: float = 1.0
    depths: int | Sequence[int] | None = None
    private_models: Sequence[str | ModelSpec] | None = None
    class_weights: str | None = None
    scheduler: ModelSpec | None = None
    scheduler_interval: Interval = "epoch"
    private_weights: str | None = None
    freeze: Sequence[str] | str | None = None
    lora: LoraOptions | None = None

    #: SHA-256 of the file `private_weights`; empty without one.
    private_weights_sha256: str = field(init=False, default="")

    def __post_init__(self) -> None:
        exits = [self.exits] if isinstance(self.exits, int) else self.exits
        depths = [self.depths] if isinstance(self.depths, int) else self.depths
        require(self.local_epochs >= 1, "client.local_epochs", "at least 1", self.local_epochs)
        require(
            exits is None or (len(exits) > 0 and all(number is None or number >= 1 for number in exits)),
            "client.exits",
            "at least 1, or null",
            self.exits,
        )
        require(1 <= self.exit_grid <= 64, "client.exit_grid", "1 to 64", self.exit_grid)
        require(
            self.class_weights in (None, "balanced"), "client.class_weights", "balanced or null", self.class_weights
        )
        require(0 < self.lr_decay <= 1, "client.lr_decay", "a number in (0, 1]", self.lr_decay)
        require(
            isinstance(self.optimizer, Mapping) and "class_path" in self.optimizer,
            "client.optimizer",
            "class_path and init_args",
            self.optimizer,
        )
        package, _, name = self.optimizer["class_path"].rpartition(".")
        reason = _UNSUPPORTED_OPTIMIZERS.get(name) if package.startswith("torch.optim") else None
        require(
            reason is None,
            "client.optimizer",
            "an optimizer with one loss and dense gradients per step",
            f"{package}.{name}",
            f"Choose another: {reason}.",
        )
        check_optimizer(self.optimizer)
        require_choice("client.scheduler_interval", self.scheduler_interval, ("epoch", "step"))
        if self.scheduler is not None:
            require(
                isinstance(self.scheduler, Mapping) and "class_path" in self.scheduler,
                "client.scheduler",
                "class_path and init_args, or null",
                self.scheduler,
            )
            check_scheduler(self.scheduler, self.optimizer)
        require(
            depths is None or (len(depths) > 0 and min(depths) >= 1),
            "client.depths",
            "numbers of stages, each at least 1, or null",
            self.depths,
        )
        require(
            self.private_models is None or len(self.private_models) > 0,
            "client.private_models",
            "at least one model, or null",
            self.private_models,
        )
        require(
            self.freeze is None
            or self.freeze == BACKBONE
            or (not isinstance(self.freeze, str) and len(self.freeze) > 0),
            "client.freeze",
            "a list of at least one pattern, backbone or null",
            self.freeze,
        )
        if self.lora is not None:
            object.__setattr__(self, "lora", LoraOptions.of(self.lora))
            require(self.freeze is None, "client.freeze", "null with client.lora, which freezes the rest", self.freeze)
        self._read_weights()

    def _read_weights(self) -> None:
        """Set the digest of the file of weights."""
        if self.private_weights is None:
            return
        is_one = self.private_models is None and isinstance(self.private_model, Mapping)
        require(is_one, WEIGHTS, "null with several private models", self.private_weights)
        object.__setattr__(self, "private_weights_sha256", digest(read_weights(self.private_weights, WEIGHTS)))

    def starts_equal(self, client_id: int | str) -> bool:
        """Return True if all clients have the initial weights of the server."""
        return self.has_frozen_parts or self.is_pretrained(client_id)

    @property
    def has_frozen_parts(self) -> bool:
        """True if parameters of the private model are frozen."""
        return self.freeze is not None or self.lora is not None

    def is_pretrained(self, client_id: int | str) -> bool:
        """Return True for a private model with pretrained weights."""
        if self.private_weights is not None:
            return True
        return has_pretrained_weights(*parse_model(self.model_for(client_id), "client.private_model"))

    def model_for(self, client_id: int | str) -> str | ModelSpec:
        """Return the private model of a client; for `server`, that of client 0."""
        index = client_id if isinstance(client_id, int) else 0
        if self.private_models is not None:
            return self.private_models[index % len(self.private_models)]
        return self.private_model if isinstance(self.private_model, Mapping) else self.private_model[index]

    def exits_for(self, client_id: int | str) -> int | None:
        """Return the number of exits of a client; for `server`, that of client 0."""
        if isinstance(self.exits, Sequence):
            return self.exits[(client_id if isinstance(client_id, int) else 0) % len(self.exits)]
        return self.exits
