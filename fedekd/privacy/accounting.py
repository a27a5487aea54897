"""Account of epsilon over the rounds of a federation, by dp-accounting."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fedekd.errors import UserError, require


def require_accounting() -> None:
    """Check that dp-accounting is installed.

    Raises:
        UserError: If it is not.
    """
    try:
        import dp_accounting  # noqa: F401 - an optional dependency
    except ImportError as error:
        raise UserError(
            f"privacy: expected the package dp-accounting, which computes epsilon, got none ({error})."
            " Run pip install 'fedekd[privacy]'"
        ) from error


def gaussian_epsilon(ratios: Sequence[float], delta: float) -> float:
    r"""Compute epsilon of several Gaussian mechanisms on the same data.

    Mechanism t adds noise of standard deviation $r_t$ times its sensitivity. Together they are one mechanism with
    $r = (\sum_t r_t^{-2})^{-1/2}$, of which epsilon is known exactly. Each may depend on the results of those before
    (adaptive composition). No amplification by sampling is used.

    Args:
        ratios: $r_t$, noise per sensitivity of each mechanism, at least 0.
        delta: Probability in (0, 1).

    Returns:
        The smallest epsilon; 0 without mechanisms, infinity if one has no noise.

    Raises:
        UserError: If dp-accounting is not installed, or a value is out of range.

    Reference:
        Dong et al., Gaussian differential privacy, JRSS B 2022 (arXiv 1905.02383), Corollary 3.3 (composition); Balle
        and Wang, ICML 2018 (arXiv 1805.06530), Theorem 8 (epsilon of one Gaussian mechanism).
    """
    require(0 < delta < 1, "privacy.delta", "a probability in (0, 1)", delta)
    require(all(ratio >= 0 for ratio in ratios), "privacy.noise_multiplier", "at least 0", list(ratios))
    require_accounting()
    if not ratios:
        return 0.0
    if min(ratios) == 0:
        return math.inf
    from dp_accounting import get_epsilon_gaussian

    return float(get_epsilon_gaussian(math.fsum(ratio**-2 for ratio in ratios) ** -0.5, delta))


def update_epsilon(noise_multiplier: float, updates: int, delta: float) -> float:
    r"""Compute epsilon of a client whose single updates are seen.

    Guarantee.

    - Adversary: the server, or any other reader of the client's updates, with any knowledge of the other clients.
    - Neighbours: any two data sets of the client (local differential privacy). Data sets that differ in one sample are
      included, with the same epsilon: one sample may change the whole update, so nothing smaller can be claimed.
    - Assumptions: the noise is secret and drawn for each update by itself; nothing else of the data is sent. The
      rounds in which a client takes part are known to the adversary: its sampling amplifies nothing.

    Two clipped updates differ by up to twice the clipping norm, so the ratio of noise to sensitivity is
    `noise_multiplier` / 2.

    Args:
        noise_multiplier: Standard deviation of the noise per clipping norm, at least 0.
        updates: Number of updates that the client has sent, at least 0.
        delta: Probability in (0, 1).

    Raises:
        UserError: As `gaussian_epsilon`.
    """
    return gaussian_epsilon([noise_multiplier / 2] * updates, delta)


def mean_epsilon(noise_multiplier: float, clients: Sequence[int], delta: float) -> float:
    r"""Compute epsilon of a client of whose updates only the uniform mean is seen.

    Guarantee, in which it differs from `update_epsilon`.

    - Adversary: another client, or a user of the global model; with secure aggregation also a server that follows the
      protocol. It knows the noise of at most one other client, its own.
    - Assumptions: all other clients of a round add their noise, and every update of the round is in the mean.

    The noise of n - 1 clients has the standard deviation $\sqrt{n - 1}$ `noise_multiplier`.

    Args:
        noise_multiplier: Standard deviation of the noise per clipping norm, at least 0.
        clients: n, number of clients in the mean, for each round in which the client takes part; at least 1.
        delta: Probability in (0, 1).

    Raises:
        UserError: As `gaussian_epsilon`.
    """
    return gaussian_epsilon([noise_multiplier / 2 * math.sqrt(max(1, count - 1)) for count in clients], delta)
