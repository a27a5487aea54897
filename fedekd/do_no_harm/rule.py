"""Decision rule between the federated model and the local model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

import numpy as np
import numpy.typing as npt
from torch import Tensor

from fedekd.errors import UserError, require_choice
from fedekd.functional import betting_p_value, betting_stake, paired_p_value, unconditional_p_value
from fedekd.tasks import Task

SelectionRule = Literal["certified", "better"]
TestName = Literal["unconditional", "sign"]
ComparedSplits = Literal["held_out", "holdout"]
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


#: Smallest level, and smallest confidence: tails of at most 1e-12 are left out of p-values.
_SMALLEST = 1e-9

#: Values of fields with which earlier versions decided.
EARLIER_VALUES = {"test": "sign", "splits": "holdout"}


@dataclass(frozen=True)
class DoNoHarm:
    """Rule by which a client deploys the federated model or its local model.

    Guarantee of the rule `certified`.

    - Population: the distribution of the client's held-out samples.
    - Target: the client never deploys a federated model whose accuracy is lower than that of its local model by the
      margin or more. For regression: whose mean squared error is larger by the margin or more, with each difference of
      squared errors clipped to [-clip, clip].
    - Confidence: `confidence`, over the compared samples, for all comparisons of the client together.
    - Assumptions: these samples are independent draws; both models were trained without them.

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
        test: `unconditional`, the more powerful one; or `sign`, that of earlier versions: the sign test, with a margin
            conditional on the number of differing samples, and for regression a mixture of stakes.
        splits: `held_out` compares classifiers on the tuning and holdout splits together if neither training nor the
            selection of the round uses the tuning split; `holdout` on the holdout split only, as earlier versions did.
            For regression the test `unconditional` takes its stake from the tuning split and compares on the holdout
            split.

    Raises:
        UserError: An argument is out of its range.

    Reference:
        Classification: see `fedekd.functional.unconditional_p_value` and `paired_p_value`. Regression: testing by
        betting, Waudby-Smith and Ramdas (JRSS B 2024), see `fedekd.functional.betting_p_value`.
    """

    confidence: float = 0.9
    margin: float = 0.0
    rule: SelectionRule = "certified"
    looks: int = 1
    clip: float = 1.0
    test: TestName = "unconditional"
    splits: ComparedSplits = "held_out"

    def __post_init__(self) -> None:
        if not _SMALLEST <= self.confidence <= 1 - _SMALLEST:
            raise UserError(f"do_no_harm.confidence: expected a number in [1e-9, 1 - 1e-9], got {self.confidence}")
        if not self.margin >= 0:
            raise UserError(f"do_no_harm.margin: expected at least 0, got {self.margin}")
        require_choice("do_no_harm.rule", self.rule, get_args(SelectionRule))
        require_choice("do_no_harm.test", self.test, get_args(TestName))
        require_choice("do_no_harm.splits", self.splits, get_args(ComparedSplits))
        if self.looks < 1:
            raise UserError(f"do_no_harm.looks: expected at least 1, got {self.looks}")
        if not 0 < self.clip < math.inf:
            raise UserError(f"do_no_harm.clip: expected a finite number above 0, got {self.clip}")
        if self.margin >= self.clip:
            raise UserError(f"do_no_harm.margin: expected less than do_no_harm.clip, {self.clip}, got {self.margin}")

    @classmethod
    def from_stored(cls, values: Mapping[str, Any]) -> Self:
        """Create a rule from stored fields; those of earlier versions lack the last ones.

        Args:
            values: Fields by name, as in `summary.json`.
        """
        return cls(**{**EARLIER_VALUES, **values})

    def compared_splits(self, task: Task, used_splits: Sequence[str]) -> tuple[str, ...]:
        """Return the splits on whose samples a client compares its models.

        Args:
            task: `classification` or `regression`.
            used_splits: Splits that training and the selection of the round use.
        """
        if self.rule == "better":
            return ("tuning",)
        sets_stake = task == "regression" and self.test == "unconditional"  # on the tuning split
        if self.splits == "holdout" or sets_stake or "tuning" in used_splits:
            return ("holdout",)
        return ("tuning", "holdout")

    @property
    def level(self) -> float:
        """Largest accepted p-value of one comparison, (1 - confidence) / looks."""
        # Rounded, because 1 - 0.9 is not 0.1 in floating point.
        return (round(1 - self.confidence, 12) or 1 - self.confidence) / self.looks

    @property
    def nuisance_level(self) -> float:
        """Part of the level that bounds the rate of differing samples."""
        return self.level / (100 if self.test == "unconditional" else 10)

    def p_value(self, worse: int, better: int, samples: int) -> float:
        """Compute the p-value of a comparison of two classifiers.

        Args:
            worse: Samples that only the local model classifies correctly.
            better: Samples that only the federated model classifies correctly.
            samples: All samples, at least worse + better.

        Returns:
            P-value of the hypothesis that the federated model is worse by at least the margin.
        """
        p_value = unconditional_p_value if self.test == "unconditional" else paired_p_value
        return p_value(worse, better, samples, self.margin, self.nuisance_level)

    def compares_at(self, round_idx: int, rounds: int) -> bool:
        """Check whether clients compare their models after a round in 1..rounds."""
        return round_idx in {math.ceil(rounds * look / self.looks) for look in range(1, self.looks + 1)}

    def compare(
        self, local: Tensor, federated: Tensor, task: Task, tuning: tuple[Tensor, Tensor] | None = None
    ) -> Comparison:
        """Compare two models by their losses on the same samples.

        Args:
            local: Losses of the local model, shape (n,): 0 and 1 for correct and wrong classes, or squared errors.
            federated: Losses of the federated model, shape (n,).
            task: `classification` or `regression`.
            tuning: Losses of both models on other samples, which set the stake of the regression test; by default it is
                a mixture of stakes.

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
            margin, stake = self.margin / self.clip, None
            if self.test == "unconditional" and self.splits == "held_out" and tuning is not None and len(tuning[0]):
                stake = betting_stake(self._gains(*tuning), margin, samples, self.level)
            p_value = betting_p_value(self._gains(local, federated), margin, stake)
        deployed = "federated" if p_value <= self.level else "local"
        return Comparison(deployed, samples, worse, better, gain, p_value, self.level)

    def _gains(self, local: Tensor, federated: Tensor) -> npt.NDArray[np.float64]:
        """Return clipped improvements of squared errors in units of `clip`, in [-1, 1]."""
        # A sample with a non-finite federated output counts as the largest loss, also if both are non-finite.
        difference = (local.double() - federated.double()).nan_to_num(nan=-self.clip)
        gains: npt.NDArray[np.float64] = (difference.clamp(-self.clip, self.clip) / self.clip).cpu().numpy()
        return gains
