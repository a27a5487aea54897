"""Where the promise ends: the same policy on images that have changed, and one calibrated on such images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from fedekd.data.corruptions import CORRUPTIONS, LEVELS, corrupt
from fedekd.early_exit.calibration.calibrator import SelectiveRiskCalibrator
from fedekd.early_exit.client_calibration import fit_policy
from fedekd.early_exit.policy import ExitPolicy
from fedekd.early_exit.policy_metrics import PolicyMetrics, evaluate_policy
from fedekd.early_exit.scoring import ExitOutputs, exit_outputs
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
    kept: PolicyMetrics
    recalibrated: PolicyMetrics


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
) -> Iterator[Corrupted]:
    """Each corruption at each level, one at a time; the three kinds of images are corrupted independently.

    Args:
        network: The network that was calibrated.
        policy: Its policy, of clean images; one that asks no proxy.
        costs: Of the network.
        tuning: Clean images, to be corrupted, on which the order of the tests is decided.
        calibration: And those on which the tests are made.
        test: And those that are judged.
    """
    calibrator = SelectiveRiskCalibrator(policy.alpha, policy.delta, policy.mode)
    for name in CORRUPTIONS:
        for level in LEVELS:
            tuned, calibrated, judged = (
                _outputs(network, part, name, level, seed=place)
                for place, part in enumerate((tuning, calibration, test))
            )
            again = fit_policy(calibrator, network, costs, tuned, calibrated, policy.score, policy.gamma)
            yield Corrupted(name, level, evaluate_policy(policy, judged, costs), evaluate_policy(again, judged, costs))


def _outputs(network: MultiExitNetwork, part: Labelled, name: str, level: int, seed: int) -> ExitOutputs:
    return exit_outputs(network, corrupt(part.images, name, level, seed), part.labels)
