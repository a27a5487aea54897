"""SAFE-KD's training: a network all of whose exits learn from the labels, from a teacher, and from the deepest exit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchmetrics import MetricCollection

from fedekd.errors import UserError
from fedekd.functional import upcast_to_float32
from fedekd.metrics import build_metrics
from fedekd.modules.losses.distillation import LossTerm, SupervisedLoss
from fedekd.modules.losses.exits import DKDLoss, SelfDistillationLoss, require_exit_weights
from fedekd.modules.objective_module import ObjectiveModule
from fedekd.modules.prediction import ModelOutput


def default_optimizer(parameters: Any) -> torch.optim.Optimizer:
    """SAFE-KD's optimizer: AdamW with learning rate 3e-4 and weight decay 0.05."""
    return torch.optim.AdamW(parameters, lr=3e-4, weight_decay=0.05)


class MovingAverage(AveragedModel):
    """An exponential moving average of a whole network, buffers included.

    It begins as a copy, is the network again after the first step, and averages from the second on: so torch has it.

    Args:
        network: Any network.
        decay: Share of the old average in the new one, in [0, 1).

    Raises:
        UserError: If `decay` is out of its range.
    """

    def __init__(self, network: nn.Module, decay: float = 0.999) -> None:
        _require_decay(decay)
        ema = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
        super().__init__(network, multi_avg_fn=ema, use_buffers=True)
        self.requires_grad_(False)


def _require_decay(decay: float) -> None:
    if not 0.0 <= decay < 1.0:
        raise UserError(f"ema_decay is {decay}, and must be at least 0 and below 1")


def check_arguments(
    *,
    distillation_weight: float,
    consistency_weight: float,
    temperature: float,
    dkd_alpha: float,
    dkd_beta: float,
    warmup_epochs: int,
    ema_decay: float,
) -> None:
    """Hold the arguments of `MultiExitModule` to their ranges.

    Raises:
        UserError: If one is not; it begins with its name.
    """
    DKDLoss(distillation_weight, dkd_alpha, dkd_beta, temperature)
    SelfDistillationLoss(consistency_weight, temperature)
    _require_pace(warmup_epochs, ema_decay)


def _require_pace(warmup_epochs: int, ema_decay: float) -> None:
    if warmup_epochs < 0:
        raise UserError(f"warmup_epochs is {warmup_epochs}, and must be at least 0")
    _require_decay(ema_decay)


class MultiExitModule(ObjectiveModule):
    r"""Trains a network with exits as SAFE-KD does (arXiv 2602.03043).

    $$L = \sum_e w_e \left[ \mathrm{CE}_e + a\,\mathrm{DKD}(\text{teacher} \to e) + 1[e<E]\, b\, T^2\,
    \mathrm{KL}(\mathrm{sg}\,p_E^T \,\|\, p_e^T) \right]$$

    Works under any `lightning.Trainer` with batches `(x, y)`. Logs per epoch `loss`, `loss/supervised`,
    `loss/distilled` and `loss/consistency`; on validation and test, for a network with `num_exits`, also each exit's
    accuracy, as in `val/exit_1/accuracy`.

    The teacher is a trained network, or the exponential moving average of the network itself, of all of it: it follows
    after every step and is part of the module's state. With `distillation_weight` 0 there is no teacher, and with
    `consistency_weight` 0, too, training is exactly the supervised one.

    Args:
        network: Gives a list of logits, one per exit, such as `fedekd.models.MultiExitNetwork`.
        teacher: `ema`, a frozen network, or a `MovingAverage`, which goes on.
        distillation_weight: a, at least 0.
        consistency_weight: b, at least 0.
        temperature: T of both distillations, above 0.
        dkd_alpha: DKD's weight of the target's term, at least 0.
        dkd_beta: DKD's weight of the other classes' term, at least 0; 8 is DKD's own default, 1 that of SAFE-KD's code.
        warmup_epochs: DKD's weight rises to a over so many epochs; 0 begins with all of it.
        exit_weights: $w_e$; None weighs all exits alike, 1 / E each.
        ema_decay: Of the moving average, in [0, 1).
        optimizer: Makes the optimizer from the network's parameters.
        first_epoch: Epochs that the network was trained for before, for the warm-up.

    Raises:
        UserError: If a value is out of its range.
    """

    def __init__(
        self,
        network: nn.Module,
        teacher: nn.Module | Literal["ema"] = "ema",
        distillation_weight: float = 1.0,
        consistency_weight: float = 1.0,
        temperature: float = 4.0,
        dkd_alpha: float = 1.0,
        dkd_beta: float = 8.0,
        warmup_epochs: int = 20,
        exit_weights: Sequence[float] | None = None,
        ema_decay: float = 0.999,
        optimizer: OptimizerCallable = default_optimizer,
        first_epoch: int = 0,
    ) -> None:
        _require_pace(warmup_epochs, ema_decay)
        if isinstance(teacher, str) and teacher != "ema":
            raise UserError(f"teacher is {teacher!r}, and must be 'ema' or a network")
        if exit_weights is not None:
            require_exit_weights(exit_weights, getattr(network, "num_exits", len(exit_weights)))
        distilled = DKDLoss(distillation_weight, dkd_alpha, dkd_beta, temperature, exit_weights)
        consistent = SelfDistillationLoss(consistency_weight, temperature, exit_weights)
        objectives: list[LossTerm] = [SupervisedLoss("classification", exit_weights)]
        objectives += [distilled] if distillation_weight else []
        objectives += [consistent] if consistency_weight else []
        if not distillation_weight:
            guide = None
        else:
            guide = MovingAverage(network, ema_decay) if isinstance(teacher, str) else teacher
        super().__init__(network, objectives, "classification", optimizer, teacher=guide)
        self.distilled, self.warmup_epochs, self.first_epoch = distilled, warmup_epochs, first_epoch
        # Registered, so that a checkpoint holds it; a teacher that is somebody else's is not.
        self.average = guide if isinstance(guide, MovingAverage) else None
        exits = range(1, getattr(network, "num_exits", 0) + 1)
        self.exit_metrics = nn.ModuleDict(
            {
                stage: nn.ModuleList(
                    build_metrics("classification").clone(prefix=f"{stage}/exit_{number}/") for number in exits
                )
                for stage in ("val", "test")
            }
        )

    def on_train_epoch_start(self) -> None:
        """Begin the epoch's means anew, and let the teacher be heard a little more."""
        super().on_train_epoch_start()
        if self.warmup_epochs:
            epoch = self.first_epoch + self.current_epoch
            self.distilled.warmup_factor = min((epoch + 1) / self.warmup_epochs, 1.0)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """The average follows the network."""
        super().optimizer_step(*args, **kwargs)
        if self.average is not None:
            self.average.update_parameters(self.network)

    def _score(self, prediction: ModelOutput, targets: Tensor, metrics: MetricCollection, stage: str) -> None:
        super()._score(prediction, targets, metrics, stage)
        exits: Any = self.exit_metrics[stage]
        # Not strictly: a network of one's own need not say how many exits it has, and is then scored by its last.
        for own, logits in zip(exits, prediction.exits, strict=False):
            own.update(upcast_to_float32(logits), targets)
            self.log_dict(own, batch_size=len(targets))
