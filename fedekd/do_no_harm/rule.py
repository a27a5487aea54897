"""Decision rule between the federated model and the local model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from fedekd.errors import UserError, require_choice
from fedekd.functional import betting_p_value, paired_p_value
from fedekd.tasks import Task

SelectionRule = Literal["certified", "better"]
Deployed = Literal["federated", "local"]


@dataclass(frozen=True)
class Comparison:
    """Result of one client's comparison of its two models.

    Attributes:
        deployed: Model that the client uses: `federated` or `local`.
        samples: Number of samples on which both models were evaluated.
        worse: Number of samples that only the local model classifies correctly; 0 for regression.
        better: Number of samples that only the federated model classifies correctly; 0 for regression.
        gain: Mean loss of the local model minus mean loss of the federated model.
        p_value: P-value of the hypothesis that the federated model is worse by at least the margin; NaN without a test.
        level: Largest p-value at which the federated model is deployed; NaN without a test.
    """

    deployed: Deployed
    samples: int
    worse: int
    better: int
    gain: float
    p_value: float
    level: float


@dataclass(frozen=True)
class DoNoHarm:
    """Rule by which a client deploys the federated model or its local model.

    Guarantee of the rule `certified`.

    - Population: the distribution of the client's holdout samples.
    - Target: the client never deploys a federated model whose accuracy is lower than that of its local model by the
      margin or more. For regression: whose mean squared error is larger by the margin or more, with each difference of
      squared errors clipped to [-clip, clip].
    - Confidence: `confidence`, over the holdout samples, for all comparisons of the client together.
    - Assumptions: holdout samples are independent draws; both models were trained without them.

    The models are compared by the 0/1 loss, or by squared errors, whatever the primary metric of the run: a certified
    model may have a worse AUROC than the local one.

    Without evidence the local model is deployed: of two models with equal accuracy the local one is used most of the
    time. `acceptance_probability` computes the power.

    Args:
        confidence: Probability that the client deploys no harmful model, in (0, 1).
        margin: Tolerated loss, at least 0 and below `clip`: a difference of accuracies, or of squared errors.
        rule: `certified` requires statistical evidence; `better` deploys the model with the lower loss on the tuning
            split and has no guarantee (baseline).
        looks: Number of comparisons, at least 1, evenly spaced over the rounds, the last after the last round. Each
            comparison has the level (1 - confidence) / looks (Bonferroni).
        clip: Regression only: largest difference of squared errors, above 0 and finite.

    Raises:
        UserError: An argument is out of its range.

    Reference:
        Classification: exact sign test; with a margin, Berger and Boos (JASA 1994). Regression: testing by betting,
        Waudby-Smith and Ramdas (JRSS B 2024). See `fedekd.functional.paired_p_value` and `betting_p_value`.
    """

    confidence: float = 0.9
    margin: float = 0.0
    rule: SelectionRule = "certified"
    looks: int = 1
    clip: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.confidence < 1:
            raise UserError(f"do_no_harm.confidence: expected a number in (0, 1), got {self.confidence}")
        if not self.margin >= 0:
            raise UserError(f"do_no_harm.margin: expected at least 0, got {self.margin}")
        require_choice("do_no_harm.rule", self.rule, get_args(SelectionRule))
        if self.looks < 1:
            raise UserError(f"do_no_harm.looks: expected at least 1, got {self.looks}")
        if not 0 < self.clip < math.inf:
            raise UserError(f"do_no_harm.clip: expected a finite number above 0, got {self.clip}")
        if self.margin >= self.clip:
            raise UserError(f"do_no_harm.margin: expected less than do_no_harm.clip, {self.clip}, got {self.margin}")

    @property
    def split(self) -> str:
        """Split on which a client compares its models."""
        return "holdout" if self.rule == "certified" else "tuning"

    @property
    def level(self) -> float:
        """Largest accepted p-value of one comparison, (1 - confidence) / looks."""
        # Rounded, because 1 - 0.9 is not 0.1 in floating point.
        return (round(1 - self.confidence, 12) or 1 - self.confidence) / self.looks

    @property
    def nuisance_level(self) -> float:
        """Part of the level that bounds the rate of differing samples (margin > 0)."""
        return self.level / 10

    def p_value(self, worse: int, better: int, samples: int) -> float:
        """Compute the p-value of a comparison of two classifiers.

        Args:
            worse: Samples that only the local model classifies correctly.
            better: Samples that only the federated model classifies correctly.
            samples: All samples, at least worse + better.

        Returns:
            P-value of the hypothesis that the federated model is worse by at least the margin.
        """
        return paired_p_value(worse, better, samples, self.margin, self.nuisance_level)

    def compares_at(self, round_idx: int, rounds: int) -> bool:
        """Check whether clients compare their models after a round in 1..rounds."""
        return round_idx in {math.ceil(rounds * look / self.looks) for look in range(1, self.looks + 1)}

    def compare(self, local: Tensor, federated: Tensor, task: Task) -> Comparison:
        """Compare two models by their losses on the same samples.

        Args:
            local: Losses of the local model, shape (n,): 0 and 1 for correct and wrong classes, or squared errors.
            federated: Losses of the federated model, shape (n,).
            task: `classification` or `regression`.

        Returns:
            The decision and its evidence.

        Raises:
            ValueError: The shapes differ.
        """
        if local.shape != federated.shape or local.ndim != 1:
            raise ValueError(
                f"losses: expected the same shape (n,) twice, got {tuple(local.shape)} and {tuple(federated.shape)}"
            )
        difference = local.double() - federated.double()
        samples, worse, better = len(difference), 0, 0
        if task == "classification":
            worse, better = int((difference < 0).sum()), int((difference > 0).sum())
        gain = float(difference.mean()) if samples else 0.0
        if self.rule == "better":
            deployed: Deployed = "federated" if gain > 0 else "local"
            return Comparison(deployed, samples, worse, better, gain, math.nan, math.nan)
        if task == "classification":
            p_value = self.p_value(worse, better, samples)
        else:
            # A sample with a non-finite federated output counts as the largest loss, also if both are non-finite.
            gains = difference.nan_to_num(nan=-self.clip).clamp(-self.clip, self.clip) / self.clip
            p_value = betting_p_value(gains.cpu().numpy(), self.margin / self.clip)
        deployed = "federated" if p_value <= self.level else "local"
        return Comparison(deployed, samples, worse, better, gain, p_value, self.level)
