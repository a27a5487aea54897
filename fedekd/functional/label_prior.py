"""Label priors: smoothed estimates, corrections, and EM under label shift.

Under label shift the distribution of labels changes and that of inputs within a class does not. A posterior of the
source distribution is then corrected by the ratio of the priors.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fedekd.functional.precision import upcast_to_float32
from fedekd.functional.shapes import require_matrix

#: Largest deviation of a row of probabilities from sum 1; rounding to float16 passes.
_SUM_TOLERANCE = 1e-3

#: Pseudo-counts of methods that add the log prior to the logits: in the training loss, and at serving time.
TRAINING_SMOOTHING, SERVING_SMOOTHING = 0.01, 1.0


def log_label_prior(counts: Tensor, smoothing: float) -> Tensor:
    r"""Compute the logarithm of the smoothed label prior.

    $$\log \pi(c) = \log \frac{n_c + s}{n + s C}$$

    Args:
        counts: $n_c$, number of samples of each class, shape (C,), at least 0.
        smoothing: s, pseudo-count of each class, at least 0; 0 gives -inf for a class without samples.

    Returns:
        Log-probabilities in float64, shape (C,), on the device of `counts`.

    Raises:
        ValueError: If the shape is not (C,), a count or `smoothing` is negative or not finite, or both are 0.

    Example:
        >>> log_label_prior(torch.tensor([3, 0, 1]), smoothing=1.0).exp()
        tensor([0.5714, 0.1429, 0.2857], dtype=torch.float64)

    Reference:
        Ren et al., Balanced Meta-Softmax, NeurIPS 2020 (arXiv 2007.10740); Chen and Chao, ICLR 2022 (arXiv 2107.00778).
    """
    if not 0 <= smoothing < math.inf:
        raise ValueError(f"smoothing: expected a finite number of at least 0, got {smoothing}")
    if counts.ndim != 1 or not len(counts):
        raise ValueError(f"counts: expected shape (C,) with C >= 1, got {tuple(counts.shape)}")
    smoothed = counts.detach().double() + smoothing
    total = smoothed.sum()
    if not (bool((counts >= 0).all()) and 0 < float(total) < math.inf):
        raise ValueError("counts: expected finite numbers of at least 0, one above 0 or smoothing above 0")
    return (smoothed / total).log()


def adjust_log_prior(logits: Tensor, source: Tensor, target: Tensor) -> Tensor:
    r"""Correct the logits of a classifier from one label prior to another.

    $$z'_c = z_c + \log \pi_{\text{target}}(c) - \log \pi_{\text{source}}(c)$$

    The softmax of the result is the posterior under the target prior if the softmax of `logits` is the posterior under
    the source prior. Equal priors return the logits unchanged.

    Args:
        logits: z, shape (B, C); log-probabilities are logits, too.
        source: Prior of the classifier, shape (C,), all above 0: smooth it (`log_label_prior`).
        target: Prior of the inputs, shape (C,), at least 0, one above 0. A class with 0 is impossible: its logit is
            -inf, its probability exactly 0, and it is never predicted.

    Returns:
        Logits of shape (B, C) in at least float32, differentiable; the correction is computed in float64.

    Raises:
        ValueError: If a shape is wrong, or a prior is out of range.

    Example:
        >>> even, skewed = torch.tensor([0.5, 0.5]), torch.tensor([0.9, 0.1])
        >>> adjust_log_prior(torch.zeros(1, 2), source=even, target=skewed).softmax(1)
        tensor([[0.9000, 0.1000]])

    Reference:
        Saerens, Latinne and Decaestecker, Neural Computation 14(1), 2002, Eq. 2.4.
    """
    require_matrix(logits=logits)
    source = _prior("source", source, logits.shape[1], is_positive=True)
    target = _prior("target", target, logits.shape[1], is_positive=False)
    logits = upcast_to_float32(logits)
    return logits + (target.log() - source.log()).to(logits.device, logits.dtype)


def estimate_label_prior(
    probabilities: Tensor,
    source: Tensor,
    strength: float = 0.0,
    tolerance: float = 1e-9,
    max_iterations: int = 10_000,
) -> Tensor:
    r"""Estimate the label prior of unlabelled inputs by expectation maximisation.

    With $\pi_0$ the source prior and $p_i(c)$ the source posterior of input i, each iteration computes

    $$r_i(c) = \frac{p_i(c)\, \pi(c) / \pi_0(c)}{\sum_j p_i(j)\, \pi(j) / \pi_0(j)}, \qquad
    \pi(c) \leftarrow \frac{\sum_i r_i(c) + a\, \pi_0(c)}{n + a}.$$

    It starts at $\pi_0$ and maximises $\sum_i \log \sum_c p_i(c)\, \pi(c) / \pi_0(c) + a \sum_c \pi_0(c) \log \pi(c)$,
    which is concave and never falls. With a = 0 this is the maximum of the likelihood, which for a few inputs is often
    a single class; $a > 0$ is a Dirichlet prior with $a$ pseudo-inputs distributed as the source.

    Args:
        probabilities: $p_i(c)$, shape (n, C), at least 0, rows that sum to 1 within 0.001.
        source: $\pi_0$, prior of the classifier, shape (C,), all above 0, however small.
        strength: a, at least 0.
        tolerance: Stops when no entry changes by more, above 0.
        max_iterations: Largest number of iterations, at least 1.

    Returns:
        The prior in float64, shape (C,), on the CPU; the source for n = 0.

    Raises:
        ValueError: If a shape is wrong, or an argument out of range.

    Example:
        >>> posterior = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        >>> estimate_label_prior(posterior, source=torch.tensor([0.5, 0.5]))
        tensor([0.7500, 0.2500], dtype=torch.float64)
        >>> estimate_label_prior(posterior, source=torch.tensor([0.5, 0.5]), strength=4.0)
        tensor([0.6250, 0.3750], dtype=torch.float64)

    Reference:
        Saerens, Latinne and Decaestecker, Neural Computation 14(1), 2002, Eq. 2.9; concavity: Alexandari, Kundaje and
        Shrikumar, ICML 2020 (arXiv 1901.06852).
    """
    if not 0 <= strength < math.inf:
        raise ValueError(f"strength: expected a finite number of at least 0, got {strength}")
    if not (tolerance > 0 and max_iterations >= 1):
        raise ValueError(
            f"tolerance, max_iterations: expected above 0 and at least 1, got {tolerance} and {max_iterations}"
        )
    require_matrix(probabilities=probabilities)
    p = probabilities.detach().to("cpu", torch.float64)
    if not (p.isfinite().all() and (p >= 0).all() and ((p.sum(dim=1) - 1).abs() <= _SUM_TOLERANCE).all()):
        raise ValueError(
            f"probabilities: expected finite numbers of at least 0, with sum 1 within {_SUM_TOLERANCE} in each row"
        )
    source = _prior("source", source, p.shape[1], is_positive=True)
    if len(p) == 0:
        return source
    # In the log domain, because a ratio to a tiny source prior overflows.
    prior, log_ratios = source, p.log() - source.log()
    for _ in range(max_iterations):
        responsibilities = (log_ratios + prior.log()).softmax(dim=1)
        previous, prior = prior, (responsibilities.sum(dim=0) + strength * source) / (len(p) + strength)
        if float((prior - previous).abs().max()) <= tolerance:
            break
    return prior


def _prior(name: str, prior: Tensor, classes: int, is_positive: bool) -> Tensor:
    """Check a prior and return it in float64 on the CPU, with sum 1.

    Raises:
        ValueError: If its shape is not (C,), or a value is out of range.
    """
    if prior.shape != (classes,):
        raise ValueError(f"{name}: expected shape ({classes},), one probability per class, got {tuple(prior.shape)}")
    prior = prior.detach().to("cpu", torch.float64)
    total = float(prior.sum())
    normalised = prior / total  # may underflow to 0
    is_valid = bool((normalised > 0).all() if is_positive else (normalised >= 0).all()) and 0 < total < math.inf
    if not is_valid:
        allowed = "above 0" if is_positive else "of at least 0, one above 0"
        raise ValueError(f"{name}: expected finite probabilities {allowed}, got {prior.tolist()}")
    return normalised
