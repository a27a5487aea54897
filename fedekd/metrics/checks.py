"""Checks of the scores of finished training."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

#: Half of the last printed digit of a score.
_ROUNDING = 5e-5

#: Metric that shows a network which predicts one class.
BALANCED = "balanced_accuracy"


def predicts_like_one_class(metrics: Mapping[str, float], class_counts: Tensor) -> bool:
    """Return True if scores are not better than those of predicting one class.

    That is an accuracy of at most the rate of the most frequent class, or a balanced accuracy of at most 1/C. A split
    of one class shows nothing.

    Args:
        metrics: Metrics of the split by key.
        class_counts: Samples of the split by class, shape (C,).

    Example:
        >>> import torch
        >>> predicts_like_one_class({"accuracy": 0.75}, torch.tensor([3, 1]))
        True
        >>> predicts_like_one_class({"accuracy": 1.0}, torch.tensor([3, 1]))
        False
    """
    nan = float("nan")
    rate = (class_counts.max() / class_counts.double().sum()).item()
    if rate < 1 and metrics.get("accuracy", nan) <= rate:
        return True
    return metrics.get(BALANCED, nan) <= 1 / len(class_counts) + _ROUNDING
