"""Do no harm: a client takes the federated model only if its own held-out samples show that it is no worse."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from fedekd.errors import UserError, nearest
from fedekd.functional import betting_p_value, paired_p_value
from fedekd.tasks import Task

SelectionRule = Literal["certified", "better"]
Deployed = Literal["federated", "local"]


@dataclass(frozen=True)
class Comparison:
    """What a client found when it compared its local model with the federated one, and which of them it keeps.

    Attributes:
        deployed: `federated` or `local`: the model that the client uses.
        samples: How many samples both have judged.
        worse: Of classes, how many the local model alone gets right; 0 for regression.
        better: How many the federated model alone gets right; 0 for regression.
        gain: Mean difference of the losses, local minus federated: positive where the federated model is better.
        p_value: Of "the federated model is worse by the margin or more"; NaN where nothing was tested.
        level: The p-value had to be at most this; NaN where nothing was tested.
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
    """When a client takes the federated model, and when it keeps the one that it trained alone.

    With probability `confidence` over its holdout split, over all looks together, a client takes no federated model
    whose accuracy on samples like these is lower than its local model's by the margin or more. For regression the same
    is promised of the mean difference of squared errors, each clipped to [-clip, clip].

    The certificate says "better" or, with a margin, "not much worse", and asks for evidence: of two models of equal
    accuracy the local one is kept most of the time.

    Args:
        confidence: 1 minus the probability that a client takes a model that harms it, in (0, 1).
        margin: How much worse is still no harm, at least 0: a difference of accuracies, or of squared errors.
        rule: `certified` asks for the evidence; `better` takes the model with the lower loss on the tuning split,
            which promises nothing and is there to be compared with.
        looks: How often clients compare, in rounds of equal distance, the last one after the last round; each look is
            made at (1 - confidence) / looks.
        clip: Of regression, the largest difference of squared errors that counts, above 0.
    """

    confidence: float = 0.9
    margin: float = 0.0
    rule: SelectionRule = "certified"
    looks: int = 1
    clip: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.confidence < 1:
            raise UserError(f"do_no_harm.confidence is {self.confidence}, and must be in (0, 1)")
        if not self.margin >= 0:
            raise UserError(f"do_no_harm.margin is {self.margin}, and must be at least 0")
        if self.rule not in (rules := get_args(SelectionRule)):
            raise UserError(f"do_no_harm.rule is {self.rule!r}, which is not known; {nearest(str(self.rule), rules)}")
        if self.looks < 1:
            raise UserError(f"do_no_harm.looks is {self.looks}, and must be at least 1")
        if not 0 < self.clip < math.inf:
            raise UserError(f"do_no_harm.clip is {self.clip}, and must be a finite number above 0")
        if self.margin >= self.clip:
            raise UserError(f"do_no_harm.margin is {self.margin}, and must be below do_no_harm.clip, {self.clip}")

    @property
    def split(self) -> str:
        """The split of its data on which a client compares."""
        return "holdout" if self.rule == "certified" else "tuning"

    @property
    def level(self) -> float:
        """Largest accepted p-value of one comparison, (1 - confidence) / looks."""
        return round(1 - self.confidence, 12) / self.looks

    @property
    def nuisance_level(self) -> float:
        """The part of the level that bounds how often two classifiers differ, where there is a margin."""
        return self.level / 10

    def p_value(self, worse: int, better: int, samples: int) -> float:
        """Of "the federated classifier is worse by the margin or more"; up to `level` it is taken."""
        return paired_p_value(worse, better, samples, self.margin, self.nuisance_level)

    def compares_at(self, round_idx: int, rounds: int) -> bool:
        """Whether clients compare after a round, of 1..rounds."""
        return round_idx in {math.ceil(rounds * look / self.looks) for look in range(1, self.looks + 1)}

    def compare(self, local: Tensor, federated: Tensor, task: Task) -> Comparison:
        """Compare two models by their losses on the same samples.

        Args:
            local: 1 where the local model is wrong and 0 where it is right, or its squared errors, (n,).
            federated: The same of the federated model.
            task: Decides which.

        Raises:
            ValueError: The shapes differ.
        """
        if local.shape != federated.shape or local.ndim != 1:
            raise ValueError(
                f"losses must have one shape (n,), but have {tuple(local.shape)}, {tuple(federated.shape)}"
            )
        difference = local.double() - federated.double()
        worse, better, samples = int((difference < 0).sum()), int((difference > 0).sum()), len(difference)
        gain = float(difference.mean()) if samples else 0.0
        if self.rule == "better":
            return Comparison(
                "federated" if gain > 0 else "local",
                samples,
                *((worse, better) if task == "classification" else (0, 0)),
                gain,
                math.nan,
                math.nan,
            )
        if task == "classification":
            p_value = self.p_value(worse, better, samples)
        else:
            worse = better = 0
            # A model without a finite output loses every sample; a difference of two such is no evidence.
            gains = difference.nan_to_num(nan=-self.clip).clamp(-self.clip, self.clip) / self.clip
            p_value = betting_p_value(gains.cpu().numpy(), self.margin / self.clip)
        deployed: Deployed = "federated" if p_value <= self.level else "local"
        return Comparison(deployed, samples, worse, better, gain, p_value, self.level)
