"""Metrics: registry of scores, Delta, expected calibration error."""

from fedekd.metrics.calibration import ReliabilityBin, expected_calibration_error, reliability
from fedekd.metrics.checks import BALANCED, predicts_like_one_class
from fedekd.metrics.negative_transfer import NegativeTransfer, negative_transfer
from fedekd.metrics.registry import METRICS, MetricSpec, build_metrics, primary_metric, score
from fedekd.metrics.selection import (
    column_names,
    compute_metrics,
    computed_metrics,
    is_undefined,
    metric_keys,
    missing_classes,
    select_metrics,
)

__all__ = [
    "BALANCED",
    "METRICS",
    "MetricSpec",
    "NegativeTransfer",
    "ReliabilityBin",
    "build_metrics",
    "column_names",
    "compute_metrics",
    "computed_metrics",
    "expected_calibration_error",
    "is_undefined",
    "metric_keys",
    "missing_classes",
    "negative_transfer",
    "predicts_like_one_class",
    "primary_metric",
    "reliability",
    "score",
    "select_metrics",
]
