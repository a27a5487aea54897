"""Metrics of classification, from the logits and labels of a whole split."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torchmetrics.functional.classification import multiclass_confusion_matrix

from fedekd.functional import class_log_odds
from fedekd.metrics.calibration import expected_calibration_error


def accuracy(logits: Tensor, labels: Tensor, num_classes: int) -> float:
    r"""Accuracy $\frac1N \sum_i 1[\hat y_i = y_i]$, in float64.

    Args:
        logits: Shape (N, C).
        labels: Class indices, shape (N,).
        num_classes: C; not used.

    Returns:
        A value in [0, 1]; NaN if there are no samples or a logit is not finite.

    Raises:
        ValueError: If the shapes do not match.
    """
    if not _has_values("accuracy", logits, labels):
        return math.nan  # argmax of NaN is class 0
    # torchmetrics divides in float32: 0.9338 would be 0.9337999820709229 in summary.json.
    return (logits.argmax(dim=1) == labels).to(torch.float64).mean().item()


def recall(logits: Tensor, labels: Tensor, num_classes: int) -> list[float]:
    r"""Recall of each class, in float64.

    $$r_c = \frac{\sum_i 1[y_i = c, \hat y_i = c]}{\sum_i 1[y_i = c]}$$

    Args:
        logits: Shape (N, C).
        labels: Class indices, shape (N,).
        num_classes: C.

    Returns:
        C values in [0, 1]; NaN for a class without samples, and for all classes if a logit is not finite.

    Raises:
        ValueError: If the shapes do not match.
    """
    if not _has_values("recall", logits, labels):
        return [math.nan] * num_classes
    counts = _confusion(logits, labels)
    values: list[float] = (counts.diagonal() / counts.sum(dim=1)).tolist()
    return values


def balanced_accuracy(logits: Tensor, labels: Tensor, num_classes: int) -> float:
    r"""Balanced accuracy $\frac1C \sum_c r_c$, the mean recall of the classes.

    Args:
        logits: Shape (N, C).
        labels: Class indices, shape (N,).
        num_classes: C.

    Returns:
        A value in [0, 1]; NaN if a class has no samples or a logit is not finite.

    Raises:
        ValueError: If the shapes do not match.

    Reference:
        Brodersen et al., The balanced accuracy and its posterior distribution, ICPR 2010.
    """
    return math.fsum(recall(logits, labels, num_classes)) / num_classes


def macro_f1(logits: Tensor, labels: Tensor, num_classes: int) -> float:
    r"""Macro F1 $\frac1C \sum_c \frac{2 TP_c}{2 TP_c + FP_c + FN_c}$, in float64.

    Args:
        logits: Shape (N, C).
        labels: Class indices, shape (N,).
        num_classes: C.

    Returns:
        A value in [0, 1]; NaN if a class has no samples or a logit is not finite.

    Raises:
        ValueError: If the shapes do not match.
    """
    if not _has_values("macro F1", logits, labels):
        return math.nan
    counts = _confusion(logits, labels)
    actual, predicted = counts.sum(dim=1), counts.sum(dim=0)
    if bool((actual == 0).any()):
        return math.nan
    return (2 * counts.diagonal() / (actual + predicted)).mean().item()


def auroc(logits: Tensor, labels: Tensor, num_classes: int) -> float:
    r"""Area under the ROC curve, one class against the rest, mean over classes.

    $$\frac1C \sum_c P(p_c(x^+) > p_c(x^-)) + \frac12 P(p_c(x^+) = p_c(x^-))$$

    with $p_c$ the softmax, $x^+$ a sample of class $c$ and $x^-$ one of another class; by average ranks of the log
    odds of $p_c$, in float64, which differ where $p_c$ rounds to 1.

    Args:
        logits: Shape (N, C).
        labels: Class indices, shape (N,).
        num_classes: C.

    Returns:
        A value in [0, 1]; NaN if a class has no samples or a logit is not finite.

    Raises:
        ValueError: If the shapes do not match.

    Reference:
        Hanley and McNeil, The meaning and use of the area under a ROC curve, Radiology 143 (1982).
    """
    if not _has_values("AUROC", logits, labels) or len(torch.bincount(labels).nonzero()) < num_classes:
        return math.nan
    from scipy.stats import rankdata  # slow to import, and only where all classes have samples

    is_class = torch.nn.functional.one_hot(labels, num_classes).cpu().numpy()
    # Mann-Whitney U: equal to roc_auc_score of scikit-learn, which takes 60 ms for 200 samples of 100 classes.
    # Rounded: equal logits in another order are a tie.
    ranks = rankdata(class_log_odds(logits).round(decimals=9).cpu().numpy(), axis=0)
    positive = is_class.sum(axis=0)
    wins = (ranks * is_class).sum(axis=0) - positive * (positive + 1) / 2
    return float((wins / (positive * (len(labels) - positive))).mean())


def ece(logits: Tensor, labels: Tensor, num_classes: int) -> float:
    """Return `expected_calibration_error` of the largest softmax value.

    Args:
        logits: Shape (N, C).
        labels: Class indices, shape (N,).
        num_classes: C; not used.

    Returns:
        A value in [0, 1]; NaN if there are no samples or a logit is not finite.

    Raises:
        ValueError: If the shapes do not match.
    """
    if not _has_values("expected calibration error", logits, labels):
        return math.nan
    # A sum of softmax values may exceed 1 by a rounding error, but none of them does.
    confidence, predicted = logits.double().softmax(dim=1).max(dim=1)
    return expected_calibration_error(confidence, predicted == labels)


def _has_values(name: str, logits: Tensor, labels: Tensor) -> bool:
    """Check the shapes, and return whether there are samples with finite logits.

    Raises:
        ValueError: If the shapes do not match.
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(
            f"{name}: expected logits (N, C) and labels (N,), got {tuple(logits.shape)} and {tuple(labels.shape)}"
        )
    return len(labels) > 0 and bool(torch.isfinite(logits).all())


def _confusion(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the samples by true and predicted class, float64, shape (C, C)."""
    counts = multiclass_confusion_matrix(logits.argmax(dim=1), labels, logits.shape[1], validate_args=False)
    return counts.to(torch.float64)
