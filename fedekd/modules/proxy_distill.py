"""The forward stage of FedeKD: a proxy learns to answer as the private model does."""

from __future__ import annotations

from lightning.pytorch.cli import OptimizerCallable
from torch import nn

from fedekd.modules.losses.distillation import DistillationLoss
from fedekd.modules.objective_module import ObjectiveModule, default_optimizer
from fedekd.tasks import Task


class ProxyDistillModule(ObjectiveModule):
    """Distils a frozen private model into a proxy (Section 3.3; Algorithm 1, lines 3-4).

    The labels of a batch are not used: the proxy minimises the mean of KL(private || proxy), or of the squared
    error for regression. Works under any `lightning.Trainer` with batches `(x, y)`; logs `loss` and
    `loss/distilled` per epoch.

    Args:
        proxy: The small model, which is trained.
        private: The large model, which is frozen.
        task: `classification` (outputs are logits (B, C)) or `regression` (outputs are values (B, 1)).
        temperature: Softens both distributions; the loss is multiplied by its square. Above 0; the paper's is 1.
        optimizer: Makes the optimizer from the proxy's parameters; Adam with learning rate 1e-4 by default.
    """

    def __init__(
        self,
        proxy: nn.Module,
        private: nn.Module,
        task: Task = "classification",
        temperature: float = 1.0,
        optimizer: OptimizerCallable = default_optimizer,
    ) -> None:
        super().__init__(proxy, [DistillationLoss(task, temperature)], task, optimizer, teacher=private)
