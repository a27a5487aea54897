"""The LightningModule under all others: a network trained on a sum of objectives, perhaps with a frozen teacher."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torchmetrics import MetricCollection

from fedekd.errors import UserError, nearest
from fedekd.functional import upcast_to_float32
from fedekd.metrics import build_metrics
from fedekd.modules.losses.distillation import LossTerm
from fedekd.modules.prediction import ModelOutput, predict, teacher_forward
from fedekd.tasks import TASKS, Task


def default_optimizer(parameters: Any) -> torch.optim.Optimizer:
    """The paper's optimizer: Adam with learning rate 1e-4."""
    return torch.optim.Adam(parameters, lr=1e-4)


class ObjectiveModule(LightningModule):
    """Trains `network` on the sum of its objectives.

    A batch is `(x, y)`: images (B, C, H, W), and classes (B,) or real targets (B,). A third and fourth item, where
    there are any, are the teacher's output and features for these samples, computed beforehand; otherwise the
    teacher runs at every step. The teacher stays in evaluation mode, gets no gradient and is not optimized.

    Logged once an epoch: `loss`, `loss/NAME` for each objective and what the objectives record; on validation and
    test `val/loss`, `val/accuracy` or `val/rmse`, and the same under `test/`. (`loss` of an evaluation is the
    supervised one.) Sums stay on the device: no step waits for it.

    Args:
        network: What is trained.
        objectives: The terms of the loss.
        task: `classification` or `regression`.
        optimizer: Makes the optimizer from the parameters.
        teacher: The frozen network, if any.
        with_features: Whether the objectives need the networks' features.

    Raises:
        UserError: If the task is not known, or the network is its own teacher.
    """

    def __init__(
        self,
        network: nn.Module,
        objectives: Sequence[LossTerm],
        task: Task = "classification",
        optimizer: OptimizerCallable = default_optimizer,
        teacher: nn.Module | None = None,
        with_features: bool = False,
    ) -> None:
        super().__init__()
        if task not in TASKS:
            raise UserError(f"task is {task!r}, which is not known; {nearest(task, TASKS)}")
        if teacher is network:
            raise UserError("a network cannot be its own teacher: it would be frozen, and nothing trained")
        self.network, self.objectives = network, objectives
        # Not a submodule: it is nobody's to train, to count, to save or to wrap for distributed training.
        self._teacher = (teacher,)
        self.task, self.make_optimizer, self.with_features = task, optimizer, with_features
        self.carries_optimizer_state = False
        self.optimizer_state: dict[str, Any] | None = None
        self.loss_scale: dict[str, Any] = {}
        self.lr_factor = 1.0
        self.epoch_means: dict[str, float] = {}
        self.val_metrics = build_metrics(task).clone(prefix="val/")
        self.test_metrics = build_metrics(task).clone(prefix="test/")
        self._sums: dict[str, Tensor] = {}
        self._seen = 0
        self._batch_size = 0

    def forward(self, x: Tensor) -> Any:
        """The network's own output."""
        return self.network(x)

    @property
    def teacher(self) -> nn.Module | None:
        """The frozen network, if any."""
        return self._teacher[0]

    def on_fit_start(self) -> None:
        """Lightning keeps the mode it finds, and a network that was scored before is in evaluation mode."""
        self.train()
        if self.teacher is not None:
            self.teacher.to(device=self.device, dtype=self.dtype)  # type: ignore[arg-type]
        if self.loss_scale:
            self.trainer.precision_plugin.load_state_dict(self.loss_scale)

    def record(self, name: str, value: Tensor) -> None:
        """Add a batch's mean to the epoch's mean of `name`, weighted by the batch's size."""
        weighted = value.detach() * self._batch_size
        self._sums[name] = self._sums[name] + weighted if name in self._sums else weighted

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The sum of the objectives, a scalar."""
        x, y, *teacher_outputs = batch
        self._batch_size = len(x)
        self._seen += len(x)
        teacher = self._teach(x, tuple(teacher_outputs))
        student = predict(self.network, x, self.with_features)
        losses = {}
        for objective in self.objectives:
            losses[objective.name] = objective(student, teacher, y, self.record)
        for name, loss in losses.items():
            self.record(f"loss/{name}", loss)
        total = torch.stack(list(losses.values())).sum() if len(losses) > 1 else next(iter(losses.values()))
        self.record("loss", total)
        return total

    def _teach(self, x: Tensor, teacher_outputs: tuple[Tensor, ...]) -> ModelOutput | None:
        if self.teacher is None:
            return None
        if teacher_outputs:
            return ModelOutput.from_tensors(teacher_outputs)
        return teacher_forward(self.teacher, x, self.with_features)

    def on_train_epoch_start(self) -> None:
        """Begin the epoch's means anew."""
        self._sums, self._seen = {}, 0

    def on_train_epoch_end(self) -> None:
        """Log the epoch's means, and keep them as `epoch_means`."""
        if self._seen:
            names = list(self._sums)
            means = torch.stack([self._sums[name].float() for name in names]).cpu().double() / self._seen
            self.epoch_means = dict(zip(names, means.tolist(), strict=True))
            self.log_dict(self.epoch_means, batch_size=self._seen, sync_dist=True)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Score the network on a validation batch."""
        self._evaluate(batch, self.val_metrics, "val")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Score the network on a test batch."""
        self._evaluate(batch, self.test_metrics, "test")

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The network's output, of several exits the last one's, for a batch `(x, y)` or for images alone."""
        return predict(self.network, batch[0] if isinstance(batch, list | tuple) else batch).output

    def _evaluate(self, batch: Any, metrics: MetricCollection, stage: str) -> None:
        x, y, *_ = batch
        self._score(predict(self.network, x), y, metrics, stage)

    def _score(self, prediction: ModelOutput, targets: Tensor, metrics: MetricCollection, stage: str) -> None:
        """Log how good the last exit is on a batch of an evaluation."""
        output = upcast_to_float32(prediction.output)
        if self.task == "regression":
            output, targets = output.reshape(-1), targets.reshape(-1)
            loss = torch.nn.functional.mse_loss(output, targets.to(output.dtype))
        else:
            loss = torch.nn.functional.cross_entropy(output, targets)
        metrics.update(output, targets)
        self.log(f"{stage}/loss", loss, batch_size=len(targets), on_epoch=True)
        self.log_dict(metrics, batch_size=len(targets))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The network's optimizer, its learning rates times `lr_factor`.

        Where `carries_optimizer_state` is set, it goes on from `optimizer_state`.
        """
        optimizer = self.make_optimizer(self.network.parameters())
        rates: list[Any] = [group.get("lr") for group in optimizer.param_groups]
        if self.carries_optimizer_state and self.optimizer_state is not None:
            optimizer.load_state_dict(self.optimizer_state)
        if self.lr_factor != 1.0:
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * self.lr_factor  # what was loaded holds that of the last phase
        return optimizer

    def on_train_end(self) -> None:
        """Keep what a new Trainer would begin anew: the loss scale of float16, and the optimizer's state if asked."""
        self.loss_scale = dict(self.trainer.precision_plugin.state_dict())
        if self.carries_optimizer_state:
            optimizer: Any = self.optimizers(use_pl_optimizer=False)
            self.optimizer_state = optimizer.state_dict()
