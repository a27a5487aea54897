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

from fedekd.functional.energies import entropy_energy, kl_energy
from fedekd.functional.precision import upcast_to_float32
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
    return upcast_to_float32(logits).softmax(dim=1).amax(dim=1)


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
    first, second = upcast_to_float32(logits).softmax(dim=1).topk(2, dim=1).values.unbind(dim=1)
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
    logits = upcast_to_float32(logits)
    # An eps so small that it tells only on p = 0, which it keeps from 0 * log(0).
    entropy = entropy_energy(logits, eps=torch.finfo(logits.dtype).tiny)
    # In float32, equal probabilities of 7 classes come to -2e-7.
    return (1 - entropy / math.log(logits.shape[1])).clamp_min(0)


def agreement_confidence(logits: Tensor, proxy_logits: Tensor, gamma: float = 1.0) -> Tensor:
    r"""How sure a prediction is, less its disagreement with a second opinion, $\max_c p_c - \gamma E(x)$.

    E is FedeKD's disagreement relative to how unsure both are (`kl_energy`, Eq. 1): an exit and the shared proxy that
    are sure of different classes are far apart. The confidence has no lower bound.

    Args:
        logits: Of an exit, shape (B, C).
        proxy_logits: Of the proxy on the same samples, shape (B, C).
        gamma: What a unit of energy costs, at least 0.

    Returns:
        Confidences, at most 1, shape (B,).

    Raises:
        ValueError: The shapes differ or are not (B, C).

    Example:
        >>> sure, other = torch.tensor([[9.0, 0.0]]), torch.tensor([[0.0, 9.0]])
        >>> bool(agreement_confidence(sure, sure) > 0.999), bool(agreement_confidence(sure, other) < 0)
        (True, True)
    """
    return max_softmax_confidence(logits) - gamma * kl_energy(logits, proxy_logits)


#: The name of `agreement_confidence`, which needs a proxy's logits beside an exit's.
AGREEMENT = "agreement"

CONFIDENCES: dict[str, Callable[[Tensor], Tensor]] = {
    "max_softmax": max_softmax_confidence,
    "margin": margin_confidence,
    "entropy": entropy_confidence,
}
"""Confidences of one network by name: logits (B, C) to one number a sample (B,)."""

#: All names of confidences.
SCORES = (*CONFIDENCES, AGREEMENT)


def score_exit(score: str, logits: Tensor, proxy_logits: Tensor | None = None, gamma: float = 1.0) -> Tensor:
    """A confidence by its name.

    Args:
        score: A name of `SCORES`.
        logits: Of an exit, shape (B, C).
        proxy_logits: Of the proxy, shape (B, C); `agreement` alone needs them.
        gamma: Of `agreement`.

    Raises:
        ValueError: `agreement` has no proxy to agree with.
    """
    if score != AGREEMENT:
        return CONFIDENCES[score](logits)
    if proxy_logits is None:
        raise ValueError("agreement needs the logits of a proxy")
    return agreement_confidence(logits, proxy_logits, gamma)


def _require_classes(name: str, logits: Tensor) -> None:
    require_matrix(logits=logits)
    if logits.shape[1] < 2:
        raise ValueError(f"{name} needs logits of at least 2 classes, but has {tuple(logits.shape)}")
