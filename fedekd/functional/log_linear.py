"""Weighted combinations of the members of an ensemble.

The weights are fitted on held-out samples. All fits are convex with one minimum: they shrink the weights towards equal
ones, which they return unchanged for few samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedekd.functional.precision import upcast_to_float32

#: Smaller log-probabilities are raised to this value, as in PyTorch's `binary_cross_entropy`: one member must not veto
#: a class by a probability that was rounded to 0.
LOWEST_LOG_PROBABILITY = -100.0

_Array = npt.NDArray[np.float64]


def combine_log_linear(log_probabilities: Tensor, weights: Tensor) -> Tensor:
    r"""Combine classifiers by a weighted geometric mean of their probabilities.

    $$\log p(c) = \sum_m w_m \log p_m(c) - \log \sum_j \exp \sum_m w_m \log p_m(j)$$

    Log-probabilities below -100 count as -100, so that neither a probability of 0 nor a weight of 0 gives NaN.

    Args:
        log_probabilities: $\log p_m$ of M members, shape (M, B, C).
        weights: $w_m$, shape (M,), or (M, B) for weights of each sample. They need not sum to 1; a larger sum sharpens
            the result.

    Returns:
        Normalised log-probabilities, shape (B, C), in at least float32, differentiable.

    Raises:
        ValueError: If a shape is wrong.

    Example:
        >>> members = torch.tensor([[[0.8, 0.2]], [[0.5, 0.5]]]).log()
        >>> combine_log_linear(members, torch.tensor([0.5, 0.5])).exp()
        tensor([[0.6667, 0.3333]])

    Reference:
        Genest and Zidek, Combining Probability Distributions, Statistical Science 1986 (logarithmic opinion pool).
    """
    _require_members("log_probabilities", log_probabilities, 3)
    if weights.shape not in (log_probabilities.shape[:1], log_probabilities.shape[:2]):
        shape, samples = tuple(log_probabilities.shape[:1]), tuple(log_probabilities.shape[:2])
        raise ValueError(f"weights: expected shape {shape} or {samples}, got {tuple(weights.shape)}")
    clipped = upcast_to_float32(log_probabilities).clamp_min(LOWEST_LOG_PROBABILITY)
    weights = weights.to(clipped).reshape(len(clipped), -1, 1)
    return (weights * clipped).sum(dim=0).log_softmax(dim=1)


def fit_log_linear_weights(log_probabilities: Tensor, targets: Tensor, ridge: float, min_samples: int = 1) -> Tensor:
    r"""Fit the weights of `combine_log_linear` on held-out samples.

    $$\min_{w \ge 0} \sum_{i=1}^n -\log p_w(y_i \mid x_i) + r \sum_m (w_m - 1/M)^2$$

    The problem is strictly convex; it is solved in float64 with the exact gradient. As the loss is a sum, the ridge
    matters less for more samples.

    Args:
        log_probabilities: $\log p_m(c \mid x_i)$, shape (M, n, C), of samples that trained no member.
        targets: $y_i$, shape (n,), integers in [0, C).
        ridge: r, above 0; infinite gives equal weights.
        min_samples: For fewer samples the weights are exactly 1/M.

    Returns:
        Weights of at least 0, shape (M,), float64, on the CPU.

    Raises:
        ValueError: If a shape is wrong, a target or `ridge` out of range, or a log-probability NaN or +inf.

    Example:
        >>> good, random = torch.tensor([[0.9, 0.1]]), torch.tensor([[0.5, 0.5]])
        >>> members = torch.stack([good, random]).log().expand(2, 20, 2)
        >>> w = fit_log_linear_weights(members, torch.zeros(20, dtype=torch.long), ridge=10.0)
        >>> bool(w[0] > w[1])
        True
    """
    members, labels = _samples(log_probabilities, targets)
    _require_ridge(ridge)
    count = len(members)
    equal = np.full(count, 1 / count)
    if len(labels) < max(min_samples, 1) or ridge == math.inf:
        return torch.from_numpy(equal)

    def penalty(w: _Array) -> tuple[float, _Array]:
        return ridge * float(((w - equal) ** 2).sum()), 2 * ridge * (w - equal)

    return torch.from_numpy(_minimise(members, labels, equal, penalty))


def fit_sample_weights(log_probabilities: Tensor, targets: Tensor, ridge: float, min_samples: int = 1) -> Tensor:
    r"""Fit weights that depend on the uncertainty of each member about each sample.

    $$w_m(x) = a_m + b_m h_m(x), \qquad h_m(x) = H(p_m(\cdot \mid x)) / \log C \in [0, 1]$$

    The loss is that of `fit_log_linear_weights` with the ridge $r \sum_m (a_m - 1/M)^2 + b_m^2$, over $a_m \ge 0$ and
    $a_m + b_m \ge 0$, so that no weight is negative.

    Args:
        log_probabilities: $\log p_m(c \mid x_i)$, shape (M, n, C), of samples that trained no member.
        targets: $y_i$, shape (n,), integers in [0, C).
        ridge: r, above 0; infinite gives equal weights.
        min_samples: For fewer samples a is exactly 1/M, and b exactly 0.

    Returns:
        Rows a and b, shape (2, M), float64, on the CPU; `sample_weights` computes the weights.

    Raises:
        ValueError: If a shape is wrong, a target or `ridge` out of range, or a log-probability NaN or +inf.

    Example:
        >>> members = torch.tensor([[[0.8, 0.2]], [[0.5, 0.5]]]).log()
        >>> a, b = fit_sample_weights(members, torch.tensor([0]), ridge=1.0)
        >>> combine_log_linear(members, sample_weights(members, torch.stack([a, b]))).shape
        torch.Size([1, 2])
    """
    members, labels = _samples(log_probabilities, targets)
    _require_ridge(ridge)
    count = len(members)
    equal = np.full(count, 1 / count)
    if len(labels) < max(min_samples, 1) or ridge == math.inf:
        return torch.from_numpy(np.stack([equal, np.zeros(count)]))
    uncertainty = _normalised_entropy(torch.from_numpy(members)).numpy()[:, :, None]
    # w = a (1 - h) + e h with e = a + b: then both bounds are a >= 0 and e >= 0.
    features = np.concatenate([members * (1 - uncertainty), members * uncertainty])

    def penalty(theta: _Array) -> tuple[float, _Array]:
        deviation, b = theta[:count] - equal, theta[count:] - theta[:count]
        return ridge * float((deviation**2).sum() + (b**2).sum()), 2 * ridge * np.concatenate([deviation - b, b])

    a, e = _minimise(features, labels, np.concatenate([equal, equal]), penalty).reshape(2, count)
    return torch.from_numpy(np.stack([a, e - a]))


def sample_weights(log_probabilities: Tensor, coefficients: Tensor) -> Tensor:
    r"""Compute the weights of `fit_sample_weights` for new samples.

    $w_m(x) = a_m + b_m h_m(x)$ with the normalised entropy $h_m$.

    Args:
        log_probabilities: Shape (M, B, C).
        coefficients: Rows a and b, shape (2, M).

    Returns:
        Weights of at least 0, shape (M, B), in at least float32.

    Raises:
        ValueError: If a shape is wrong.

    Example:
        >>> members = torch.tensor([[[1.0, 0.0], [0.5, 0.5]]]).log()
        >>> sample_weights(members, torch.tensor([[1.0], [-0.75]]))
        tensor([[1.0000, 0.2500]])
    """
    _require_members("log_probabilities", log_probabilities, 3)
    if coefficients.shape != (2, len(log_probabilities)):
        raise ValueError(f"coefficients: expected shape (2, {len(log_probabilities)}), got {tuple(coefficients.shape)}")
    uncertainty = _normalised_entropy(log_probabilities)
    a, b = coefficients.to(uncertainty)[:, :, None]
    weights: Tensor = a + b * uncertainty
    return weights.clamp_min(0)


def fit_linear_weights(predictions: Tensor, targets: Tensor, ridge: float, min_samples: int = 1) -> Tensor:
    r"""Fit weights of the mean of regression models on held-out samples.

    $$\min_{w \ge 0,\, \sum_m w_m = 1} \sum_{i=1}^n \Big(\sum_m w_m f_m(x_i) - y_i\Big)^2 + r \sum_m (w_m - 1/M)^2$$

    Solved exactly: on the simplex this is $w^\top Q w$ with $Q = \sum_i d_i d_i^\top + r I$ and errors $d_{im} =
    f_m(x_i) - y_i$, whose minimum is the normalised solution of a non-negative least-squares problem.

    Args:
        predictions: $f_m(x_i)$, shape (M, n), of samples that trained no member.
        targets: $y_i$, shape (n,), in the same unit.
        ridge: r, above 0, in the squared unit of the targets; infinite gives equal weights.
        min_samples: For fewer samples the weights are exactly 1/M.

    Returns:
        Weights of at least 0 that sum to 1, shape (M,), float64, on the CPU.

    Raises:
        ValueError: If a shape is wrong, `ridge` out of range, or a value not finite.

    Example:
        >>> fit_linear_weights(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([1.5, 2.5]), ridge=1e-9)
        tensor([0.7500, 0.2500], dtype=torch.float64)

    Reference:
        Breiman, Stacked Regressions, Machine Learning 24, 1996.
    """
    _require_members("predictions", predictions, 2)
    if targets.shape != predictions.shape[1:]:
        raise ValueError(f"targets: expected shape {tuple(predictions.shape[1:])}, got {tuple(targets.shape)}")
    _require_ridge(ridge)
    errors = (predictions.detach().to("cpu", torch.float64) - targets.detach().to("cpu", torch.float64)).numpy()
    if not np.isfinite(errors).all():
        raise ValueError("predictions, targets: expected finite values")
    count, n = errors.shape
    if n < max(min_samples, 1) or ridge == math.inf:
        return torch.full((count,), 1 / count, dtype=torch.float64)
    from scipy.optimize import nnls  # here, because its import takes a fifth of the time of torch's

    # With Q = A'A the minimum of |Av|^2 + (1 - sum v)^2 over v >= 0 is v = w / (1 + w'Qw). Scaling A does not change w
    # and keeps both terms from being lost in rounding.
    stacked = np.concatenate([errors.T, math.sqrt(ridge) * np.eye(count)])
    stacked /= np.sqrt((stacked**2).sum() / count)
    v, _ = nnls(np.concatenate([stacked, np.ones((1, count))]), np.append(np.zeros(len(stacked)), 1.0))
    return torch.from_numpy(v / v.sum())


def _minimise(
    features: _Array, labels: npt.NDArray[np.int64], start: _Array, penalty: Callable[[_Array], tuple[float, _Array]]
) -> _Array:
    """Minimise the penalised cross-entropy over non-negative coefficients."""
    from scipy.optimize import minimize  # here, because its import takes a fifth of the time of torch's

    result: Any = minimize(
        lambda theta: _objective(features, labels, theta, penalty),
        start,
        jac=True,
        method="L-BFGS-B",
        bounds=[(0, None)] * len(start),
        options={"ftol": 1e-15, "gtol": 1e-9, "maxiter": 1000, "maxfun": 10_000},
    )
    return np.asarray(result.x, dtype=np.float64)


def _objective(
    features: _Array,
    labels: npt.NDArray[np.int64],
    theta: _Array,
    penalty: Callable[[_Array], tuple[float, _Array]],
) -> tuple[float, _Array]:
    """Compute the penalised cross-entropy and its gradient.

    Args:
        features: Shape (F, n, C); the logits are their combination with `theta`, shape (F,).
        labels: Shape (n,).
        theta: Shape (F,).
        penalty: Returns its value and gradient.
    """
    logits = np.einsum("f,fnc->nc", theta, features)
    logits -= logits.max(axis=1, keepdims=True)
    exponentials = np.exp(logits)
    normaliser = exponentials.sum(axis=1, keepdims=True)
    samples = np.arange(len(labels))
    loss = float((np.log(normaliser[:, 0]) - logits[samples, labels]).sum())
    residual = exponentials / normaliser
    residual[samples, labels] -= 1
    value, slope = penalty(theta)
    return loss + value, np.einsum("nc,fnc->f", residual, features) + slope


def _normalised_entropy(log_probabilities: Tensor) -> Tensor:
    """Compute the entropy divided by log C, within [0, 1], shape (M, B)."""
    classes = log_probabilities.shape[2]
    if classes == 1:
        return upcast_to_float32(log_probabilities).sum(dim=2) * 0
    log_p = upcast_to_float32(log_probabilities).clamp_min(LOWEST_LOG_PROBABILITY)
    return (-(log_p.exp() * log_p).sum(dim=2) / math.log(classes)).clamp(0, 1)


def _samples(log_probabilities: Tensor, targets: Tensor) -> tuple[_Array, npt.NDArray[np.int64]]:
    """Check members and targets; return them as arrays, log-probabilities clipped.

    Raises:
        ValueError: If a shape is wrong, a target out of range, or a log-probability NaN or +inf.
    """
    _require_members("log_probabilities", log_probabilities, 3)
    _, n, classes = log_probabilities.shape
    if targets.shape != (n,):
        raise ValueError(f"targets: expected shape ({n},), got {tuple(targets.shape)}")
    labels = targets.detach().to("cpu", torch.int64).numpy()
    if n and not (labels.min() >= 0 and labels.max() < classes):
        raise ValueError(f"targets: expected integers in [0, {classes}), got {labels.min()} to {labels.max()}")
    members = log_probabilities.detach().to("cpu", torch.float64).numpy()
    if np.isnan(members).any() or (members == np.inf).any():
        raise ValueError("log_probabilities: expected numbers or -inf, got NaN or +inf")
    return np.maximum(members, LOWEST_LOG_PROBABILITY), labels


def _require_members(name: str, members: Tensor, ndim: int) -> None:
    if members.ndim != ndim or not len(members):
        expected = "(M, n, C)" if ndim == 3 else "(M, n)"
        raise ValueError(f"{name}: expected shape {expected} with M >= 1, got {tuple(members.shape)}")


def _require_ridge(ridge: float) -> None:
    if not ridge > 0:
        raise ValueError(f"ridge: expected a number above 0, got {ridge}")
