"""Base LightningModule: a network trained on a sum of loss terms."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters
from lightning.pytorch.utilities.types import LRSchedulerTypeUnion, OptimizerLRScheduler
from torch import Tensor, nn
from torchmetrics import MetricCollection

from fedekd.errors import UserError, require_choice
from fedekd.functional import upcast_to_float32
from fedekd.metrics import build_metrics
from fedekd.models.freezing import keep_frozen_statistics, trained_parameters
from fedekd.modules.losses import LossTerm, SupervisedLoss
from fedekd.modules.prediction import ModelOutput, predict, teacher_forward
from fedekd.modules.schedule import Schedule
from fedekd.tasks import TASKS, Task


def fedekd_optimizer(parameters: Any) -> torch.optim.Optimizer:
    """Create the optimizer of FedeKD: Adam with learning rate 1e-4."""
    return torch.optim.Adam(parameters, lr=1e-4)


class ObjectiveModule(LightningModule):
    """LightningModule that trains a network on the sum of its loss terms.

    A batch is `(x, y)`: images (B, C, H, W), and class indices or real targets (B,). An optional third and fourth item
    are the teacher's outputs and features for these samples, computed in advance; without them the teacher runs at
    every step. The teacher is in evaluation mode, gets no gradient and is not optimized. Samples for which its output
    is not finite are not distilled.

    Logs per epoch `loss`, `loss/NAME` of each term and the scalars that terms record; in validation and test
    `val/loss` (cross-entropy or squared error of the last exit) and `val/<metric>` with the task's primary metric
    (`fedekd.metrics`), and the same under `test/`. Sums stay on the device, so no step synchronises. With several
    processes all values are means over all of them.

    A checkpoint of LightningCLI has the configuration of the module: `load_from_checkpoint(path)` builds its networks.
    Otherwise it has the arguments that are plain values or tensors, and the class names of other optional ones but
    `optimizer`: networks and such objects are passed again, as in `load_from_checkpoint(path, network=...)`. A
    checkpoint of this base class from Python has no arguments.

    Args:
        network: The network to train.
        loss_terms: Terms of the loss; any objects like `LossTerm`.
        task: `classification` or `regression`.
        optimizer: Creates the optimizer from the parameters; default Adam, learning rate 1e-4.
        teacher: The frozen network, if any.
        with_features: True if a term needs the features of both networks.

    Attributes:
        epoch_means: Means that were logged in the last training epoch.
        carries_optimizer_state: If True, training starts from `optimizer_state` and sets it at the end.
        lr: Learning rate of all parameter groups, as Lightning's learning rate finder sets it; None (default) keeps
            those of the optimizer.
        lr_factor: Factor of all learning rates.
        schedule: Learning rate schedule of the phase; None (default) keeps the rates.
        samples_seen: Samples of the epoch so far.
        capturable: Whether a step depends on tensors only, not on values in Python that change during a phase: then
            `fedekd.modules.lean_loop` may capture it as a CUDA graph.

    Raises:
        UserError: If the task is unknown, or the network is its own teacher.

    Example:
        >>> from fedekd.models import ProxyCNN
        >>> module = ObjectiveModule(ProxyCNN(), [SupervisedLoss("classification")])
        >>> [term.name for term in module.loss_terms]
        ['supervised']
    """

    capturable = False

    def __init__(
        self,
        network: nn.Module,
        loss_terms: Sequence[LossTerm],
        task: Task = "classification",
        optimizer: OptimizerCallable = fedekd_optimizer,
        teacher: nn.Module | None = None,
        with_features: bool = False,
    ) -> None:
        super().__init__()
        require_choice("task", task, TASKS)
        if teacher is network:
            raise UserError("teacher: expected another network than the trained one, which would be frozen")
        self.network, self.loss_terms = network, loss_terms
        # In a tuple, out of the module tree: excluded from parameters(), state_dict(), train() and DDP.
        self._teacher = (teacher,)
        self.task, self.make_optimizer, self.with_features = task, optimizer, with_features
        self.carries_optimizer_state = False
        self.optimizer_state: dict[str, Any] | None = None
        self.loss_scale: dict[str, Any] = {}
        self.lr: float | None = None
        self.lr_factor = 1.0
        self.schedule: Schedule | None = None
        self.epoch_means: dict[str, float] = {}
        self.evaluation_metrics = nn.ModuleDict()  # see `_stage_metrics`
        self._sums: dict[str, Tensor] = {}
        self.samples_seen = 0
        self._batch_size = 0
        self._save_arguments()

    def _save_arguments(self, **arguments: Any) -> None:
        """Save the configuration of LightningCLI, or these arguments.

        Objects are saved as their class name: the constructor refuses it, so that none is silently replaced by a
        default.
        """
        if _given_hyperparameters.get() is not None:
            self.save_hyperparameters()
        else:
            # Without a frame, Lightning keeps its own in a cycle, and with it the locals of all callers.
            plain = {name: _plain(value) for name, value in arguments.items()}
            self.save_hyperparameters(plain, frame=inspect.currentframe())

    def forward(self, x: Tensor) -> Any:
        """Return the network's output."""
        return self.network(x)

    @property
    def teacher(self) -> nn.Module | None:
        """The frozen network, if any."""
        return self._teacher[0]

    def train(self, mode: bool = True) -> Self:
        """Set the mode; layers with frozen buffers stay in evaluation mode."""
        super().train(mode)
        keep_frozen_statistics(self)
        return self

    def on_fit_start(self) -> None:
        """Set train mode, which Lightning does not restore, and move the teacher.

        Frozen parts in evaluation mode stay in it, such as a backbone whose BatchNorm statistics are kept.
        """
        kept = [part for part in self.network.modules() if not part.training and _is_frozen(part)]
        self.train()
        for part in kept:
            part.eval()
        self._sums, self.samples_seen = {}, 0
        if self.teacher is not None:
            self.teacher.to(device=self.device, dtype=next(self.network.parameters()).dtype)
        if self.loss_scale:
            self.trainer.precision_plugin.load_state_dict(self.loss_scale)

    def set_class_weights(self, weights: Tensor | None) -> None:
        """Weight the classes in all supervised losses, also within other terms.

        Args:
            weights: Weight of each class, shape (C,), on the device of the training; None weights all samples equally.
        """
        for loss in _supervised_losses(self.loss_terms):
            loss.class_weights = weights

    def record(self, name: str, value: Tensor) -> None:
        """Add a batch's mean to the epoch's mean of `name`, weighted by the batch size."""
        weighted = upcast_to_float32(value.detach()) * self._batch_size
        if name in self._sums:
            self._sums[name] += weighted  # in place: a CUDA graph adds to the same tensor at every replay
        else:
            self._sums[name] = weighted

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Compute the sum of the loss terms, a scalar."""
        x, y, *teacher_outputs = _items(batch)
        self._count(len(y))
        teacher = self._teacher_output(x, tuple(teacher_outputs))
        student = predict(self.network, x, self.with_features)
        if teacher is not None:
            teacher = teacher.finite_teacher_of(student)
        losses = [term(student, teacher, y, self.record) for term in self.loss_terms]
        for term, loss in zip(self.loss_terms, losses, strict=True):
            self.record(f"loss/{term.name}", loss)
        total = torch.stack(losses).sum() if len(losses) > 1 else losses[0]
        self.record("loss", total)
        return total

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _count(self, batch_size: int) -> None:
        """Count a batch, outside of compiled steps: each count would be a new graph."""
        self._batch_size = batch_size
        self.samples_seen += batch_size

    def _teacher_output(self, x: Tensor, teacher_outputs: tuple[Tensor, ...]) -> ModelOutput | None:
        if self.teacher is None:
            return None
        if teacher_outputs:
            output: Any = teacher_outputs[0]
            if not isinstance(output, Tensor) or not output.is_floating_point() or output.ndim < 2:
                is_tensor = isinstance(output, Tensor)
                got = f"{output.dtype} of shape {tuple(output.shape)}" if is_tensor else f"a {type(output).__name__}"
                raise UserError(f"batch: expected the teacher's outputs (B, C) as the third item, got {got}")
            return ModelOutput.from_tensors(teacher_outputs)
        return teacher_forward(self.teacher, x, self.with_features)

    def on_train_epoch_start(self) -> None:
        """Reset the means of the epoch."""
        for total in self._sums.values():
            total.zero_()
        self.samples_seen = 0

    def on_train_epoch_end(self) -> None:
        """Log the means of the epoch, and keep them as `epoch_means`."""
        if self.samples_seen:
            totals, samples = torch.stack([total.float() for total in self._sums.values()]), self.samples_seen
            if getattr(self.trainer, "world_size", 1) > 1:
                counted = torch.cat([totals, totals.new_tensor([samples])])
                counted = self.trainer.strategy.reduce(counted, reduce_op="sum")
                totals, samples = counted[:-1], int(counted[-1])
            means = totals.cpu().double() / samples
            self.epoch_means = dict(zip(self._sums, means.tolist(), strict=True))
            if not self.trainer.barebones:  # then `log` does nothing but warn
                self.log_dict(self.epoch_means, batch_size=self.samples_seen, sync_dist=True)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Evaluate a validation batch."""
        self._evaluate(batch, "val")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Evaluate a test batch."""
        self._evaluate(batch, "test")

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Return the output of the last exit for a batch `(x, y)` or for images only."""
        return predict(self.network, batch if isinstance(batch, Tensor) else _items(batch, (1, 2, 3, 4))[0]).output

    def _evaluate(self, batch: Any, stage: str) -> None:
        x, y, *_ = _items(batch)
        self._log_evaluation(predict(self.network, x), y, stage)

    def _log_evaluation(self, prediction: ModelOutput, targets: Tensor, stage: str) -> None:
        """Log loss and metric of the last exit for one evaluation batch."""
        output = upcast_to_float32(prediction.output)
        if self.task == "regression":
            output, targets = output.reshape(-1), targets.reshape(-1)
            loss = torch.nn.functional.mse_loss(output, targets.to(output.dtype))
        else:
            loss = torch.nn.functional.cross_entropy(output, targets)
        self.log(f"{stage}/loss", loss, batch_size=len(targets), on_epoch=True, sync_dist=True)
        self._log_metrics(self._stage_metrics(stage)[0], output, targets)

    def _log_metrics(self, metrics: MetricCollection, output: Tensor, targets: Tensor) -> None:
        metrics.update(output, targets)
        self.log_dict(metrics, batch_size=len(targets))

    def _stage_metrics(self, stage: str) -> list[MetricCollection]:
        """Return the metrics of a stage, one collection per name of `_metric_prefixes`.

        They are built at the first evaluation: for small clients they cost more than a training step.
        """
        if not self.evaluation_metrics:
            for name in ("val", "test"):
                metrics = build_metrics(self.task)
                clones = [metrics.clone(prefix=f"{name}/{prefix}") for prefix in self._metric_prefixes()]
                self.evaluation_metrics[name] = nn.ModuleList(clones).to(self.device)
            self._metric_attributes = None  # Lightning's cache of the metrics that a module may log
        collections: Any = self.evaluation_metrics[stage]
        return list(collections)

    def _metric_prefixes(self) -> list[str]:
        """Return prefixes of the names of metrics in the logs, the last exit's first."""
        return [""]

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Create optimizer and schedule; apply `lr_factor` and carried states."""
        optimizer = self.make_optimizer(trained_parameters(self.network))
        for group in optimizer.param_groups if self.lr is not None else []:
            group["lr"] = self.lr
        scheduler = None if self.schedule is None else self.schedule.attach(optimizer)
        rates: list[Any] = [group.get("lr") for group in optimizer.param_groups]
        if self.carries_optimizer_state and self.optimizer_state is not None:
            optimizer.load_state_dict(self.optimizer_state)
        if self.schedule is not None and scheduler is not None:
            self.schedule.begin(self.lr_factor)
            return {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": scheduler, "interval": self.schedule.interval},
            }
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            if rate is not None:  # the loaded state has the rate of the last phase, which a callback may have changed
                group["lr"] = rate * self.lr_factor
        return optimizer

    def lr_scheduler_step(self, scheduler: LRSchedulerTypeUnion, metric: Any | None) -> None:
        """Step the schedule, and apply `lr_factor` to its learning rates."""
        if self.schedule is not None and scheduler is self.schedule.scheduler:
            self.schedule.step()
        else:
            super().lr_scheduler_step(scheduler, metric)

    def on_train_end(self) -> None:
        """Keep what a new Trainer resets: loss scale and carried optimizer state."""
        self.loss_scale = dict(self.trainer.precision_plugin.state_dict())
        if self.carries_optimizer_state:
            optimizer: Any = self.optimizers(use_pl_optimizer=False)
            self.optimizer_state = optimizer.state_dict()


class SupervisedModule(ObjectiveModule):
    """LightningModule that trains a network on L_sup only, as in local training.

    Args:
        network: The network to train.
        task: `classification` (logits (B, C)) or `regression` (outputs (B, 1)).
        optimizer: Creates the optimizer from the parameters; default Adam, learning rate 1e-4.
        offset: Added to the outputs in the loss, shape (C,), such as the log prior of the classes; None adds nothing.
    """

    capturable = True

    def __init__(
        self,
        network: nn.Module,
        task: Task = "classification",
        optimizer: OptimizerCallable = fedekd_optimizer,
        offset: Tensor | None = None,
    ) -> None:
        super().__init__(network, [SupervisedLoss(task, offset=offset)], task, optimizer)
        self._save_arguments(task=task, offset=offset)


def _is_frozen(part: nn.Module) -> bool:
    parameters = [*part.parameters()]
    return bool(parameters) and not any(parameter.requires_grad for parameter in parameters)


def _items(batch: Any, lengths: tuple[int, ...] = (2, 3, 4)) -> Sequence[Any]:
    """Return the items of a batch.

    Raises:
        UserError: It has other items than inputs and targets, and outputs of a teacher.
    """
    if isinstance(batch, list | tuple) and len(batch) in lengths:
        return batch
    got = f"{len(batch)} items" if isinstance(batch, list | tuple) else f"a {type(batch).__name__}"
    raise UserError(f"batch: expected (x, y) or (x, y, teacher outputs, teacher features), got {got}")


def _plain(value: Any) -> Any:
    """Return a value for a checkpoint that `torch.load` reads with `weights_only`."""
    if isinstance(value, Tensor):
        return value.detach()

    def convert(item: Any) -> Any:
        kind = type(item)
        return item.tolist() if hasattr(item, "tolist") else f"{kind.__module__}.{kind.__qualname__}"

    return json.loads(json.dumps(value, default=convert))


def _supervised_losses(terms: Sequence[object]) -> Iterator[SupervisedLoss]:
    """Yield the supervised losses among the terms and within them, at any depth."""
    seen: set[int] = set()
    pending: list[object] = list(terms)
    while pending:
        value = pending.pop()
        if id(value) in seen or isinstance(value, str | bytes | Tensor | type):
            continue
        seen.add(id(value))
        if isinstance(value, SupervisedLoss):
            yield value
        if isinstance(value, Mapping):
            pending += value.values()
        elif isinstance(value, list | tuple | set):
            pending += value
        elif callable(value):  # a loss or a module, with its attributes
            pending += getattr(value, "__dict__", {}).values()
