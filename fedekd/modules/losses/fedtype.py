"""FedType's two losses: a private model that is taught sets of labels, and a proxy that is taught the private model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fedekd import functional as F
from fedekd.modules.losses.distillation import Record
from fedekd.modules.prediction import ModelOutput

Variant = Literal["paper", "released"]


@dataclass(frozen=True)
class ConformalModel:
    """RAPS of one network: from logits to sets of labels that hold the true one with probability 1 - alpha.

    Attributes:
        temperature: Divides the logits.
        quantile: tau; infinite after too few calibration samples, and then every set holds every label.
        lam: Weight of the regularization.
        kappa: Rank from which on it counts.
    """

    temperature: float
    quantile: float
    lam: float
    kappa: int

    @classmethod
    def calibrate(
        cls, logits: Tensor, labels: Tensor, alpha: float, lam: float, generator: torch.Generator
    ) -> ConformalModel:
        """Fit the temperature, and then tau, on calibration samples (n, C) and (n,).

        Of a network that has diverged, whose logits are not finite, every set holds every label.
        """
        logits, labels = F.upcast_to_float32(logits).cpu(), labels.cpu()
        kappa = min(5, -(-logits.shape[1] // 2))
        if not logits.isfinite().all():
            return cls(1.0, math.inf, lam, kappa)
        temperature = F.fit_temperature(logits, labels)
        probabilities = (logits / temperature).softmax(dim=1)
        uniforms = torch.rand(len(labels), generator=generator, dtype=probabilities.dtype)
        scores = F.regularized_scores(probabilities, labels, uniforms, lam, kappa)
        return cls(temperature, F.conformal_quantile(scores, alpha), lam, kappa)

    def sets(self, logits: Tensor, generator: torch.Generator) -> Tensor:
        """The labels in each sample's set, bool (B, C)."""
        probabilities = (F.upcast_to_float32(logits) / self.temperature).softmax(dim=1)
        uniforms = torch.rand(len(logits), generator=generator, dtype=probabilities.dtype).to(logits.device)
        return F.prediction_sets(probabilities, self.quantile, uniforms, self.lam, self.kappa)


class SetRankingLoss:
    """mean_i eta_i l_i: the labels in the proxy's set should rank above the others (FedType's backward stage).

    l ranks the private logits; eta says how far the private model's own set agrees. The paper leaves open which
    logits are ranked; were they the proxy's, no gradient would reach the private model.

    Args:
        private: The private model's conformal model.
        proxy: The proxy's.
        variant: `paper`; with `released` the term is computed but detached, as the authors' released code has it,
            and so the private model learns from its labels alone.
        generator: Draws the sets' uniforms (a CPU generator of its own, so that dropout layers draw as in Local).
    """

    name = "reciprocal"

    def __init__(
        self, private: ConformalModel, proxy: ConformalModel, variant: Variant, generator: torch.Generator
    ) -> None:
        self.private, self.proxy, self.variant, self.generator = private, proxy, variant, generator

    def __call__(self, student: ModelOutput, teacher: ModelOutput | None, targets: Tensor, record: Record) -> Tensor:
        """The mean over the batch."""
        assert teacher is not None
        logits = student.output.detach() if self.variant == "released" else student.output
        with torch.no_grad():
            proxy_sets = self.proxy.sets(teacher.output, self.generator)
            private_sets = self.private.sets(student.output, self.generator)
            agreement = F.set_agreement(proxy_sets, private_sets)
        record("sets/proxy_size", proxy_sets.sum(1).double().mean())
        record("sets/private_size", private_sets.sum(1).double().mean())
        record("sets/agreement", agreement.mean())
        return (agreement * F.set_ranking_loss(logits, proxy_sets)).mean()
