"""The gate: from energies to trust weights, within one batch (FedeKD Eq. 3)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fedekd.functional.precision import upcast_to_float32


def trust_weights(energy: Tensor, beta: float = 1.0, eps: float = 1e-8) -> Tensor:
    r"""How far to trust the teacher on each sample of a batch (FedeKD Eq. 3).

    $$\tilde E_i = \frac{E_i - \mu_B}{s_B + \epsilon_B}, \qquad w_i = \frac{1}{1 + \exp(\beta \tilde E_i)}$$

    with $\mu_B$ and $s_B$ the batch's mean and (population) standard deviation. A higher energy never gets
    a higher weight; $w_i$ lies within $\rho(\pm\beta\sqrt{n-1})$ for a batch of n; equal energies, and a
    batch of one, give exactly 1/2 (Appendix F). As the mean weight of any batch is about 1/2, the gate
    ranks the samples of a batch: it cannot shut off a teacher that is wrong on all of them.

    Args:
        energy: Shape (B,).
        beta: Sharpness of the gate, above 0.
        eps: $\epsilon_B$.

    Returns:
        Weights in [0, 1], shape (B,), in at least float32, detached from the graph.

    Raises:
        ValueError: `beta` is not a positive number, or `energy` is not of shape (B,).

    Example:
        >>> trust_weights(torch.tensor([0.0, 1.0]))
        tensor([0.7311, 0.2689])
        >>> trust_weights(torch.full((7,), 0.1)).unique()
        tensor([0.5000])
    """
    if not 0 < beta < math.inf:
        raise ValueError(f"beta must be a positive number, but is {beta}")
    if energy.ndim != 1:
        raise ValueError(f"energy must have shape (B,), but has {tuple(energy.shape)}")
    energy = upcast_to_float32(energy.detach())
    if len(energy) == 0:
        return energy
    # Subtracting a constant from every energy changes nothing in Ẽ but its rounding: the float32 mean of
    # seven times 0.1 is not 0.1, and that error divided by s + 1e-8 gives weights of 0.61 where 1/2 is right.
    above = energy - energy.min()
    # In units of their range (eps too), so that the squares below cannot overflow.
    unit = above.max().clamp_min(torch.finfo(above.dtype).tiny)
    deviation = above / unit
    deviation = deviation - deviation.mean()
    spread = deviation.square().mean().sqrt()
    return torch.sigmoid(-beta * deviation / (spread + eps / unit))
