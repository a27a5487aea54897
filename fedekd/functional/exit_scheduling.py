"""Who distils into which exit, and whose heads are mixed: the server's decisions in CAFEDistill (arXiv 2601.10015)."""

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
    r"""$\mathrm{Sim}_{ij} = \cos(\Delta h_i, \Delta h_j)$: how far clients pull in the same direction.

    Args:
        updates: One flattened update a client, shape (n, d).

    Returns:
        Similarities in [-1, 1], float64, shape (n, n), with a diagonal of ones; 0 to all others where an update is 0.

    Raises:
        ValueError: The shape is not (n, d).

    Example:
        >>> cosine_similarities(torch.tensor([[1.0, 0.0], [0.0, 2.0], [-3.0, 0.0]]))
        tensor([[ 1.,  0., -1.],
                [ 0.,  1.,  0.],
                [-1.,  0.,  1.]], dtype=torch.float64)
    """
    if updates.ndim != 2:
        raise ValueError(f"updates must have shape (n, d), but has {tuple(updates.shape)}")
    directions = torch.nn.functional.normalize(updates.double(), dim=1, eps=torch.finfo(torch.float64).tiny)
    similarities = (directions @ directions.T).clamp(-1.0, 1.0)
    # Twice the same product may differ in its last bits.
    similarities = (similarities + similarities.T) / 2
    return similarities.fill_diagonal_(1.0)


def student_budget(similarities: Tensor, round_idx: int, rounds: int, exits: int) -> int:
    r"""How many shallow exits, of all clients together, learn in a round: $\lfloor \rho m n \rfloor$.

    $$\rho = \mathrm{clip}\Big(\big(1 - \tfrac1m\big) \tfrac{2t}{T} + \tfrac1{n^2} \sum_{ij} \min(0, \mathrm{Sim}_{ij}),
    \; 0,\; 1 - \tfrac1m\Big)$$

    It grows over the first half of the rounds, and conflict between the clients holds it back.

    Args:
        similarities: Among the n participants, shape (n, n).
        round_idx: t, 1..T.
        rounds: T.
        exits: m, at least 1.

    Returns:
        A number from 0 to (m - 1) n: the deepest exits always learn, and are not counted.

    Raises:
        ValueError: There are no participants, no exits or no rounds.
    """
    n = len(similarities)
    if min(n, exits, rounds) < 1:
        raise ValueError(f"{n} participants, {exits} exits and {rounds} rounds: at least 1 of each is needed")
    most = 1.0 - 1.0 / exits
    conflict = float(similarities.double().clamp(max=0.0).sum()) / n**2
    rho = min(max(most * 2 * round_idx / rounds + conflict, 0.0), most)
    # What is meant as a whole number may lie a rounding error below it.
    return math.floor(rho * exits * n + 1e-9)


def active_exits(
    similarities: Tensor,
    round_idx: int,
    rounds: int,
    exits: int,
    order: Order = "shallow_first",
    schedule: Schedule = "progressive",
) -> Tensor:
    r"""Which exits of which participant learn in a round.

    The deepest always does. The budget is spent exit by exit, from the shallowest on, at each exit on the clients that
    conflict least, $c_i = \sum_j \min(0, \mathrm{Sim}_{ij})$; of equal ones the first.

    Args:
        similarities: Among the n participants, in ascending order of their numbers, shape (n, n).
        round_idx: t, 1..T.
        rounds: T.
        exits: m.
        order: `deep_first` spends the budget from the last but one exit upwards (a control).
        schedule: `all_on` lets all exits learn from the first round on (a control).

    Returns:
        Bool, shape (n, m).

    Raises:
        ValueError: The similarities are not square, or a number or name is out of its range.

    Example:
        >>> active_exits(torch.eye(3), round_idx=1, rounds=4, exits=2).int()
        tensor([[1, 1],
                [0, 1],
                [0, 1]], dtype=torch.int32)
    """
    n = len(similarities)
    if similarities.shape != (n, n) or not n:
        raise ValueError(f"similarities must have shape (n, n) with n >= 1, but has {tuple(similarities.shape)}")
    if not 1 <= round_idx <= rounds or exits < 1:
        raise ValueError(
            f"round {round_idx} of {rounds} with {exits} exits: 1 <= round <= rounds and exits >= 1 are needed"
        )
    if order not in ORDERS or schedule not in SCHEDULES:
        raise ValueError(f"order {order!r} must be one of {ORDERS}, and schedule {schedule!r} one of {SCHEDULES}")
    if schedule == "all_on":
        return torch.ones(n, exits, dtype=torch.bool)
    active = torch.zeros(n, exits, dtype=torch.bool)
    active[:, -1] = True
    # Stable: of equal ones the first comes first.
    least_conflict = similarities.double().clamp(max=0.0).sum(dim=1).sort(descending=True, stable=True).indices
    budget = student_budget(similarities, round_idx, rounds, exits)
    shallow = range(exits - 1)
    for exit_ in shallow if order == "shallow_first" else reversed(shallow):
        chosen = min(budget, n)
        active[least_conflict[:chosen], exit_] = True
        budget -= chosen
    return active


def mixing_weights(similarities: Tensor, spread: float = 0.6) -> Tensor:
    r"""Whose heads a client's teacher is mixed of: the projection of $1/n + \mathrm{Sim}_i / (2a)$ onto the simplex.

    Args:
        similarities: Of each receiver to each of n senders, shape (r, n).
        spread: a, above 0; the larger, the more alike the weights, and infinity weighs all alike.

    Returns:
        Weights of at least 0, rows that sum to 1, float64, shape (r, n).

    Raises:
        ValueError: The shape is not (r, n) with n at least 1, or `spread` is not above 0.

    Example:
        >>> mixing_weights(torch.tensor([[1.0, -1.0], [0.0, 0.0]]))
        tensor([[1.0000, 0.0000],
                [0.5000, 0.5000]], dtype=torch.float64)
    """
    if similarities.ndim != 2 or not similarities.shape[1]:
        raise ValueError(f"similarities must have shape (r, n) with n >= 1, but has {tuple(similarities.shape)}")
    if not spread > 0:
        raise ValueError(f"spread is {spread}, and must be above 0")
    return project_to_simplex(1.0 / similarities.shape[1] + similarities.double() / (2.0 * spread))
