"""Evaluation under distribution shift (image corruptions)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from fedekd.data.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from fedekd.early_exit.calibration.calibrator import SelectiveRiskCalibrator
from fedekd.early_exit.client_calibration import fit_policy
from fedekd.early_exit.policy import ExitPolicy
from fedekd.early_exit.policy_metrics import PolicyMetrics, evaluate_policy
from fedekd.early_exit.scoring import exit_outputs
from fedekd.models import ExitCosts, MultiExitNetwork


class LabelledImages(NamedTuple):
    """Images with their classes.

    Attributes:
        images: Pixels 0..255, uint8, shape (n, C, H, W).
        labels: Class indices, shape (n,).
    """

    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class CorruptionResult:
    """A network and its policy under one corruption.

    Attributes:
        corruption: Name of the corruption.
        severity: Severity, 1..5.
        original: The policy calibrated on clean images; its guarantee does not apply here.
        recalibrated: A policy calibrated on images with the same corruption.
    """

    corruption: str
    severity: int
    original: PolicyMetrics
    recalibrated: PolicyMetrics


def evaluate_corruptions(
    network: MultiExitNetwork,
    policy: ExitPolicy,
    costs: ExitCosts,
    tuning: LabelledImages,
    calibration: LabelledImages,
    test: LabelledImages,
) -> Iterator[CorruptionResult]:
    """Evaluate a policy under each corruption at each severity.

    The three sets are corrupted independently.

    Args:
        network: The calibrated network.
        policy: Its policy, calibrated on clean images with a score that needs no proxy.
        costs: Costs of the network.
        tuning: Clean images on which, after corruption, the sequence of tests is fixed.
        calibration: Clean images on which, after corruption, the tests are made.
        test: Clean images on which, after corruption, both policies are evaluated.
    """
    calibrator = SelectiveRiskCalibrator(policy.target_risk, policy.confidence, policy.mode)
    for name in CORRUPTIONS:
        for severity in SEVERITIES:
            tuned, calibrated, tested = (
                exit_outputs(network, corrupt(part.images, name, severity, seed), part.labels)
                for seed, part in enumerate((tuning, calibration, test))
            )
            recalibrated = fit_policy(calibrator, network, costs, tuned, calibrated, policy.score, policy.gamma)
            results = (evaluate_policy(each, tested, costs) for each in (policy, recalibrated))
            yield CorruptionResult(name, severity, *results)
