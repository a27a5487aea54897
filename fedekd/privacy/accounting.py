"""Account of epsilon over the rounds of a federation."""

from __future__ import annotations

import math
from collections.abc import Sequence

from scipy.special import erfc, erfcx, ndtri

from fedekd.errors import require


def gaussian_epsilon(ratios: Sequence[float], delta: float) -> float:
    r"""Compute epsilon of several Gaussian mechanisms on the same data.

    Mechanism t adds noise of standard deviation $r_t$ times its sensitivity. Each may depend on the results of those
    before (adaptive composition). No amplification by sampling is used. Together they are one mechanism with
    $\mu = (\sum_t r_t^{-2})^{1/2}$, the sensitivity per standard deviation, whose epsilon solves

    $$\delta = \Phi(\mu/2 - \varepsilon/\mu) - e^{\varepsilon}\, \Phi(-\mu/2 - \varepsilon/\mu).$$

    Args:
        ratios: $r_t$, noise per sensitivity of each mechanism, at least 0.
        delta: Probability in (0, 1).

    Returns:
        The smallest epsilon, at least 0; 0 without mechanisms, infinity if one has no noise.

    Raises:
        UserError: If a value is out of range.

    Example:
        >>> round(gaussian_epsilon([1.0], 1e-5), 3), round(gaussian_epsilon([2.0] * 4, 1e-5), 3)
        (4.377, 4.377)

    Reference:
        Dong et al., Gaussian differential privacy, JRSS B 2022 (arXiv 1905.02383), Corollary 3.3 (composition); Balle
        and Wang, ICML 2018 (arXiv 1805.06530), Theorem 8 (epsilon of one Gaussian mechanism).
    """
    require(0 < delta < 1, "privacy.delta", "a probability in (0, 1)", delta)
    require(all(ratio >= 0 for ratio in ratios), "privacy.noise_multiplier", "at least 0", list(ratios))
    mu = math.hypot(*(1 / ratio if ratio else math.inf for ratio in ratios))
    if math.isinf(mu):
        return math.inf

    def excess(x: float) -> float:
        """Return the delta of x = epsilon/mu - mu/2, above the given one."""
        # e^epsilon Phi(-x - mu) = e^(-x^2/2) erfcx((x + mu)/sqrt(2))/2: no factor overflows.
        second = math.exp(-x * x / 2) * erfcx((x + mu) / math.sqrt(2))
        return float((erfc(x / math.sqrt(2)) - second) / 2 - delta)

    smallest = -mu / 2  # epsilon 0
    if excess(smallest) <= 0:
        return 0.0
    from scipy.optimize import brentq  # here, because its import takes a fifth of the time of torch's

    # The delta is below Phi(-x), and rounds to 1 at x = -40; the upper end is 1 further, against rounding.
    x = brentq(excess, max(smallest, -40.0), 1 - float(ndtri(delta)), xtol=1e-13, maxiter=1000)
    return float(mu * (x + mu / 2))


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
