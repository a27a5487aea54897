"""The gate: from the energies of a batch to weights (FedeKD Eq. 3)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fedekd.functional.precision import upcast_to_float32


def trust_weights(energy: Tensor, beta: float = 1.0, eps: float = 1e-8) -> Tensor:
    r"""Compute the distillation weight of each sample of a batch (FedeKD Eq. 3).

    $$\tilde E_i = \frac{E_i - \mu_B}{s_B + \epsilon_B}, \qquad w_i = \frac{1}{1 + \exp(\beta \tilde E_i)}$$

    with $\mu_B$ and $s_B$ the batch's mean and (population) standard deviation. Weights do not increase with energy and
    lie within $\rho(\pm\beta\sqrt{n-1})$ for a batch of n; equal energies, and a batch of one, give exactly 1/2
    (Appendix F). The mean weight of a batch is about 1/2, so the gate only ranks the samples of a batch: it cannot
    disable a teacher that is wrong on all of them.

    Args:
        energy: Energies, shape (B,).
        beta: Sharpness of the gate, above 0.
        eps: $\epsilon_B$, above 0.

    Returns:
        Weights in [0, 1], shape (B,), in at least float32, detached from the graph.

    Raises:
        ValueError: If `beta` is not above 0, or the shape is not (B,).

    Example:
        >>> trust_weights(torch.tensor([0.0, 1.0]))
        tensor([0.7311, 0.2689])
        >>> trust_weights(torch.full((7,), 0.1)).unique()
        tensor([0.5000])
    """
    if not 0 < beta < math.inf:
        raise ValueError(f"beta: expected a finite number above 0, got {beta}")
    if energy.ndim != 1:
        raise ValueError(f"energy: expected shape (B,), got {tuple(energy.shape)}")
    energy = upcast_to_float32(energy.detach())
    if len(energy) == 0:
        return energy
    # Subtracting a constant changes only the rounding of Ẽ: the float32 mean of seven times 0.1 is not 0.1, and that
    # error divided by s + 1e-8 gives weights of 0.61 instead of 1/2.
    above = energy - energy.min()
    # In units of the range (eps as well), so that the squares below cannot overflow.
    unit = above.max().clamp_min(torch.finfo(above.dtype).tiny)
    deviation = above / unit
    deviation = deviation - deviation.mean()
    spread = deviation.square().mean().sqrt()
    return torch.sigmoid(-beta * deviation / (spread + eps / unit))
