"""How well clients are served: their scores, their calibration, and what they gain or lose by taking part."""

from fedekd.metrics.calibration import ReliabilityBin, expected_calibration_error, reliability
from fedekd.metrics.negative_transfer import NegativeTransfer, negative_transfer
from fedekd.metrics.scores import SCORE_NAME, score

__all__ = [
    "SCORE_NAME",
    "NegativeTransfer",
    "ReliabilityBin",
    "expected_calibration_error",
    "negative_transfer",
    "reliability",
    "score",
]
