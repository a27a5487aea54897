"""Distillation: plain, gated per sample (FedeKD), and mutual (FML, FedKD)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fedekd import functional as F
from fedekd.errors import require, require_choice
from fedekd.modules.energies import Energy
from fedekd.modules.held_out_trust import HeldOutTrust
from fedekd.modules.losses.base import Record, SupervisedLoss
from fedekd.modules.losses.checks import require_nonnegative, require_temperature
from fedekd.modules.prediction import ModelOutput
from fedekd.tasks import Task

Gate = Literal["energy", "shuffled", "none", "reversed", "reversed_shuffled", "correctness", "correctness_shuffled"]


def per_sample_distillation(task: Task, student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Compute T^2 KL(teacher || student), or the squared error, shape (B,)."""
    if task == "regression":
        return F.squared_error_distillation(student, teacher)
    return F.kl_distillation(student, teacher, temperature)


class DistillationLoss:
    r"""Plain distillation (FedeKD, Algorithm 1, lines 3-4).

    $$\mathrm{mean}_i\, T^2\, \mathrm{KL}(q_i^T \,\|\, p_i^T)$$

    with q the teacher and p the student; for regression the loss is the squared error.

    Args:
        task: `classification` or `regression`.
        temperature: T, above 0.

    Raises:
        UserError: If the temperature is not positive.
    """

    name = "distilled"

    def __init__(self, task: Task, temperature: float = 1.0) -> None:
        require_temperature(temperature)
        self.task, self.temperature = task, temperature

    def __call__(self, student: ModelOutput, teacher: ModelOutput | None, targets: Tensor, record: Record) -> Tensor:
        """Compute the mean over the batch."""
        assert teacher is not None
        return per_sample_distillation(self.task, student.output, teacher.output, self.temperature).mean()


class GateRule(NamedTuple):
    """One gate.

    Attributes:
        weigh: Computes the weights, shape (B,), from the energies (B,), beta, and the held-out trust (B,), if any.
        is_shuffled: Permute the weights within the batch: a control with the same mean, another ranking.
        needs_trust: The weights are a function of the held-out trust.
    """

    weigh: Callable[[Tensor, float, Tensor | None], Tensor]
    is_shuffled: bool = False
    needs_trust: bool = False


def energy_weights(energy: Tensor, beta: float, trust: Tensor | None) -> Tensor:
    """Compute the gate's weights (Eq. 3)."""
    return F.trust_weights(energy, beta)


def reversed_weights(energy: Tensor, beta: float, trust: Tensor | None) -> Tensor:
    """Compute weights that rise with the energy: 1 minus those of the gate."""
    return F.trust_weights(-energy, beta)


def full_weights(energy: Tensor, beta: float, trust: Tensor | None) -> Tensor:
    """Return weight 1 for every sample: no gate."""
    return torch.ones_like(energy)


def held_out_weights(energy: Tensor, beta: float, trust: Tensor | None) -> Tensor:
    """Return the trust that was measured on held-out samples."""
    assert trust is not None
    return trust


GATES: dict[str, GateRule] = {
    "energy": GateRule(energy_weights),
    "shuffled": GateRule(energy_weights, is_shuffled=True),
    "none": GateRule(full_weights),
    "reversed": GateRule(reversed_weights),
    "reversed_shuffled": GateRule(reversed_weights, is_shuffled=True),
    "correctness": GateRule(held_out_weights, needs_trust=True),
    "correctness_shuffled": GateRule(held_out_weights, is_shuffled=True, needs_trust=True),
}


class GatedDistillationLoss:
    r"""Gated distillation, with one weight per sample (FedeKD Eq. 3-5).

    $$\lambda_{kd} \cdot \frac1n \sum_i w_i\, \mathrm{KL}(q_i \,\|\, p_i)$$

    A network with exits has one gate per exit, $\lambda_{kd} \sum_e v_e \cdot \mathrm{mean}_i\, w_{i,e}\,
    \mathrm{KL}(q_i \| p_{i,e})$, because exits disagree with the proxy on different samples. The feature energy has
    one value per sample, so all exits get the same gate, and so does the held-out trust.

    Records `gate/weight_mean`, `gate/weight_std` (both within the batch) and `gate/energy_mean`; for exits before the
    last as `exit_1/gate/weight_mean` and so on.

    Args:
        task: `classification` or `regression`; selects the distillation loss.
        energy: E(x).
        beta: Sharpness of the gate, above 0.
        lambda_kd: Weight of the term, at least 0.
        gate: `energy` (Eq. 3); `none` has weight 1 for every sample; `reversed` has weight $1 - w_i$, more where the
            models disagree; `correctness` has the held-out trust as weight. `shuffled`, `reversed_shuffled` and
            `correctness_shuffled` permute these weights in the batch.
        exit_weights: $v_e$; None weights all E exits by 1 / E. An exit of weight 0 is skipped.
        trust: Trust in the teacher, which `correctness` and `correctness_shuffled` require.

    Raises:
        UserError: If a value is out of range.
    """

    name = "gated"

    def __init__(
        self,
        task: Task,
        energy: Energy,
        beta: float,
        lambda_kd: float,
        gate: Gate = "energy",
        exit_weights: Sequence[float] | None = None,
        trust: HeldOutTrust | None = None,
    ) -> None:
        require(0 < beta < math.inf, "beta", "a finite number above 0", beta)
        require_nonnegative("lambda_kd", lambda_kd)
        require_choice("gate", gate, GATES)
        self.task, self.energy, self.beta, self.lambda_kd = task, energy, beta, lambda_kd
        self.gate, self.exit_weights = GATES[gate], exit_weights
        self.trust = trust if self.gate.needs_trust else None
        require(
            callable(self.trust) or not (self.gate.needs_trust and lambda_kd),
            "trust",
            f"a HeldOutTrust for gate {gate!r}",
            trust,
            "Estimate it on held-out samples.",
        )

    def __call__(self, student: ModelOutput, teacher: ModelOutput | None, targets: Tensor, record: Record) -> Tensor:
        """Compute the weighted mean over the batch, times lambda_kd."""
        assert teacher is not None
        exits = len(student.exits)
        weights = [1.0 / exits] * exits if self.exit_weights is None else self.exit_weights
        losses: list[Tensor] = []
        for number, (output, weight) in enumerate(zip(student.exits, weights, strict=True), start=1):
            if weight:
                exit_output = ModelOutput((output,), student.features)
                prefix = "" if number == exits else f"exit_{number}/"
                losses.append(weight * self._exit_loss(exit_output, teacher, prefix, record))
        total = torch.stack(losses).sum() if len(losses) > 1 else losses[0]
        return self.lambda_kd * total

    def _exit_loss(self, student: ModelOutput, teacher: ModelOutput, prefix: str, record: Record) -> Tensor:
        """Compute the weighted mean of one exit, and record its gate."""
        with torch.no_grad():
            energy = self.energy(student.detach(), teacher)
            trust = None if self.trust is None else self.trust(teacher.output)
            weights = self.gate.weigh(energy, self.beta, trust)
            if self.gate.is_shuffled:
                weights = weights[torch.randperm(len(weights), device=weights.device)]
        record(f"{prefix}gate/weight_mean", weights.mean())
        record(f"{prefix}gate/weight_std", weights.std(correction=0))
        record(f"{prefix}gate/energy_mean", energy.mean())
        loss = per_sample_distillation(self.task, student.output, teacher.output)
        return F.gated_distillation(loss, weights)


class MutualLoss:
    r"""Mutual distillation of a private model and a proxy (FML, FedKD).

    $$\sum_{m} w_m\, L_{sup}^m + (1 - w_m)\, \mathrm{KL}(\mathrm{sg}\,p_{other} \,\|\, p_m)$$

    Neither teacher gets a gradient from its student. The proxy is the last exit of the student's output, the exits
    before it are the private model's.

    Args:
        task: `classification` or `regression`; selects both losses.
        private_weight: w of the private model, in [0, 1].
        proxy_weight: w of the proxy, in [0, 1].
        adaptive: Instead of the weights, divide the distillation by the sum of both supervised losses, so that poorly
            trained models have less influence (FedKD, Wu et al., 2022, Eq. 1-4).

    Raises:
        UserError: If a weight is out of range.
    """

    name = "mutual"

    def __init__(self, task: Task, private_weight: float, proxy_weight: float, adaptive: bool = False) -> None:
        require(0 <= private_weight <= 1, "private_weight", "a number in [0, 1]", private_weight)
        require(0 <= proxy_weight <= 1, "proxy_weight", "a number in [0, 1]", proxy_weight)
        self.task, self.weights, self.adaptive = task, (private_weight, proxy_weight), adaptive
        self.supervised = SupervisedLoss(task)

    def __call__(self, student: ModelOutput, teacher: ModelOutput | None, targets: Tensor, record: Record) -> Tensor:
        """Compute the sum of both models' losses."""
        private, proxy = ModelOutput(student.exits[:-1]), ModelOutput(student.exits[-1:])
        supervised = [self.supervised(model, None, targets, record) for model in (private, proxy)]
        distilled = [
            per_sample_distillation(self.task, learner.output, other.detach().finite_teacher_of(learner).output).mean()
            for learner, other in ((private, proxy), (proxy, private))
        ]
        for name, label_loss, teacher_loss in zip(("private", "proxy"), supervised, distilled, strict=True):
            record(f"loss/{name}_supervised", label_loss)
            record(f"loss/{name}_distilled", teacher_loss)
        if self.adaptive:
            # The loss of a model that diverged must not make the weight of the other infinite.
            scale = torch.stack(supervised).detach()
            scale = torch.where(scale.isfinite(), scale, 0.0).sum().clamp_min(1e-8)
            return torch.stack([a + b / scale for a, b in zip(supervised, distilled, strict=True)]).sum()
        terms = zip(self.weights, supervised, distilled, strict=True)
        return torch.stack([weight * a + (1 - weight) * b for weight, a, b in terms]).sum()
