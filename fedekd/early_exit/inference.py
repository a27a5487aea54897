"""Early-exit inference: samples that have exited are removed from the batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from fedekd.errors import UserError, require_choice
from fedekd.functional import AGREEMENT, CONFIDENCES, SCORES, score_exit
from fedekd.models import MultiExitNetwork, eval_mode

Limits = Sequence[float] | Sequence[Sequence[float]]
"""Threshold or search bound of each exit: one number, or one per class that the exit predicts."""


class EarlyExitOutput(NamedTuple):
    """Predictions of a network with E exits for B samples.

    Attributes:
        logits: Logits of the exit that each sample took, shape (B, C).
        exits: Index of that exit, 0..E-1, int64, shape (B,).
        scores: Confidence at that exit, float64, shape (B,).
    """

    logits: Tensor
    exits: Tensor
    scores: Tensor


def exit_index(
    scores: npt.NDArray[np.float64],
    thresholds: Sequence[float | npt.NDArray[np.float64]],
    search_bounds: Sequence[float | npt.NDArray[np.float64]],
) -> npt.NDArray[np.int64]:
    """Assign samples to exits from the scores of all exits.

    A sample takes the first exit whose threshold its score reaches. A sample that reaches the search bound of an exit
    but not its threshold takes the last exit: the guarantee of the exits in between covers samples below the bound
    only. `early_exit_forward` makes the same decisions without computing all scores.

    Args:
        scores: Confidence at each exit, shape (n, E); NaN reaches no threshold.
        thresholds: Threshold of each exit, shape (E,), or of each exit and sample, shape (E, n); the last is -inf, and
            inf closes an exit.
        search_bounds: Search bound of each exit, at most its threshold, shape (E,) or (E, n).

    Returns:
        Indices of exits, 0..E-1, shape (n,).
    """
    samples, num_exits = scores.shape
    exits = np.full(samples, num_exits - 1)
    eligible = np.ones(samples, dtype=bool)
    for exit_, (threshold, search_bound) in enumerate(zip(thresholds[:-1], search_bounds[:-1], strict=True)):
        if np.all(search_bound == math.inf):  # the head is not evaluated, so a NaN score has no effect
            continue
        exits[eligible & (scores[:, exit_] >= threshold)] = exit_
        eligible &= scores[:, exit_] < search_bound
    return exits


def evaluated_exits(thresholds: Limits, search_bounds: Limits) -> tuple[bool, ...]:
    """Determine which exits' heads are evaluated.

    A head is evaluated if its exit is open, or if its search bound is finite and a later exit is open, for some class.
    The last head always is.
    """
    is_open = [lowest(thresholds[exit_]) < math.inf for exit_ in range(len(thresholds) - 1)]
    return *(
        is_open[exit_] or (lowest(search_bounds[exit_]) < math.inf and any(is_open[exit_ + 1 :]))
        for exit_ in range(len(is_open))
    ), True


def lowest(limit: float | Sequence[float]) -> float:
    """Return the limit of an exit, or the lowest of all classes."""
    return limit if isinstance(limit, int | float) else min(limit)


def limit_of(limit: float | Sequence[float], logits: Tensor) -> float | Tensor:
    """Return the limit of an exit, or of each sample by the class it predicts."""
    if isinstance(limit, int | float):
        return limit
    return torch.tensor(limit, dtype=torch.float64, device=logits.device)[logits.argmax(dim=1)]


@torch.no_grad()
def early_exit_forward(
    network: MultiExitNetwork,
    x: Tensor,
    thresholds: Limits,
    search_bounds: Limits | None = None,
    score: str = "max_softmax",
    proxy: nn.Module | None = None,
    gamma: float = 1.0,
) -> EarlyExitOutput:
    """Run a batch through a network, removing each sample at its exit.

    Exits equal those of `exit_index` on the scores of all exits; deeper stages and the heads of closed exits are not
    computed. The network runs in evaluation mode (statistics of BatchNorm must not depend on the samples that remain),
    and its previous mode is restored.

    Args:
        network: Network with E exits.
        x: Images, shape (B, C, H, W), on the network's device.
        thresholds: Threshold of each exit, shape (E,), or of each exit and predicted class, shape (E, C); the last is
            treated as -inf.
        search_bounds: Search bound of each exit, at most its threshold (default: the thresholds), of the same shape. A
            sample whose score lies between bound and threshold takes the last exit.
        score: A key of `fedekd.functional.SCORES`.
        proxy: Second network for the score `agreement`; it processes all images, unless all early exits are closed.
        gamma: Weight of the disagreement in the score `agreement`.

    Raises:
        UserError: The score is unknown or its proxy is missing, or the number of thresholds or search bounds differs
            from the number of exits.

    Example:
        >>> from torch import nn
        >>> network = MultiExitNetwork([nn.Flatten(), nn.ReLU()], [nn.Linear(4, 2), nn.Linear(4, 2)])
        >>> early_exit_forward(network, torch.zeros(3, 1, 2, 2), [0.0, -math.inf]).exits
        tensor([0, 0, 0])
    """
    require_choice("score", score, SCORES)
    if score == AGREEMENT and proxy is None:
        raise UserError("proxy: expected a network for the score 'agreement', got None")
    search_bounds = thresholds if search_bounds is None else search_bounds
    if not len(thresholds) == len(search_bounds) == network.num_exits:
        raise UserError(
            f"thresholds and search_bounds: expected {network.num_exits} of each, one per exit of the network, got"
            f" {len(thresholds)} and {len(search_bounds)}"
        )
    proxy_logits = None
    if score == AGREEMENT and proxy is not None and any(evaluated_exits(thresholds, search_bounds)[:-1]):
        with eval_mode(proxy):
            proxy_logits = proxy(x)

    def confidence(logits: Tensor, rows: Tensor) -> Tensor:
        if score == AGREEMENT and proxy_logits is None:  # all early exits are closed: the proxy is not evaluated
            return CONFIDENCES["max_softmax"](logits)
        return score_exit(score, logits, None if proxy_logits is None else proxy_logits[rows], gamma)

    with eval_mode(network):
        return _forward(network, x, thresholds, search_bounds, confidence)


def _forward(
    network: MultiExitNetwork,
    x: Tensor,
    thresholds: Limits,
    search_bounds: Limits,
    confidence: Callable[[Tensor, Tensor], Tensor],
) -> EarlyExitOutput:
    evaluated = evaluated_exits(thresholds, search_bounds)
    last = network.num_exits - 1
    remaining = torch.arange(len(x), device=x.device)  # batch rows of the samples in x
    eligible: Tensor | None = None  # mask over x: samples that may still exit early; None stands for all
    parts: list[tuple[Tensor, EarlyExitOutput]] = []

    def emit(rows: Tensor, logits: Tensor, scores: Tensor, exit_: int) -> None:
        parts.append((rows, EarlyExitOutput(logits, torch.full_like(rows, exit_), scores.double())))

    for exit_, (stage, head) in enumerate(zip(network.stages, network.heads, strict=True)):
        x = stage(x)
        if exit_ == last:
            logits = head(x)
            emit(remaining, logits, confidence(logits, remaining), exit_)
            break
        if not evaluated[exit_] or (eligible is not None and not eligible.any()):
            continue
        logits = head(x if eligible is None else x[eligible])
        rows = remaining if eligible is None else remaining[eligible]
        scores = confidence(logits, rows).double()  # thresholds are float64: float32(0.9) is not 0.9
        threshold, search_bound = (limit_of(limits[exit_], logits) for limits in (thresholds, search_bounds))
        exits_here, goes_on = scores >= threshold, scores < search_bound
        num_exits_here, num_goes_on = int(exits_here.sum()), int(goes_on.sum())
        if eligible is None and num_exits_here == len(x):
            emit(remaining, logits, scores, exit_)
            break
        if eligible is None and num_exits_here + num_goes_on == len(x):
            # Common case, without samples between bound and threshold: the others remain eligible.
            if num_exits_here:
                emit(remaining[exits_here], logits[exits_here], scores[exits_here], exit_)
                remaining, x = remaining[goes_on], _select(x, goes_on)
            continue
        positions = torch.arange(len(x), device=x.device) if eligible is None else eligible.nonzero().squeeze(1)
        if num_exits_here:
            emit(remaining[positions[exits_here]], logits[exits_here], scores[exits_here], exit_)
        eligible = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        eligible[positions] = goes_on
        if num_exits_here:
            stays = torch.ones_like(eligible)
            stays[positions[exits_here]] = False
            remaining, eligible, x = remaining[stays], eligible[stays], _select(x, stays)
            if not len(remaining):
                break
    return _in_batch_order(parts)


def _in_batch_order(parts: list[tuple[Tensor, EarlyExitOutput]]) -> EarlyExitOutput:
    """Concatenate the outputs of all exits in the order of the batch."""
    if len(parts) == 1:
        return parts[0][1]
    order = torch.cat([rows for rows, _ in parts]).argsort()
    logits, exits, scores = (torch.cat(each)[order] for each in zip(*(output for _, output in parts), strict=True))
    return EarlyExitOutput(logits, exits, scores)


def _select(x: Tensor, mask: Tensor) -> Tensor:
    """Select rows and keep the memory format."""
    if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return x[mask].contiguous(memory_format=torch.channels_last)
    return x[mask]
