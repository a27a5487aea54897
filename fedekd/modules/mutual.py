"""Mutual distillation of a private model and a proxy on every batch."""

from __future__ import annotations

from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn

from fedekd.modules.losses import MutualLoss
from fedekd.modules.objective_module import ObjectiveModule, fedekd_optimizer
from fedekd.modules.prediction import predict
from fedekd.tasks import Task


class PrivateProxyPair(nn.Module):
    """A private model and a proxy as one network, with the proxy as last exit.

    Args:
        private: The large model.
        proxy: The small model.
    """

    def __init__(self, private: nn.Module, proxy: nn.Module) -> None:
        super().__init__()
        self.private, self.proxy = private, proxy

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return the outputs of the private model's exits and of the proxy."""
        return [*predict(self.private, x).exits, self.proxy(x)]


class MutualModule(ObjectiveModule):
    """LightningModule that trains a private model and a proxy on each other.

    Works under any `lightning.Trainer` with batches `(x, y)`. Validation and test score the proxy.

    Args:
        private: The large model.
        proxy: The small model.
        task: `classification` or `regression`.
        private_weight: Weight of the private model's L_sup, in [0, 1]; the distillation has the remainder.
        proxy_weight: Weight of the proxy's L_sup, in [0, 1].
        adaptive: Weight the distillation by the inverse of both models' supervised losses instead (FedKD).
        optimizer: Creates the optimizer from the parameters of both models; default Adam, learning rate 1e-4.

    Reference:
        Zhang et al., Deep Mutual Learning, CVPR 2018; the loss is `fedekd.modules.losses.MutualLoss`.
    """

    def __init__(
        self,
        private: nn.Module,
        proxy: nn.Module,
        task: Task = "classification",
        private_weight: float = 0.5,
        proxy_weight: float = 0.5,
        adaptive: bool = False,
        optimizer: OptimizerCallable = fedekd_optimizer,
    ) -> None:
        loss = MutualLoss(task, private_weight, proxy_weight, adaptive)
        super().__init__(PrivateProxyPair(private, proxy), [loss], task, optimizer)
        self._save_arguments(task=task, private_weight=private_weight, proxy_weight=proxy_weight, adaptive=adaptive)
