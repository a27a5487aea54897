"""Active exits and mixing weights of CAFEDistill (arXiv 2601.10015)."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from fedekd.functional.simplex import project_to_simplex

Order = Literal["shallow_first", "deep_first"]
Schedule = Literal["progressive", "all_on"]

ORDERS: tuple[Order, ...] = get_args(Order)
SCHEDULES: tuple[Schedule, ...] = get_args(Schedule)


def cosine_similarities(updates: Tensor) -> Tensor:
    r"""Compute the cosine similarities of updates.

    $$\mathrm{Sim}_{ij} = \cos(\Delta h_i, \Delta h_j)$$

    Args:
        updates: One flattened update per client, shape (n, d).

    Returns:
        Similarities in [-1, 1], float64, shape (n, n), with a diagonal of ones; a zero update has similarity 0 to all
        others.

    Raises:
        ValueError: If the shape is not (n, d).

    Example:
        >>> cosine_similarities(torch.tensor([[1.0, 0.0], [0.0, 2.0], [-3.0, 0.0]]))
        tensor([[ 1.,  0., -1.],
                [ 0.,  1.,  0.],
                [-1.,  0.,  1.]], dtype=torch.float64)
    """
    if updates.ndim != 2:
        raise ValueError(f"updates: expected shape (n, d), got {tuple(updates.shape)}")
    directions = torch.nn.functional.normalize(updates.double(), dim=1, eps=torch.finfo(torch.float64).tiny)
    similarities = (directions @ directions.T).clamp(-1.0, 1.0)
    # The two products of a pair may differ in the last bits.
    similarities = (similarities + similarities.T) / 2
    return similarities.fill_diagonal_(1.0)


def student_budget(similarities: Tensor, round_idx: int, rounds: int, exits: int) -> int:
    r"""Compute the number of shallow exits to train, $\lfloor \rho m n \rfloor$.

    $$\rho = \mathrm{clip}\Big(\big(1 - \tfrac1m\big) \tfrac{2t}{T} + \tfrac1{n^2} \sum_{ij} \min(0, \mathrm{Sim}_{ij}),
    \; 0,\; 1 - \tfrac1m\Big)$$

    The budget of all clients together grows over the first half of the rounds; conflict between clients reduces it.

    Args:
        similarities: Similarities of the n participants, shape (n, n).
        round_idx: t, in 1..T.
        rounds: T, at least 1.
        exits: m, at least 1.

    Returns:
        A number in 0..(m - 1) n; the deepest exits are always trained and not counted.

    Raises:
        ValueError: If a number is below 1.
    """
    n = len(similarities)
    if min(n, exits, rounds) < 1:
        raise ValueError(f"participants, exits, rounds: expected at least 1 each, got {n}, {exits}, {rounds}")
    most = 1.0 - 1.0 / exits
    conflict = float(similarities.double().clamp(max=0.0).sum()) / n**2
    rho = min(max(most * 2 * round_idx / rounds + conflict, 0.0), most)
    # A whole number may be reduced by a rounding error.
    return math.floor(rho * exits * n + 1e-9)


def active_exits(
    similarities: Tensor,
    round_idx: int,
    rounds: int,
    exits: int,
    order: Order = "shallow_first",
    schedule: Schedule = "progressive",
) -> Tensor:
    r"""Select the exits that each participant trains in a round.

    The deepest exit is always trained. The budget (`student_budget`) is spent exit by exit, starting with the
    shallowest, and per exit on the clients with the least conflict, $c_i = \sum_j \min(0, \mathrm{Sim}_{ij})$, the
    first for ties.

    Args:
        similarities: Similarities of the n participants in ascending order of their numbers, shape (n, n).
        round_idx: t, in 1..T.
        rounds: T.
        exits: m, at least 1.
        order: `shallow_first`; `deep_first` starts with the last but one exit (a control).
        schedule: `progressive`; `all_on` trains all exits from the first round on (a control).

    Returns:
        True where an exit is trained, bool, shape (n, m).

    Raises:
        ValueError: If the similarities are not square, or a number or name is out of range.

    Example:
        >>> active_exits(torch.eye(3), round_idx=1, rounds=4, exits=2).int()
        tensor([[1, 1],
                [0, 1],
                [0, 1]], dtype=torch.int32)
    """
    n = len(similarities)
    if similarities.shape != (n, n) or not n:
        raise ValueError(f"similarities: expected shape (n, n) with n >= 1, got {tuple(similarities.shape)}")
    if not 1 <= round_idx <= rounds or exits < 1:
        raise ValueError(f"round_idx, exits: expected 1..{rounds} and at least 1, got {round_idx} and {exits}")
    if order not in ORDERS or schedule not in SCHEDULES:
        raise ValueError(f"order, schedule: expected one of {ORDERS} and {SCHEDULES}, got {order!r} and {schedule!r}")
    if schedule == "all_on":
        return torch.ones(n, exits, dtype=torch.bool)
    active = torch.zeros(n, exits, dtype=torch.bool)
    active[:, -1] = True
    # A stable sort keeps the first client first for ties.
    least_conflict = similarities.double().clamp(max=0.0).sum(dim=1).sort(descending=True, stable=True).indices
    budget = student_budget(similarities, round_idx, rounds, exits)
    shallow = range(exits - 1)
    for exit_ in shallow if order == "shallow_first" else reversed(shallow):
        count = min(budget, n)
        active[least_conflict[:count], exit_] = True
        budget -= count
    return active


def mixing_weights(similarities: Tensor, spread: float = 0.6) -> Tensor:
    r"""Compute the weights with which heads are mixed for each client.

    They are the projection of $1/n + \mathrm{Sim}_i / (2a)$ onto the probability simplex.

    Args:
        similarities: Similarities of r receivers to n senders, shape (r, n).
        spread: a, above 0; larger values give more uniform weights, infinity uniform ones.

    Returns:
        Weights of at least 0 whose rows sum to 1, float64, shape (r, n).

    Raises:
        ValueError: If the shape is not (r, n) with n at least 1, or `spread` is not above 0.

    Example:
        >>> mixing_weights(torch.tensor([[1.0, -1.0], [0.0, 0.0]]))
        tensor([[1.0000, 0.0000],
                [0.5000, 0.5000]], dtype=torch.float64)
    """
    if similarities.ndim != 2 or not similarities.shape[1]:
        raise ValueError(f"similarities: expected shape (r, n) with n >= 1, got {tuple(similarities.shape)}")
    if not spread > 0:
        raise ValueError(f"spread: expected a number above 0, got {spread}")
    return project_to_simplex(1.0 / similarities.shape[1] + similarities.double() / (2.0 * spread))
