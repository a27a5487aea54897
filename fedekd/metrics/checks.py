"""Checks of the scores of finished training."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

#: Half of the last printed digit of a score.
_ROUNDING = 5e-5

#: Metric that shows a network which predicts one class.
BALANCED = "balanced_accuracy"


def predicts_like_one_class(metrics: Mapping[str, float], labels: Tensor, num_classes: int) -> bool:
    """Return True if scores are not better than those of predicting one class.

    That is an accuracy of at most the rate of the most frequent class, or a balanced accuracy of 1/C. A split of one
    class shows nothing.

    Args:
        metrics: Metrics of the split by key.
        labels: Labels of the split, int64, shape (N,); with N = 0 only the balanced accuracy is compared.
        num_classes: C.

    Example:
        >>> predicts_like_one_class({"accuracy": 0.75}, torch.tensor([0, 0, 0, 1]), 2)
        True
        >>> predicts_like_one_class({"accuracy": 1.0}, torch.tensor([0, 0, 0, 1]), 2)
        False
    """
    nan = float("nan")
    if len(labels):
        rate = torch.bincount(labels).max().item() / len(labels)
        if rate < 1 and metrics.get("accuracy", nan) <= rate:
            return True
    return abs(metrics.get(BALANCED, nan) - 1 / num_classes) <= _ROUNDING
