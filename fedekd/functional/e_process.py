"""Test martingales that follow a stream of samples: e-processes by betting."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

#: Stakes of the bets; the e-process is the mean over them. 0.9 bounds the loss of one sample to a factor of 10.
STAKES = np.geomspace(0.005, 0.9, 16)

#: Samples between two starts of the bets. Fewer starts cost less evidence, and delay an alarm by at most this number.
BLOCK = 32

#: Upper limit of the evidence, against overflow; the minimum of a supermartingale and a constant is a supermartingale.
LARGEST = 1e100


def betting_e_process(payoffs: npt.ArrayLike, block: int = BLOCK) -> Array:
    r"""Compute the evidence against "each payoff has a conditional mean of at most 0".

    Bets start at the samples $s_b = bB$, b = 0, 1, ..., with the weights $w_b = 1 / ((b + 1)(b + 2))$, whose sum is 1:

    $$E_t = \frac{1}{|\Lambda|} \sum_{\lambda \in \Lambda} \sum_{b \ge 0} w_b \prod_{i = s_b}^{t} (1 + \lambda g_i)$$

    A product over no samples is 1. If $E[g_i \mid g_1, \dots, g_{i - 1}] \le 0$ for every i, this is a nonnegative
    supermartingale with expectation of at most 1, so $P(\exists t: E_t \ge 1 / \delta) \le \delta$ (Ville), exactly and
    for every length of the stream. The samples need be neither independent nor identically distributed. Later starts
    detect a change that follows many unchanged samples: by then, a bet from the first sample has lost its wealth.

    Args:
        payoffs: g, at least -1, shape (n,), or (n, streams).
        block: B, samples between two starts, at least 1.

    Returns:
        E after each sample, of the shape of `payoffs`, at most 1e100.

    Raises:
        ValueError: A payoff or the block is out of its range.

    Example:
        >>> betting_e_process([-1.0, -1.0]).round(3).tolist()
        [0.904, 0.859]

    Reference:
        Waudby-Smith and Ramdas, Estimating means of bounded random variables by betting, JRSS B 2024; a mixture over
        starts: Shin, Ramdas and Rinaldo, E-detectors, NEJSDS 2024, Section 3 with weights of sum 1.
    """
    values = np.asarray(payoffs, dtype=np.float64)
    if values.ndim not in (1, 2) or not bool((values >= -1).all()):
        raise ValueError("payoffs: expected numbers of at least -1, shape (n,) or (n, streams)")
    if block < 1:
        raise ValueError(f"block: expected at least 1, got {block}")
    result = np.empty_like(values)
    wealth, unused = np.zeros((*values.shape[1:], len(STAKES))), 1.0
    for index, payoff in enumerate(values):
        if index % block == 0:
            start = index // block
            unused = 1.0 / (start + 2)
            wealth += 1.0 / ((start + 1) * (start + 2))
        wealth *= 1.0 + np.multiply.outer(payoff, STAKES)
        np.minimum(wealth, LARGEST, out=wealth)
        result[index] = wealth.mean(axis=-1) + unused
    return np.minimum(result, LARGEST)


def error_payoffs(errors: npt.ArrayLike, target_risk: float) -> Array:
    """Return payoffs whose mean is at most 0 if the error rate is at most a target.

    Args:
        errors: 1 for each error and 0 for others, any shape.
        target_risk: r, in (0, 1).

    Returns:
        (x - r) / r, at least -1.

    Example:
        >>> error_payoffs([0, 1], 0.25).tolist()
        [-1.0, 3.0]
    """
    return (np.asarray(errors, dtype=np.float64) - target_risk) / target_risk


def loss_payoffs(excess: npt.ArrayLike, margin: float) -> Array:
    """Return payoffs with mean at most 0 if the mean excess loss is within a margin.

    Args:
        excess: Loss of the new model minus that of the old one, in [-1, 1], any shape.
        margin: m, at least 0.

    Returns:
        (d - m) / (1 + m), at least -1.

    Example:
        >>> loss_payoffs([-1.0, 1.0], 0.0).tolist()
        [-1.0, 1.0]
    """
    return (np.asarray(excess, dtype=np.float64) - margin) / (1.0 + margin)


def conformal_ranks(reference: npt.ArrayLike, values: npt.ArrayLike, uniforms: npt.ArrayLike) -> Array:
    r"""Compute the smoothed rank of each value among reference and earlier values.

    $$p_t = \frac{|\{z < v_t\}| + u_t\, |\{z = v_t\}|}{n + t}, \qquad z \in \{r_1, \dots, r_n, v_1, \dots, v_t\}$$

    If reference and values are exchangeable, the ranks are independent and uniform on [0, 1], exactly.

    Args:
        reference: r, shape (n,).
        values: v, in the order of their arrival, shape (t,).
        uniforms: u, drawn uniformly from [0, 1] without the values, shape (t,).

    Returns:
        p, in [0, 1], shape (t,).

    Example:
        >>> conformal_ranks([0.1, 0.2, 0.3], [0.0, 0.4], [0.5, 0.5]).tolist()
        [0.125, 0.9]

    Reference:
        Vovk, Nouretdinov and Gammerman, Testing exchangeability on-line, ICML 2003.
    """
    seen, ranks = sorted(_numbers(reference)), []
    for value, uniform in zip(_numbers(values), _numbers(uniforms), strict=True):
        below = bisect_left(seen, value)
        equal = bisect_right(seen, value) - below + 1
        insort(seen, value)
        ranks.append((below + uniform * equal) / len(seen))
    return np.asarray(ranks, dtype=np.float64)


def rank_e_process(ranks: npt.ArrayLike, block: int = BLOCK) -> Array:
    """Compute the evidence against "the ranks are independent and uniform".

    The mean of two e-processes: one bets on small ranks, the other on large ones. So it finds a shift, and has no
    power against a change of the spread that keeps the mean rank.

    Args:
        ranks: p, in [0, 1], shape (n,), or (n, streams).
        block: Samples between two starts, see `betting_e_process`.

    Returns:
        Evidence after each sample, of the shape of `ranks`.

    Example:
        >>> rank_e_process([0.5, 0.5]).tolist()
        [1.0, 1.0]
    """
    small = 1.0 - 2.0 * np.asarray(ranks, dtype=np.float64)
    return (betting_e_process(small, block) + betting_e_process(-small, block)) / 2.0


def first_alarm(evidence: npt.ArrayLike, level: float) -> int | None:
    """Return the index of the first evidence of at least 1 / level; None without one.

    Args:
        evidence: Values of an e-process, shape (n,).
        level: Largest probability of a false alarm, in (0, 1).

    Example:
        >>> first_alarm([0.9, 12.0, 3.0], level=0.1)
        1
    """
    reached = np.flatnonzero(np.asarray(evidence, dtype=np.float64) >= 1.0 / level)
    return int(reached[0]) if len(reached) else None


def _numbers(values: npt.ArrayLike) -> list[float]:
    numbers: list[float] = np.asarray(values, dtype=np.float64).tolist()
    return numbers
