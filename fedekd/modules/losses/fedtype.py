"""Ranking loss on conformal prediction sets (FedType)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fedekd import functional as F
from fedekd.modules.losses.base import Record
from fedekd.modules.prediction import ModelOutput

Variant = Literal["paper", "released"]


@dataclass(frozen=True)
class ConformalModel:
    """RAPS of one network: from logits to prediction sets.

    A set contains the true label with probability of at least 1 - alpha.

    Attributes:
        temperature: Divides the logits.
        quantile: tau; infinite if there are too few calibration samples, and then every set has all labels.
        lam: Weight of the regularisation, at least 0.
        kappa: Number of ranks without regularisation.

    Reference:
        Angelopoulos et al., Uncertainty Sets for Image Classifiers using Conformal Prediction, ICLR 2021.
    """

    temperature: float
    quantile: float
    lam: float
    kappa: int

    @classmethod
    def calibrate(
        cls, logits: Tensor, labels: Tensor, alpha: float, lam: float, generator: torch.Generator
    ) -> ConformalModel:
        """Fit the temperature and then tau on calibration samples.

        If a logit is not finite, after diverged training, every set has all labels.

        Args:
            logits: Shape (n, C).
            labels: Shape (n,).
            alpha: Miscoverage rate, in (0, 1).
            lam: Weight of the regularisation, at least 0.
            generator: CPU generator of the uniforms that break ties.
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
        """Return the prediction sets as bool, shape (B, C)."""
        probabilities = (F.upcast_to_float32(logits) / self.temperature).softmax(dim=1)
        uniforms = torch.rand(len(logits), generator=generator, dtype=probabilities.dtype).to(logits.device)
        return F.prediction_sets(probabilities, self.quantile, uniforms, self.lam, self.kappa)


class SetRankingLoss:
    r"""Ranking loss: labels in the proxy's set should rank above the others.

    $$\mathrm{mean}_i\, \eta_i\, \ell_i$$

    $\ell$ (`fedekd.functional.set_ranking_loss`) ranks the private model's logits, and $\eta$ (`set_agreement`)
    is the agreement of both prediction sets. The paper leaves open whose logits are ranked; with the proxy's, no
    gradient would reach the private model.

    Args:
        private: Conformal model of the private model.
        proxy: Conformal model of the proxy.
        variant: `paper`; or `released`, in which the term is detached, as in the authors' code, and the private model
            learns only from labels.
        generator: CPU generator of the sets' uniforms, separate from the one that dropout layers use.

    Reference:
        FedType (Wang et al., ICML 2024, arXiv 2407.03247).
    """

    name = "reciprocal"

    def __init__(
        self, private: ConformalModel, proxy: ConformalModel, variant: Variant, generator: torch.Generator
    ) -> None:
        self.private, self.proxy, self.variant, self.generator = private, proxy, variant, generator

    def __call__(self, student: ModelOutput, teacher: ModelOutput | None, targets: Tensor, record: Record) -> Tensor:
        """Compute the mean over the batch, and record sizes and agreement of the sets."""
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
