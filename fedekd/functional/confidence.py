"""Confidences of a classifier, one number per sample: higher is more confident.

Unlike an energy, a confidence has a fixed scale: 1 is certain, for every number of classes and every batch. All are
computed in at least float32 and stay finite, gradients included, for logits of ±10⁴; a NaN logit gives a NaN
confidence. In float32 values above 1 - 6e-8 round to 1; `margin_energy` still ranks such samples.
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
    r"""Compute the probability of the most likely class, $\max_c p_c$.

    Calibration error refers to this confidence: of the samples with 0.8, four in five should be correct.

    Args:
        logits: Shape (B, C).

    Returns:
        Confidences in [1/C, 1], shape (B,).

    Raises:
        ValueError: If the shape is not (B, C).

    Reference:
        Hendrycks and Gimpel, ICLR 2017 (arXiv 1610.02136).

    Example:
        >>> max_softmax_confidence(torch.tensor([[0.0, 0.0], [100.0, 0.0]]))
        tensor([0.5000, 1.0000])
    """
    require_matrix(logits=logits)
    return upcast_to_float32(logits).softmax(dim=1).amax(dim=1)


def class_log_odds(logits: Tensor) -> Tensor:
    r"""Compute the log odds of each class, $z_c - \log \sum_{j \neq c} e^{z_j}$.

    They rank samples as the probability of the class does, also where it rounds to 1.

    Args:
        logits: Shape (B, C), C at least 2.

    Returns:
        Shape (B, C), float64.

    Raises:
        ValueError: If the shape is not (B, C).

    Example:
        >>> class_log_odds(torch.tensor([[90.0, 0.0], [0.0, 80.0]])).tolist()
        [[90.0, -90.0], [-80.0, 80.0]]
    """
    require_matrix(logits=logits)
    logits = logits.double()
    log_p = logits.log_softmax(dim=1)
    top = logits.argmax(dim=1, keepdim=True)
    others = logits.scatter(1, top, -math.inf).logsumexp(dim=1, keepdim=True)
    # Only the largest probability can be near 1, where 1 - p has no digits.
    odds = log_p - torch.log1p(-log_p.exp())
    return odds.scatter(1, top, logits.gather(1, top) - others)


def margin_confidence(logits: Tensor) -> Tensor:
    r"""Compute the difference of the two largest probabilities, $p_{(1)} - p_{(2)}$.

    `margin_energy` is this difference in logits, which has no upper bound.

    Args:
        logits: Shape (B, C), with C at least 2.

    Returns:
        Confidences in [0, 1], 0 for a tie, shape (B,).

    Raises:
        ValueError: If the shape is not (B, C) with C at least 2.

    Reference:
        Scheffer et al., Active Hidden Markov Models for Information Extraction, 2001.

    Example:
        >>> margin_confidence(torch.tensor([[1.0, 1.0, 0.0], [100.0, 0.0, 0.0]]))
        tensor([0., 1.])
    """
    _require_classes("margin_confidence", logits)
    first, second = upcast_to_float32(logits).softmax(dim=1).topk(2, dim=1).values.unbind(dim=1)
    return first - second


def entropy_confidence(logits: Tensor) -> Tensor:
    r"""Compute one minus the normalised entropy, $1 - H(p) / \log C$.

    Args:
        logits: Shape (B, C), with C at least 2.

    Returns:
        Confidences in [0, 1], 0 for equal probabilities, shape (B,).

    Raises:
        ValueError: If the shape is not (B, C) with C at least 2.

    Example:
        >>> entropy_confidence(torch.tensor([[5.0, 5.0, 5.0], [100.0, 0.0, 0.0]]))
        tensor([0., 1.])
    """
    _require_classes("entropy_confidence", logits)
    logits = upcast_to_float32(logits)
    # The eps is so small that it only affects p = 0, where it avoids 0 * log(0).
    entropy = entropy_energy(logits, eps=torch.finfo(logits.dtype).tiny)
    # In float32, equal probabilities of 7 classes give -2e-7.
    return (1 - entropy / math.log(logits.shape[1])).clamp_min(0)


def agreement_confidence(logits: Tensor, proxy_logits: Tensor, gamma: float = 1.0) -> Tensor:
    r"""Compute the confidence minus the disagreement with a proxy.

    $\max_c p_c - \gamma E(x)$, where E is FedeKD's energy (`kl_energy`, Eq. 1), which is large if an
    exit and the proxy are confident of different classes. The result has no lower bound.

    Args:
        logits: Logits of an exit, shape (B, C).
        proxy_logits: Logits of the proxy on the same samples, shape (B, C).
        gamma: Weight of the energy, at least 0.

    Returns:
        Confidences, at most 1, shape (B,).

    Raises:
        ValueError: If the shapes differ or are not (B, C).

    Example:
        >>> first, second = torch.tensor([[9.0, 0.0]]), torch.tensor([[0.0, 9.0]])
        >>> bool(agreement_confidence(first, first) > 0.999), bool(agreement_confidence(first, second) < 0)
        (True, True)
    """
    return max_softmax_confidence(logits) - gamma * kl_energy(logits, proxy_logits)


#: Name of `agreement_confidence`, which also needs the logits of a proxy.
AGREEMENT = "agreement"

CONFIDENCES: dict[str, Callable[[Tensor], Tensor]] = {
    "max_softmax": max_softmax_confidence,
    "margin": margin_confidence,
    "entropy": entropy_confidence,
}
"""Confidences of one network by name: from logits (B, C) to confidences (B,)."""

#: Names of all confidences.
SCORES = (*CONFIDENCES, AGREEMENT)


def score_exit(score: str, logits: Tensor, proxy_logits: Tensor | None = None, gamma: float = 1.0) -> Tensor:
    """Compute the confidence of a given name.

    Args:
        score: A name of `SCORES`.
        logits: Logits of an exit, shape (B, C).
        proxy_logits: Logits of the proxy, shape (B, C); required for `agreement` only.
        gamma: Weight of the energy in `agreement`, at least 0.

    Returns:
        Confidences, shape (B,).

    Raises:
        ValueError: If `agreement` has no proxy logits.
    """
    if score != AGREEMENT:
        return CONFIDENCES[score](logits)
    if proxy_logits is None:
        raise ValueError("proxy_logits: expected the logits of a proxy for score 'agreement', got None")
    return agreement_confidence(logits, proxy_logits, gamma)


def _require_classes(name: str, logits: Tensor) -> None:
    require_matrix(logits=logits)
    if logits.shape[1] < 2:
        raise ValueError(f"{name}: expected logits of at least 2 classes, got shape {tuple(logits.shape)}")
