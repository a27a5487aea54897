"""Two networks that teach each other on every batch (deep mutual learning, Zhang et al. 2018)."""

from __future__ import annotations

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn

from fedekd.errors import UserError
from fedekd.modules.losses.distillation import Record, SupervisedLoss, per_sample_distillation
from fedekd.modules.objective_module import ObjectiveModule, default_optimizer
from fedekd.modules.prediction import ModelOutput, predict
from fedekd.tasks import Task


class PrivateProxyPair(nn.Module):
    """A private model and a proxy side by side: gives the outputs of both, the private model's first.

    Args:
        private: The large model.
        proxy: The small model.
    """

    def __init__(self, private: nn.Module, proxy: nn.Module) -> None:
        super().__init__()
        self.private, self.proxy = private, proxy

    def forward(self, x: Tensor) -> list[Tensor]:
        """Both networks' outputs for images (B, C, H, W), the private model's at each of its exits."""
        return [*predict(self.private, x).exits, self.proxy(x)]


class MutualLoss:
    """L_sup and distillation from the other, for both; neither teacher gets a gradient from its student.

    Args:
        task: Decides both losses.
        private_weight: Weight in [0, 1] of the private model's own L_sup; the rest weighs what it is taught.
        proxy_weight: The same for the proxy.
        adaptive: Instead of the two weights: L_sup + distillation / (both models' L_sup), so that the less both
            models know, the less they teach (FedKD, Wu et al. 2022, Eq. 1-4).
    """

    name = "mutual"

    def __init__(self, task: Task, private_weight: float, proxy_weight: float, adaptive: bool = False) -> None:
        for flag, weight in (("private_weight", private_weight), ("proxy_weight", proxy_weight)):
            if not 0 <= weight <= 1:
                raise UserError(f"{flag} is {weight}, and must be in [0, 1]")
        self.task, self.weights, self.adaptive = task, (private_weight, proxy_weight), adaptive
        self.supervised = SupervisedLoss(task)

    def __call__(self, student: ModelOutput, teacher: ModelOutput | None, targets: Tensor, record: Record) -> Tensor:
        """The sum of both models' losses."""
        private, proxy = ModelOutput(student.exits[:-1]), ModelOutput(student.exits[-1:])
        losses = [self.supervised(model, None, targets, record) for model in (private, proxy)]
        teacher_outputs = [
            per_sample_distillation(self.task, learner.output, other.output.detach()).mean()
            for learner, other in ((private, proxy), (proxy, private))
        ]
        for name, loss, lesson in zip(("private", "proxy"), losses, teacher_outputs, strict=True):
            record(f"loss/{name}_supervised", loss)
            record(f"loss/{name}_distilled", lesson)
        if self.adaptive:
            ignorance = torch.stack(losses).sum().detach().clamp_min(1e-8)
            return torch.stack(
                [loss + lesson / ignorance for loss, lesson in zip(losses, teacher_outputs, strict=True)]
            ).sum()
        terms = zip(self.weights, losses, teacher_outputs, strict=True)
        return torch.stack([weight * loss + (1 - weight) * lesson for weight, loss, lesson in terms]).sum()


class MutualModule(ObjectiveModule):
    """Trains a private model and a proxy together, each on its labels and on what the other says.

    Works under any `lightning.Trainer` with batches `(x, y)`. Validation and test score the proxy.

    Args:
        private: The large model.
        proxy: The small model.
        task: `classification` or `regression`.
        private_weight: Weight in [0, 1] of the private model's own L_sup; the rest weighs what it is taught.
        proxy_weight: The same for the proxy.
        adaptive: Weigh what is taught by how little is known, instead (FedKD).
        optimizer: Makes the optimizer of both from their parameters.
    """

    def __init__(
        self,
        private: nn.Module,
        proxy: nn.Module,
        task: Task = "classification",
        private_weight: float = 0.5,
        proxy_weight: float = 0.5,
        adaptive: bool = False,
        optimizer: OptimizerCallable = default_optimizer,
    ) -> None:
        objective = MutualLoss(task, private_weight, proxy_weight, adaptive)
        super().__init__(PrivateProxyPair(private, proxy), [objective], task, optimizer)
