"""The backward stage of FedeKD: a private model learns from its labels and, where it may trust it, from the proxy."""

from __future__ import annotations

from collections.abc import Sequence

from lightning.pytorch.cli import OptimizerCallable
from torch import nn

from fedekd.errors import UserError
from fedekd.modules.energies import Energy, Source, build_energy
from fedekd.modules.losses.distillation import Gate, GatedDistillationLoss, LossTerm, SupervisedLoss
from fedekd.modules.losses.exits import SelfDistillationLoss
from fedekd.modules.objective_module import ObjectiveModule, default_optimizer
from fedekd.tasks import Task


class GatedPrivateModule(ObjectiveModule):
    r"""Trains a private model on L_sup + lambda_kd L_BKD with a frozen proxy as teacher (Eq. 5; Algorithm 1, 10-16).

    Works under any `lightning.Trainer` with batches `(x, y)`; logs per epoch `loss`, `loss/supervised`, `loss/gated`,
    `gate/weight_mean` (in 0..1, about 1/2), `gate/weight_std` and `gate/energy_mean`. With `lambda_kd` 0 the proxy
    is not asked at all, and training is exactly the supervised one.

    A private model of E exits is trained at all of them, each with a gate of its own, on

    $$\frac1E \Big[\sum_{e\,\text{active}} \big(\mathrm{CE}_e + \lambda\, \mathrm{mean}_i\, w_{i,e}\,
    \mathrm{KL}(q_i \| p_{i,e})\big) + \lambda_s \sum_{e\,\text{active},\, e<E} T^2\,
    \mathrm{KL}(\mathrm{sg}\,p_E^T \| p_e^T)\Big].$$

    Args:
        private: The large model, which is trained.
        proxy: The small model, which is frozen.
        task: `classification` (outputs are logits (B, C)) or `regression` (outputs are values (B, 1)).
        energy: `kl` (Eq. 1; for regression Eq. 2), `entropy`, `margin`, `logsumexp`, `feature`, or an Energy.
        beta: Sharpness of the gate, above 0 (Eq. 3).
        lambda_kd: Weight of the gated distillation, at least 0 (Eq. 5).
        optimizer: Makes the optimizer from the private model's parameters; Adam, learning rate 1e-4, by default.
        gate: `energy` (Eq. 3), `none` (weight 1 everywhere) or `shuffled` (Eq. 3's weights permuted in the batch).
        energy_of: Whose logits `entropy`, `margin` and `logsumexp` look at.
        active: Which exits learn, (E,); None has all of them learn.
        consistency_weight: lambda_s, at least 0: how much shallow exits learn from the deepest.
        consistency_temperature: T, above 0.

    Raises:
        UserError: If a value is out of range, or the energy does not fit the task or the networks.
    """

    def __init__(
        self,
        private: nn.Module,
        proxy: nn.Module,
        task: Task = "classification",
        energy: str | Energy = "kl",
        beta: float = 1.0,
        lambda_kd: float = 1.0,
        optimizer: OptimizerCallable = default_optimizer,
        gate: Gate = "energy",
        energy_of: Source = "proxy",
        active: Sequence[bool] | None = None,
        consistency_weight: float = 0.0,
        consistency_temperature: float = 2.0,
    ) -> None:
        built = build_energy(energy, task, energy_of, private, proxy)
        shares = None if active is None else [float(learns) / len(active) for learns in active]
        gated = GatedDistillationLoss(task, built, beta, lambda_kd, gate, shares)
        objectives: list[LossTerm] = (
            [SupervisedLoss(task, shares), gated] if lambda_kd else [SupervisedLoss(task, shares)]
        )
        consistency = SelfDistillationLoss(consistency_weight, consistency_temperature, shares)
        if consistency_weight:
            if task == "regression":
                raise UserError(f"consistency_weight is {consistency_weight}, and regression has no classes to distil")
            objectives.append(consistency)
        super().__init__(
            private,
            objectives,
            task,
            optimizer,
            teacher=proxy if lambda_kd else None,
            with_features=built.needs_features,
        )
        self.energy = built  # registered, so that a projection moves to the device with the networks
