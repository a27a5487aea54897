"""Training of a network with exits by distillation (SAFE-KD)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fedekd.errors import require
from fedekd.functional import upcast_to_float32
from fedekd.modules.losses import DKDLoss, LossTerm, SelfDistillationLoss, SupervisedLoss, require_exit_weights
from fedekd.modules.objective_module import ObjectiveModule
from fedekd.modules.prediction import ModelOutput


def safekd_optimizer(parameters: Any) -> torch.optim.Optimizer:
    """Create SAFE-KD's optimizer: AdamW, learning rate 3e-4, weight decay 0.05."""
    return torch.optim.AdamW(parameters, lr=3e-4, weight_decay=0.05)


class MovingAverage(AveragedModel):
    r"""Exponential moving average of a network, buffers included.

    $\bar\theta \leftarrow d\,\bar\theta + (1 - d)\,\theta$ per step. As in torch, it starts as a
    copy, equals the network after the first update, and averages from the second on.

    Args:
        network: Any network.
        decay: d, in [0, 1).

    Raises:
        UserError: If `decay` is out of range.
    """

    def __init__(self, network: nn.Module, decay: float = 0.999) -> None:
        _require_decay(decay)
        super().__init__(network, multi_avg_fn=partial(_average, decay), use_buffers=True)
        self.requires_grad_(False)


def _average(decay: float, averages: list[Tensor], values: list[Tensor], updates: Tensor) -> None:
    """Update averages in place; the function that torch returns cannot be pickled."""
    get_ema_multi_avg_fn(decay)(averages, values, updates)  # type: ignore[no-untyped-call]


def _require_decay(decay: float) -> None:
    require(0.0 <= decay < 1.0, "ema_decay", "a number in [0, 1)", decay)


def _require_schedule(warmup_epochs: int, ema_decay: float) -> None:
    require(warmup_epochs >= 0, "warmup_epochs", "at least 0", warmup_epochs)
    _require_decay(ema_decay)


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
    """Check the arguments of `MultiExitModule` without a network.

    Raises:
        UserError: If one is out of range; the message starts with its name.
    """
    DKDLoss(distillation_weight, dkd_alpha, dkd_beta, temperature)
    SelfDistillationLoss(consistency_weight, temperature)
    _require_schedule(warmup_epochs, ema_decay)


class MultiExitModule(ObjectiveModule):
    r"""LightningModule that trains a network with exits as SAFE-KD does.

    $$L = \sum_e w_e \left[ \mathrm{CE}_e + a\,\mathrm{DKD}(\text{teacher} \to e) + 1[e<E]\, b\, T^2\,
    \mathrm{KL}(\mathrm{sg}\,p_E^T \,\|\, p_e^T) \right]$$

    Works under any `lightning.Trainer` with batches `(x, y)`. Logs per epoch `loss`, `loss/supervised`,
    `loss/distilled` and `loss/consistency`; in validation and test, for a network with `num_exits`, also the primary
    metric of each exit, as `val/exit_1/<metric>`.

    The teacher is a trained network, or the exponential moving average of the network itself, which is updated after
    every step and saved with the module. With `distillation_weight` 0 there is no teacher; with `consistency_weight` 0
    as well, training is the supervised one.

    Args:
        network: Returns a list of logits (B, C), one per exit, such as `fedekd.models.MultiExitNetwork`.
        teacher: `ema`, a frozen network, or a `MovingAverage`, whose average continues.
        distillation_weight: a, at least 0.
        consistency_weight: b, at least 0.
        temperature: T of both distillations, above 0.
        dkd_alpha: Weight of DKD's target term, at least 0.
        dkd_beta: Weight of DKD's non-target term, at least 0; the DKD paper uses 8, the code of SAFE-KD 1.
        warmup_epochs: Epochs over which the weight of DKD rises linearly to a, at least 0.
        exit_weights: $w_e$, one per exit; None weights all E exits by 1 / E.
        ema_decay: Decay of the moving average, in [0, 1).
        optimizer: Creates the optimizer from the network's parameters; default AdamW, learning rate 3e-4.
        first_epoch: Epochs that the network was trained before, for the warm-up.

    Raises:
        UserError: If a value is out of range.

    Example:
        >>> from fedekd.models import PrivateCNN, multi_exit
        >>> module = MultiExitModule(multi_exit(PrivateCNN(), num_classes=10))  # Trainer(...).fit(module)

    Reference:
        SAFE-KD, arXiv 2602.03043.
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
        optimizer: OptimizerCallable = safekd_optimizer,
        first_epoch: int = 0,
    ) -> None:
        _require_schedule(warmup_epochs, ema_decay)
        require(not isinstance(teacher, str) or teacher == "ema", "teacher", "'ema' or a network", teacher)
        if exit_weights is not None:
            require_exit_weights(exit_weights, getattr(network, "num_exits", len(exit_weights)))
        distillation = DKDLoss(distillation_weight, dkd_alpha, dkd_beta, temperature, exit_weights)
        consistency = SelfDistillationLoss(consistency_weight, temperature, exit_weights)
        terms: list[LossTerm] = [SupervisedLoss("classification", exit_weights)]
        terms += [distillation] if distillation_weight else []
        terms += [consistency] if consistency_weight else []
        teacher_network: nn.Module | None = None
        if distillation_weight:
            teacher_network = MovingAverage(network, ema_decay) if isinstance(teacher, str) else teacher
        super().__init__(network, terms, "classification", optimizer, teacher=teacher_network)
        self.distillation, self.warmup_epochs, self.first_epoch = distillation, warmup_epochs, first_epoch
        # Registered, so that checkpoints contain it; another frozen teacher is not part of this module.
        self.average = teacher_network if isinstance(teacher_network, MovingAverage) else None
        self._save_arguments(
            teacher=teacher,
            distillation_weight=distillation_weight,
            consistency_weight=consistency_weight,
            temperature=temperature,
            dkd_alpha=dkd_alpha,
            dkd_beta=dkd_beta,
            warmup_epochs=warmup_epochs,
            exit_weights=exit_weights,
            ema_decay=ema_decay,
            first_epoch=first_epoch,
        )

    def on_train_start(self) -> None:
        """Set the distillation weight: Lightning resumes within an epoch."""
        self._warm_up()

    def on_train_epoch_start(self) -> None:
        """Reset the epoch's means, and increase the distillation weight (warm-up)."""
        super().on_train_epoch_start()
        self._warm_up()

    def _warm_up(self) -> None:
        if self.warmup_epochs:
            epoch = self.first_epoch + self.current_epoch
            self.distillation.warmup_factor = min((epoch + 1) / self.warmup_epochs, 1.0)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Run the step, and update the moving average."""
        super().optimizer_step(*args, **kwargs)
        if self.average is not None:
            self.average.update_parameters(self.network)

    def _log_evaluation(self, prediction: ModelOutput, targets: Tensor, stage: str) -> None:
        super()._log_evaluation(prediction, targets, stage)
        # Not strict: a user's network without num_exits is evaluated at its last exit only.
        for metrics, logits in zip(self._stage_metrics(stage)[1:], prediction.exits, strict=False):
            self._log_metrics(metrics, upcast_to_float32(logits), targets)

    def _metric_prefixes(self) -> list[str]:
        exits = range(1, getattr(self.network, "num_exits", 0) + 1)
        return [*super()._metric_prefixes(), *(f"exit_{number}/" for number in exits)]
