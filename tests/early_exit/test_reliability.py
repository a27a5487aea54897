"""Calibration error of each exit, before and after temperature scaling."""

from __future__ import annotations

import math

import pytest
import torch

from fedekd.early_exit import ExitPolicy
from fedekd.early_exit.reliability import exit_reliabilities
from fedekd.early_exit.scoring import ExitOutputs
from fedekd.functional import fit_temperature
from fedekd.metrics import expected_calibration_error

POLICY = ExitPolicy((0.999, 0.8, -math.inf), (0.99, 0.8, -math.inf), (True, True, False), 0.05, 0.9, "ltt")


def outputs(seed: int, temperatures: tuple[float, ...] = (3.0, 1.0, 0.5), samples: int = 4000) -> ExitOutputs:
    """Outputs whose labels follow the softmax of each exit at its temperature."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(samples, 4, generator=generator)
    labels = torch.multinomial(logits.softmax(dim=1), 1, generator=generator).squeeze(1)
    return ExitOutputs(torch.stack([temperature * logits for temperature in temperatures], dim=1), labels)


def test_exit_reliabilities_fits_tuning_and_scales_test() -> None:
    tuning, test = outputs(0), outputs(1)
    exits = torch.from_numpy(POLICY.assign(test.to_scores().scores))
    for index, line in enumerate(exit_reliabilities(POLICY, tuning, test)):
        assert line.temperature == fit_temperature(tuning.logits[:, index], tuning.labels)
        assert line.temperature == pytest.approx((3.0, 1.0, 0.5)[index], rel=0.1)
        for temperature, error, exiting_error in (
            (1.0, line.error, line.exiting_error),
            (line.temperature, line.scaled_error, line.scaled_exiting_error),
        ):
            confidence, correct = (
                (test.logits[:, index].double() / temperature).softmax(1).amax(1),
                test.correct[:, index],
            )
            assert error == pytest.approx(expected_calibration_error(confidence, correct), abs=1e-6)
            at_exit = exits == index  # the exits of the unscaled scores
            assert exiting_error == pytest.approx(
                expected_calibration_error(confidence[at_exit], correct[at_exit]), abs=1e-6
            )
    first, _, last = exit_reliabilities(POLICY, tuning, test)
    assert first.scaled_error < 0.3 * first.error
    assert last.scaled_error < 0.3 * last.error


def test_exit_reliabilities_without_exiting_image_is_nan() -> None:
    closed = ExitPolicy((math.inf, -math.inf), (math.inf, -math.inf), (False, False), 0.05, 0.9, "ltt")
    part = outputs(0, (1.0, 2.0), samples=50)
    first, last = exit_reliabilities(closed, part, part)
    assert math.isnan(first.exiting_error)
    assert math.isnan(first.scaled_exiting_error)
    assert last.exiting_error == last.error


def test_scaling_changes_the_order_of_confidences_for_three_classes_only() -> None:
    first, second = torch.tensor([4.0, 3.0, -9.0]), torch.tensor([3.0, 1.0, 1.0])
    margins = [float(first.div(t).softmax(0).amax() - second.div(t).softmax(0).amax()) for t in (1.0, 5.0)]
    assert margins[0] * margins[1] < 0
    pair = torch.tensor([[4.0, 1.0], [2.0, -0.5]])
    confidences = [(pair / t).softmax(1).amax(1) for t in (0.1, 1.0, 5.0)]
    assert all(a >= b for a, b in confidences)
