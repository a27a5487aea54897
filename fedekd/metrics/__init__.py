"""Metrics: registry of scores, Delta, expected calibration error."""

from fedekd.metrics.calibration import ReliabilityBin, expected_calibration_error, reliability
from fedekd.metrics.negative_transfer import NegativeTransfer, negative_transfer
from fedekd.metrics.registry import METRICS, MetricSpec, build_metrics, primary_metric, score

__all__ = [
    "METRICS",
    "MetricSpec",
    "NegativeTransfer",
    "ReliabilityBin",
    "build_metrics",
    "expected_calibration_error",
    "negative_transfer",
    "primary_metric",
    "reliability",
    "score",
]
