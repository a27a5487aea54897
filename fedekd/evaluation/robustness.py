"""Where the promise ends: the same policy on images that have changed, and one calibrated on such images."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor

from fedekd.certificates import SelectiveRiskCalibrator
from fedekd.data.corruptions import CORRUPTIONS, LEVELS, corrupt
from fedekd.evaluation.scoring import ExitOutputs, exit_outputs
from fedekd.evaluation.tradeoff import Outcome, outcome
from fedekd.exits import ExitPolicy
from fedekd.models import ExitCosts, MultiExitNetwork


@dataclass(frozen=True)
class Corrupted:
    """A network and its policy on corrupted images.

    Attributes:
        corruption: Its name.
        level: 1..5.
        kept: With the policy that was calibrated on clean images; its promise says nothing here.
        recalibrated: With a policy calibrated on images corrupted alike.
    """

    corruption: str
    level: int
    kept: Outcome
    recalibrated: Outcome


@dataclass(frozen=True, eq=False)
class Labelled:
    """Some images and their classes.

    Attributes:
        images: Pixels 0..255, uint8, (n, C, H, W).
        labels: Classes, (n,).
    """

    images: Tensor
    labels: Tensor


def under_corruption(
    network: MultiExitNetwork,
    policy: ExitPolicy,
    costs: ExitCosts,
    tuning: Labelled,
    calibration: Labelled,
    test: Labelled,
    seed: int = 0,
    finished: Callable[[], None] = lambda: None,
) -> Iterator[Corrupted]:
    """Each corruption at each level, one at a time.

    Args:
        network: The network that was calibrated.
        policy: Its policy, of clean images.
        costs: Of the network.
        tuning: Clean images, to be corrupted, on which the order of the tests is decided.
        calibration: And those on which the tests are made.
        test: And those that are judged.
        seed: Of what is random in a corruption; the three kinds of images are corrupted independently.
        finished: Called after each.
    """
    calibrator = SelectiveRiskCalibrator(policy.alpha, policy.delta, policy.mode)
    for name in CORRUPTIONS:
        for level in LEVELS:
            tuned, calibrated, judged = (
                _outputs(network, part, name, level, 3 * seed + place)
                for place, part in enumerate((tuning, calibration, test))
            )
            scored, tuning_scored = calibrated.scored(policy.score), tuned.scored(policy.score)
            again = calibrator.fit(
                scored.scores,
                scored.correct,
                tuning_scored.scores,
                tuning_scored.correct,
                scored.true_class_probability,
                score=policy.score,
            )
            yield Corrupted(name, level, outcome(policy, judged, costs), outcome(again, judged, costs))
            finished()


def _outputs(network: MultiExitNetwork, part: Labelled, name: str, level: int, seed: int) -> ExitOutputs:
    return exit_outputs(network, corrupt(part.images, name, level, seed), part.labels)
