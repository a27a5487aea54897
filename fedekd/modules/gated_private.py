"""Training of the private model with a gated teacher (FedeKD, Eq. 1-5)."""

from __future__ import annotations

from collections.abc import Sequence

from lightning.pytorch.cli import OptimizerCallable
from torch import nn

from fedekd.errors import require
from fedekd.modules.energies import Energy, Source, build_energy
from fedekd.modules.held_out_trust import HeldOutTrust
from fedekd.modules.losses import Gate, GatedDistillationLoss, LossTerm, SelfDistillationLoss, SupervisedLoss
from fedekd.modules.objective_module import ObjectiveModule, fedekd_optimizer
from fedekd.tasks import Task


class GatedPrivateModule(ObjectiveModule):
    r"""LightningModule that trains a private model with a gated, frozen proxy.

    $$L = L_{sup} + \lambda_{kd} L_{BKD}, \qquad
    L_{BKD} = \frac1n \sum_i w_i\, \mathrm{KL}(q_i \,\|\, p_i), \qquad w_i = \frac{1}{1 + \exp(\beta \tilde E_i)}$$

    with p the private model's and q the proxy's prediction. Works under any `lightning.Trainer` with batches
    `(x, y)`; logs per epoch `loss`, `loss/supervised`, `loss/gated`, `gate/weight_mean` (in [0, 1], about 1/2 for gates
    of the energy), `gate/weight_std` and `gate/energy_mean`. With `lambda_kd` 0 the proxy is not run, and training is
    the supervised one.

    A private model with E exits is trained at all of them, with one gate per exit, on

    $$\frac1E \Big[\sum_{e\,\text{active}} \big(\mathrm{CE}_e + \lambda_{kd}\, \mathrm{mean}_i\, w_{i,e}\,
    \mathrm{KL}(q_i \| p_{i,e})\big) + \lambda_s \sum_{e\,\text{active},\, e<E} T^2\,
    \mathrm{KL}(\mathrm{sg}\,p_E^T \| p_e^T)\Big].$$

    Args:
        private: The large model, which is trained.
        proxy: The small model, which is frozen.
        task: `classification` (logits (B, C)) or `regression` (outputs (B, 1)).
        energy: `kl` (Eq. 1; Eq. 2 for regression), `entropy`, `margin`, `logsumexp`, `feature`, or an Energy.
        beta: Sharpness of the gate, above 0 (Eq. 3).
        lambda_kd: Weight of the gated distillation, at least 0 (Eq. 5).
        optimizer: Creates the optimizer from the private model's parameters; default Adam, learning rate 1e-4.
        gate: `energy` (Eq. 3), `none` (weight 1 for every sample), `reversed` ($1 - w_i$) or `correctness` (`trust`);
            `shuffled`, `reversed_shuffled` and `correctness_shuffled` permute their weights in the batch.
        energy_of: Network whose logits `entropy`, `margin` and `logsumexp` use: `proxy` or `private`.
        active: Which exits are trained, shape (E,); None trains all.
        consistency_weight: $\lambda_s$, weight of the distillation from the deepest exit, at least 0.
        consistency_temperature: T, above 0.
        trust: Trust in the proxy, for the gates `correctness` and `correctness_shuffled`: a HeldOutTrust of its
            outputs on samples that trained neither model. Its mean weight is about the proxy's accuracy on them.

    Raises:
        UserError: If a value is out of range, or the energy does not fit the task or the networks.

    Example:
        >>> from fedekd.models import PrivateCNN, ProxyCNN
        >>> module = GatedPrivateModule(PrivateCNN(), ProxyCNN(), beta=2.0)  # Trainer(...).fit(module, loader)

    Reference:
        FedeKD (arXiv 2605.05553), Eq. 1-5 and Algorithm 1, lines 10-16.
    """

    capturable = True

    def __init__(
        self,
        private: nn.Module,
        proxy: nn.Module,
        task: Task = "classification",
        energy: str | Energy = "kl",
        beta: float = 1.0,
        lambda_kd: float = 1.0,
        optimizer: OptimizerCallable = fedekd_optimizer,
        gate: Gate = "energy",
        energy_of: Source = "proxy",
        active: Sequence[bool] | None = None,
        consistency_weight: float = 0.0,
        consistency_temperature: float = 2.0,
        trust: HeldOutTrust | None = None,
    ) -> None:
        require(active is None or any(active), "active", "at least one exit that is trained", active)
        energy_module = build_energy(energy, task, energy_of, private, proxy)
        exit_weights = None if active is None else [float(is_active) / len(active) for is_active in active]
        gated = GatedDistillationLoss(task, energy_module, beta, lambda_kd, gate, exit_weights, trust)
        consistency = SelfDistillationLoss(consistency_weight, consistency_temperature, exit_weights)
        require(
            not consistency_weight or task != "regression",
            "consistency_weight",
            "0 for regression, which has no classes to distil",
            consistency_weight,
        )
        terms: list[LossTerm] = [SupervisedLoss(task, exit_weights)]
        terms += [gated] if lambda_kd else []
        terms += [consistency] if consistency_weight else []
        super().__init__(
            private,
            terms,
            task,
            optimizer,
            teacher=proxy if lambda_kd else None,
            with_features=bool(lambda_kd) and energy_module.needs_features,
        )
        # Registered, so that their tensors move to the device with the networks.
        self.energy, self.trust = energy_module, gated.trust
        self._save_arguments(
            task=task,
            energy=energy,
            beta=beta,
            lambda_kd=lambda_kd,
            gate=gate,
            energy_of=energy_of,
            active=active,
            consistency_weight=consistency_weight,
            consistency_temperature=consistency_temperature,
            trust=trust,
        )
