"""How sure a classifier is of its prediction, one number a sample: higher is surer.

Unlike an energy, a confidence has a scale of its own: 1 is certain, whatever the classes and the batch. All are
computed in at least float32 and stay finite, gradients included, for logits of ±10⁴; a logit that is NaN makes its
sample's confidence NaN. In float32 what lies above 1 - 6e-8 reads 1; `margin_energy` still ranks such samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fedekd.functional.energies import entropy_energy
from fedekd.functional.precision import at_least_float32
from fedekd.functional.shapes import require_matrix


def max_softmax_confidence(logits: Tensor) -> Tensor:
    r"""Probability of the likeliest class, $\max_c p_c$ (Hendrycks & Gimpel, 2017, arXiv 1610.02136).

    It is the confidence of which calibration speaks: of the samples that have 0.8, four in five should be right.

    Args:
        logits: Shape (B, C).

    Returns:
        Confidences from 1/C to 1, shape (B,).

    Raises:
        ValueError: The shape is not (B, C).

    Example:
        >>> max_softmax_confidence(torch.tensor([[0.0, 0.0], [100.0, 0.0]]))
        tensor([0.5000, 1.0000])
    """
    require_matrix(logits=logits)
    return at_least_float32(logits).softmax(dim=1).amax(dim=1)


def margin_confidence(logits: Tensor) -> Tensor:
    r"""Lead of the likeliest class over the second in probability, $p_{(1)} - p_{(2)}$ (Scheffer et al., 2001).

    `margin_energy` is the same lead in logits, which has no upper bound.

    Args:
        logits: Shape (B, C), with C of at least 2.

    Returns:
        Confidences from 0, for a tie, to 1, shape (B,).

    Raises:
        ValueError: The shape is not (B, C), or C is 1: there is no second class.

    Example:
        >>> margin_confidence(torch.tensor([[1.0, 1.0, 0.0], [100.0, 0.0, 0.0]]))
        tensor([0., 1.])
    """
    _require_classes("margin_confidence", logits)
    first, second = at_least_float32(logits).softmax(dim=1).topk(2, dim=1).values.unbind(dim=1)
    return first - second


def entropy_confidence(logits: Tensor) -> Tensor:
    r"""What the prediction's entropy lacks to that of guessing, $1 - H(p) / \log C$.

    Args:
        logits: Shape (B, C), with C of at least 2.

    Returns:
        Confidences from 0, for equal probabilities, to 1, shape (B,).

    Raises:
        ValueError: The shape is not (B, C), or C is 1: its entropy is always 0.

    Example:
        >>> entropy_confidence(torch.tensor([[5.0, 5.0, 5.0], [100.0, 0.0, 0.0]]))
        tensor([0., 1.])
    """
    _require_classes("entropy_confidence", logits)
    logits = at_least_float32(logits)
    # An eps so small that it tells only on p = 0, which it keeps from 0 * log(0).
    entropy = entropy_energy(logits, eps=torch.finfo(logits.dtype).tiny)
    # In float32, equal probabilities of 7 classes come to -2e-7.
    return (1 - entropy / math.log(logits.shape[1])).clamp_min(0)


CONFIDENCES: dict[str, Callable[[Tensor], Tensor]] = {
    "max_softmax": max_softmax_confidence,
    "margin": margin_confidence,
    "entropy": entropy_confidence,
}
"""Confidences by name: logits (B, C) to one number a sample (B,)."""


def _require_classes(name: str, logits: Tensor) -> None:
    require_matrix(logits=logits)
    if logits.shape[1] < 2:
        raise ValueError(f"{name} needs logits of at least 2 classes, but has {tuple(logits.shape)}")
