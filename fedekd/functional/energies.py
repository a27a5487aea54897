"""Energies, one number per sample (FedeKD Eq. 1, 2 and 6-9).

A sample with low energy gets a high distillation weight. Energies have no fixed scale: `trust_weights` normalises them
within a batch. All are computed in at least float32 and stay finite, gradients included, for logits of ±10⁴.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedekd.functional.precision import upcast_to_float32
from fedekd.functional.shapes import require_matrix, require_same_shape


def kl_energy(private_logits: Tensor, proxy_logits: Tensor, eps: float = 1e-8) -> Tensor:
    r"""Compute the disagreement of two classifiers relative to their entropy (Eq. 1).

    $$E = \frac{\frac12 (\mathrm{KL}(p \| q) + \mathrm{KL}(q \| p))}{H(p) + H(q) + \epsilon_H}$$

    with $p$ and $q$ the softmax of the private and of the proxy logits. It is symmetric, zero if both agree, and large
    if both are confident of different classes.

    Args:
        private_logits: Shape (B, C).
        proxy_logits: Shape (B, C).
        eps: $\epsilon_H$, above 0.

    Returns:
        Energies of at least 0, shape (B,).

    Raises:
        ValueError: If the shapes differ or are not (B, C).

    Example:
        >>> confident, uncertain = torch.tensor([[9.0, 0.0]]), torch.tensor([[0.1, 0.0]])
        >>> bool(kl_energy(confident, -confident) > kl_energy(uncertain, -uncertain))
        True

    Reference:
        FedeKD (arXiv 2605.05553), Eq. 1.
    """
    require_matrix(private_logits=private_logits, proxy_logits=proxy_logits)
    log_p = upcast_to_float32(private_logits).log_softmax(dim=1)
    log_q = upcast_to_float32(proxy_logits).log_softmax(dim=1)
    p, q = log_p.exp(), log_q.exp()
    # KL(p‖q) + KL(q‖p) in one sum of nonnegative terms: rounding cannot make an energy negative.
    divergence = 0.5 * ((p - q) * (log_p - log_q)).sum(dim=1)
    entropies = -(p * log_p).sum(dim=1) - (q * log_q).sum(dim=1)
    return divergence / (entropies + eps)


def squared_error_energy(private_output: Tensor, proxy_output: Tensor) -> Tensor:
    r"""Compute the disagreement of two regressors (Eq. 2).

    $$E = \frac12 \|f(x) - g(x)\|_2^2$$

    Args:
        private_output: Shape (B, D), or (B,) for scalar outputs.
        proxy_output: The same shape.

    Returns:
        Energies of at least 0, shape (B,).

    Raises:
        ValueError: If the shapes differ.

    Example:
        >>> squared_error_energy(torch.tensor([[3.0], [1.0]]), torch.tensor([[1.0], [1.0]]))
        tensor([2., 0.])
    """
    require_same_shape(private_output=private_output, proxy_output=proxy_output)
    residual = upcast_to_float32(private_output) - upcast_to_float32(proxy_output)
    return 0.5 * residual.square().unsqueeze(-1).flatten(1).sum(dim=1)


def entropy_energy(logits: Tensor, eps: float = 1e-8) -> Tensor:
    r"""Compute the entropy of a prediction (Eq. 6).

    $$E = -\sum_c p_c \log(p_c + \epsilon)$$

    Args:
        logits: Shape (B, C).
        eps: $\epsilon$, above 0, so that a class of probability 0 contributes 0. The energy of a certain prediction is
            $-\epsilon$.

    Returns:
        Energies in nats, in $[-\epsilon, \log C]$, shape (B,).

    Raises:
        ValueError: If the shape is not (B, C).

    Example:
        >>> entropy_energy(torch.tensor([[0.0, 0.0]]))
        tensor([0.6931])
    """
    require_matrix(logits=logits)
    p = upcast_to_float32(logits).softmax(dim=1)
    return -(p * (p + eps).log()).sum(dim=1)


def margin_energy(logits: Tensor) -> Tensor:
    r"""Compute the negative margin of the two largest logits (Eq. 7).

    $$E = -(z_{(1)} - z_{(2)})$$

    Args:
        logits: Shape (B, C), with C at least 2.

    Returns:
        Energies of at most 0, shape (B,).

    Raises:
        ValueError: If the shape is not (B, C) with C at least 2.

    Example:
        >>> margin_energy(torch.tensor([[1.0, 5.0, 3.0]]))
        tensor([-2.])
    """
    require_matrix(logits=logits)
    if logits.shape[1] < 2:
        raise ValueError(f"margin_energy: expected logits of at least 2 classes, got shape {tuple(logits.shape)}")
    first, second = upcast_to_float32(logits).topk(2, dim=1).values.unbind(dim=1)
    return second - first


def logsumexp_energy(logits: Tensor) -> Tensor:
    r"""Compute the free energy of the logits (Eq. 8).

    $$E = -\log \sum_c \exp z_c$$

    Args:
        logits: Shape (B, C).

    Returns:
        Energies of any sign, shape (B,).

    Raises:
        ValueError: If the shape is not (B, C).

    Example:
        >>> logsumexp_energy(torch.tensor([[10_000.0, 10_000.0]]))
        tensor([-10000.6934])
    """
    require_matrix(logits=logits)
    return -upcast_to_float32(logits).logsumexp(dim=1)


def feature_distance_energy(proxy_features: Tensor, private_features: Tensor) -> Tensor:
    r"""Compute the distance of two models' features (Eq. 9).

    $$E = \|h_{proxy} - h_{private}\|_2$$

    Args:
        proxy_features: Shape (B, D).
        private_features: Shape (B, D), the private model's features projected to D dimensions.

    Returns:
        Energies of at least 0, shape (B,); for equal features the gradient is 0.

    Raises:
        ValueError: If the shapes differ or are not (B, D).

    Example:
        >>> feature_distance_energy(torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 4.0]]))
        tensor([5.])
    """
    require_matrix(proxy_features=proxy_features, private_features=private_features)
    difference = upcast_to_float32(proxy_features) - upcast_to_float32(private_features)
    distance: Tensor = torch.linalg.vector_norm(difference, dim=1)
    return distance
