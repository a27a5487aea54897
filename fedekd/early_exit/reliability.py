"""Calibration error of each exit, before and after temperature scaling."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedekd.early_exit.policy import ExitPolicy
from fedekd.early_exit.scoring import ExitOutputs
from fedekd.functional import fit_temperature
from fedekd.metrics import ReliabilityBin, expected_calibration_error, reliability


@dataclass(frozen=True, eq=False)
class ExitReliability:
    """Agreement of confidence and accuracy at one exit, on the test split.

    The temperature is not part of a policy. Dividing the logits by a temperature keeps the order of images by their
    largest softmax value only for two classes: scaled confidences would need thresholds of their own.

    Attributes:
        exit: Number of the exit, from 1.
        error: Expected calibration error over all images.
        exiting_error: Expected calibration error over the images that take the exit; NaN if none does.
        bins: Bins of the reliability diagram, over all images.
        temperature: Temperature of the exit, fitted on the tuning split.
        scaled_error: As `error`, with the logits divided by the temperature.
        scaled_exiting_error: As `exiting_error`, likewise, over the same images.
    """

    exit: int
    error: float
    exiting_error: float
    bins: Sequence[ReliabilityBin]
    temperature: float
    scaled_error: float
    scaled_exiting_error: float


def exit_reliabilities(policy: ExitPolicy, tuning: ExitOutputs, test: ExitOutputs) -> list[ExitReliability]:
    """Evaluate the confidence of each exit under a policy.

    One temperature per exit is fitted on the tuning split. It changes neither the predictions nor the exits that the
    images take.

    Args:
        policy: Policy that assigns the test images to exits by the score `max_softmax`.
        tuning: Outputs for the tuning split, at least 1 image.
        test: Outputs for the test split.

    Reference:
        Guo et al., On calibration of modern neural networks, ICML 2017.
    """
    scores = test.to_scores()
    exits = policy.assign(scores.scores)
    results = []
    for index in range(policy.num_exits):
        # Softmax probabilities may exceed 1 by round-off.
        confidence = torch.from_numpy(scores.scores[:, index]).clamp(0.0, 1.0)
        correct, exiting = torch.from_numpy(scores.correct[:, index]), torch.from_numpy(exits == index)
        temperature = fit_temperature(tuning.logits[:, index], tuning.labels)
        scaled = (test.logits[:, index].double() / temperature).softmax(dim=1).amax(dim=1).clamp(0.0, 1.0)
        results.append(
            ExitReliability(
                index + 1,
                expected_calibration_error(confidence, correct),
                _error(confidence, correct, exiting),
                reliability(confidence, correct),
                temperature,
                expected_calibration_error(scaled, correct),
                _error(scaled, correct, exiting),
            )
        )
    return results


def _error(confidence: Tensor, correct: Tensor, mask: Tensor) -> float:
    return expected_calibration_error(confidence[mask], correct[mask]) if mask.any() else math.nan
