"""A network trained on its own data alone: what Delta is measured against."""

from __future__ import annotations

from lightning.pytorch.cli import OptimizerCallable
from torch import nn

from fedekd.modules.losses.distillation import SupervisedLoss
from fedekd.modules.objective_module import ObjectiveModule, default_optimizer
from fedekd.tasks import Task


class SupervisedModule(ObjectiveModule):
    """Trains `network` on L_sup alone.

    Args:
        network: What is trained.
        task: `classification` (outputs are logits (B, C)) or `regression` (outputs are values (B, 1)).
        optimizer: Makes the optimizer from the parameters; Adam with learning rate 1e-4 by default.
    """

    def __init__(
        self,
        network: nn.Module,
        task: Task = "classification",
        optimizer: OptimizerCallable = default_optimizer,
    ) -> None:
        super().__init__(network, [SupervisedLoss(task)], task, optimizer)
