"""Decision rule between the federated model and the local model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

import numpy as np
import numpy.typing as npt
from torch import Tensor

from fedekd.do_no_harm.evidence import METRICS, CandidateResult, Evidence, HeldOut, Labels
from fedekd.errors import UserError, require, require_choice
from fedekd.functional import betting_p_value, betting_stake, paired_p_value, unconditional_p_value
from fedekd.tasks import Task

SelectionRule = Literal["certified", "better"]
TestName = Literal["unconditional", "sign"]
ComparedSplits = Literal["held_out", "holdout"]
UnitName = Literal["group", "sample"]
MetricName = Literal["accuracy", "balanced_accuracy", "recall", "auroc", "auroc_delong"]

#: Names of the two models without named candidates.
FEDERATED, LOCAL = "federated", "local"


@dataclass(frozen=True)
class Comparison:
    """Result of one client's comparison of its two models.

    Attributes:
        deployed: Model that the client uses: `federated` or `local`, or the name of a candidate.
        samples: Number of samples on which both models were evaluated; for `auroc` of sets of samples.
        worse: Number of samples that only the local model classifies correctly; 0 for regression.
        better: Number of samples that only the federated model classifies correctly; 0 for regression.
        gain: Mean loss of the local model minus mean loss of the federated model, or the gain in another metric; for
            recall the gain of the class with the smallest gain.
        p_value: P-value of the hypothesis that the federated model is worse by at least the margin; NaN without a test.
        level: Largest p-value at which the federated model is deployed; NaN without a test.
        candidates: Outcome of each candidate in order, if the rule names them; the fields above are those of the
            deployed candidate, or of the first one.
        deciding: Estimate of the number of samples that would have been enough, where the server cannot compute it from
            the counts; 0 if none was found, None if it is not estimated.
    """

    deployed: str
    samples: int
    worse: int
    better: int
    gain: float
    p_value: float
    level: float
    candidates: tuple[CandidateResult, ...] = ()
    deciding: int | None = None

    def __post_init__(self) -> None:
        # JSON has lists and mappings.
        rows = (row if isinstance(row, CandidateResult) else CandidateResult(**row) for row in self.candidates)
        object.__setattr__(self, "candidates", tuple(rows))

    @property
    def is_local(self) -> bool:
        """True if the client deploys its local model."""
        return self.deployed == LOCAL

    def scalars(self) -> dict[str, float]:
        """Return the numbers of a metrics row; NaN for a candidate that was not tested."""
        names = ("samples", "worse", "better", "gain", "p_value", "level")
        values = {"federated": float(not self.is_local), **{name: getattr(self, name) for name in names}}
        return values | {f"{row.name}/p_value": row.p_value for row in self.candidates}


#: Smallest level, and smallest confidence: tails of at most 1e-12 are left out of p-values.
_SMALLEST = 1e-9

#: Fields that some rows of `results/` lack, with the values of their runs.
EARLIER_VALUES = {"test": "sign", "splits": "holdout", "unit": "sample"}


@dataclass(frozen=True)
class DoNoHarm:
    """Rule by which a client deploys the federated model or its local model.

    Guarantee of the rule `certified`.

    - Population: the distribution of the client's held-out samples; with groups, a random sample of a random group.
    - Target: the client never deploys a federated model whose accuracy is lower than that of its local model by the
      margin or more. For regression: whose mean squared error is larger by the margin or more, with each difference of
      squared errors clipped to [-clip, clip].
    - Confidence: `confidence`, over the compared samples, for all comparisons of the client together.
    - Assumptions: these samples, or groups, are independent draws, and whether a group is held out does not depend on
      its size; both models were trained without them.

    The models are compared in `metric`, whatever the primary metric of the run: a model that is certified in accuracy
    may have a worse AUROC than the local one. Another metric replaces the accuracy in the target.

    With `candidates` each one is tested against the local model in the declared order, at the full level, up to the
    first one that fails (fixed-sequence testing). The probability that a harmful one passes is at most the level: the
    first harmful one in the order would have to pass its own test. Any choice among those that passed is therefore
    valid. The one with the largest observed gain is deployed, the first of equal ones.

    Without evidence the local model is deployed: of two models with equal accuracy the local one is used most of the
    time. `acceptance_probability` computes the power.

    Args:
        confidence: Probability that the client deploys no harmful model, in (0, 1).
        margin: Tolerated loss, at least 0 and below `clip`: a difference of accuracies, or of squared errors.
        rule: `certified` requires statistical evidence; `better` deploys the federated model if `metric` is better on
            the tuning split and has no guarantee (baseline).
        looks: Number of comparisons, at least 1, evenly spaced over the rounds, the last after the last round. Each
            comparison has the level (1 - confidence) / looks (Bonferroni).
        clip: Regression only: largest difference of squared errors, above 0 and finite.
        test: `unconditional`, the more powerful test; or `sign`, the sign test, which with a margin is conditional on
            the number of differing samples, and for regression a mixture of stakes.
        splits: `held_out` compares classifiers on the tuning and holdout splits together if neither training nor the
            selection of the round uses the tuning split; `holdout` on the holdout split only. For regression the test
            `unconditional` takes its stake from the tuning split and compares on the holdout split.
        candidates: Names of the method's models among which a client chooses, in the order of the tests, declared
            before data are seen; `exit_1` etc. is the private model up to this exit. Empty: what the method serves.
        metric: `accuracy`, for regression the squared error; `balanced_accuracy`; `recall`: no class gets worse by the
            margin or more; `auroc` on disjoint sets of samples, the mean over the client's classes of one against the
            rest; or `auroc_delong` on all samples. All but `auroc_delong`, which is asymptotic, are exact.
        unit: `group` compares on one sample of each group of `data.group_column`, such as a patient, drawn at random;
            `sample` on all samples, which must then be independent within a group, too. Equal without groups.

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
    candidates: tuple[str, ...] = ()
    metric: MetricName = "accuracy"
    unit: UnitName = "group"

    def __post_init__(self) -> None:
        if not _SMALLEST <= self.confidence <= 1 - _SMALLEST:
            raise UserError(f"do_no_harm.confidence: expected a number in [1e-9, 1 - 1e-9], got {self.confidence}")
        if not self.margin >= 0:
            raise UserError(f"do_no_harm.margin: expected at least 0, got {self.margin}")
        require_choice("do_no_harm.rule", self.rule, get_args(SelectionRule))
        require_choice("do_no_harm.test", self.test, get_args(TestName))
        require_choice("do_no_harm.splits", self.splits, get_args(ComparedSplits))
        require_choice("do_no_harm.metric", self.metric, get_args(MetricName))
        require_choice("do_no_harm.unit", self.unit, get_args(UnitName))
        names = self.candidates
        are_names = isinstance(names, tuple | list) and all(isinstance(name, str) for name in names)
        require(are_names and len(set(names)) == len(names), "do_no_harm.candidates", "different names", names)
        object.__setattr__(self, "candidates", tuple(names))  # a list cannot be hashed
        if self.looks < 1:
            raise UserError(f"do_no_harm.looks: expected at least 1, got {self.looks}")
        if not 0 < self.clip < math.inf:
            raise UserError(f"do_no_harm.clip: expected a finite number above 0, got {self.clip}")
        if self.margin >= self.clip:
            raise UserError(f"do_no_harm.margin: expected less than do_no_harm.clip, {self.clip}, got {self.margin}")

    @classmethod
    def from_stored(cls, values: Mapping[str, Any]) -> Self:
        """Create a rule from stored fields; some rows of `results/` lack the last ones.

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
    def compares_samples(self) -> bool:
        """True if each sample counts by itself: in accuracy, or in squared errors."""
        return self.metric == "accuracy"

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

    def evidence(self, local: HeldOut, federated: HeldOut, labels: Labels) -> Evidence | None:
        """Compute the evidence in a metric that needs labels; None in accuracy."""
        test = METRICS[self.metric].test
        return None if test is None else test(self, local, federated, labels)

    def decide(self, evidence: Evidence) -> Comparison:
        """Return the decision by the evidence in a metric that needs labels."""
        counts = evidence.samples, evidence.worse, evidence.better, evidence.gain
        if self.rule == "better":
            return Comparison(FEDERATED if evidence.gain > 0 else LOCAL, *counts, math.nan, math.nan)
        deployed = FEDERATED if evidence.p_value <= self.level else LOCAL
        return Comparison(deployed, *counts, evidence.p_value, self.level)

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
            deployed = FEDERATED if gain > 0 else LOCAL
            return Comparison(deployed, samples, worse, better, gain, math.nan, math.nan)
        if task == "classification":
            p_value = self.p_value(worse, better, samples)
        else:
            margin, stake = self.margin / self.clip, None
            if self.takes_stake and tuning is not None and len(tuning[0]):
                stake = betting_stake(self.clipped_gains(*tuning), margin, samples, self.level)
            p_value = betting_p_value(self.clipped_gains(local, federated), margin, stake)
        deployed = FEDERATED if p_value <= self.level else LOCAL
        return Comparison(deployed, samples, worse, better, gain, p_value, self.level)

    @property
    def takes_stake(self) -> bool:
        """True if the test of regression takes its stake from the tuning split."""
        return self.test == "unconditional" and self.splits == "held_out"

    def clipped_gains(self, local: Tensor, federated: Tensor) -> npt.NDArray[np.float64]:
        """Return clipped improvements of squared errors in units of `clip`, in [-1, 1]."""
        # A sample with a non-finite federated output counts as the largest loss, also if both are non-finite.
        difference = (local.double() - federated.double()).nan_to_num(nan=-self.clip)
        gains: npt.NDArray[np.float64] = (difference.clamp(-self.clip, self.clip) / self.clip).cpu().numpy()
        return gains
