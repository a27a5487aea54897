"""Distillation of the private model into the proxy (FedeKD, Section 3.3)."""

from __future__ import annotations

from lightning.pytorch.cli import OptimizerCallable
from torch import nn

from fedekd.modules.losses import DistillationLoss
from fedekd.modules.objective_module import ObjectiveModule, fedekd_optimizer
from fedekd.tasks import Task


class ProxyDistillModule(ObjectiveModule):
    r"""LightningModule that distils a frozen private model into a proxy.

    $$L = \mathrm{mean}_i\, T^2\, \mathrm{KL}(p^{private}_i \,\|\, p^{proxy}_i)$$

    For regression the loss is the squared error. The labels of a batch are not used. Works under any
    `lightning.Trainer` with batches `(x, y)`; logs `loss` and `loss/distilled` per epoch.

    Args:
        proxy: The small model, which is trained.
        private: The large model, which is frozen.
        task: `classification` (logits (B, C)) or `regression` (outputs (B, 1)).
        temperature: T, above 0; the paper uses 1.
        optimizer: Creates the optimizer from the proxy's parameters; default Adam, learning rate 1e-4.

    Raises:
        UserError: If a value is out of range.

    Example:
        >>> from fedekd.models import PrivateCNN, ProxyCNN
        >>> module = ProxyDistillModule(ProxyCNN(), PrivateCNN())  # Trainer(...).fit(module, loader)

    Reference:
        FedeKD (arXiv 2605.05553), Section 3.3 and Algorithm 1, lines 3-4.
    """

    capturable = True

    def __init__(
        self,
        proxy: nn.Module,
        private: nn.Module,
        task: Task = "classification",
        temperature: float = 1.0,
        optimizer: OptimizerCallable = fedekd_optimizer,
    ) -> None:
        super().__init__(proxy, [DistillationLoss(task, temperature)], task, optimizer, teacher=private)
        self._save_arguments(task=task, temperature=temperature)
