"""Inference that really skips: whoever has left is taken out of the batch, and the rest go on."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fedekd.errors import UserError, nearest
from fedekd.functional import AGREEMENT, CONFIDENCES, SCORES, score_exit
from fedekd.models import MultiExitNetwork
from fedekd.models.modes import eval_mode


class EarlyExitOutput(NamedTuple):
    """How B images left a network of E exits.

    Attributes:
        logits: Of the exit at which each left, (B, C).
        exits: That exit, 0..E-1, int64, (B,).
        scores: Its confidence there, (B,).
    """

    logits: Tensor
    exits: Tensor
    scores: Tensor


@torch.no_grad()
def early_exit_forward(
    network: MultiExitNetwork,
    x: Tensor,
    thresholds: Sequence[float],
    search_bounds: Sequence[float] | None = None,
    score: str = "max_softmax",
    proxy: nn.Module | None = None,
    gamma: float = 1.0,
) -> EarlyExitOutput:
    """Run images through a network until each may leave.

    The outcome is that of `exit_index` on the scores of all exits, but nothing is computed for images that have
    left, and no head for exits at which nobody may. The network is run in evaluation mode (BatchNorm's statistics
    must not depend on who is left), and is then as it was.

    Args:
        network: E exits.
        x: Images, shape (B, C, H, W), on the network's device.
        thresholds: Of each exit; the last one's counts as -inf.
        search_bounds: Of each exit, at most its threshold (default: the thresholds). A sample whose score lies
            between bound and threshold exits at the last exit.
        score: A name of `fedekd.functional.SCORES`.
        proxy: For the score `agreement`, the network whose second opinion it is; asked of all images, unless no exit
            before the last is open.
        gamma: Of `agreement`.

    Raises:
        UserError: The score is not known or lacks its proxy, or the number of thresholds or bands is not that of the
            exits.

    Example:
        >>> from torch import nn
        >>> network = MultiExitNetwork([nn.Flatten(), nn.ReLU()], [nn.Linear(4, 2), nn.Linear(4, 2)])
        >>> early_exit_forward(network, torch.zeros(3, 1, 2, 2), [0.0, -math.inf]).exits
        tensor([0, 0, 0])
    """
    if score not in SCORES:
        raise UserError(f"score is {score!r}, which is not known; {nearest(score, SCORES)}")
    if score == AGREEMENT and proxy is None:
        raise UserError("score 'agreement' needs the proxy, whose second opinion it is")
    search_bounds = thresholds if search_bounds is None else search_bounds
    if not len(thresholds) == len(search_bounds) == network.num_exits:
        raise UserError(
            f"{len(thresholds)} thresholds and {len(search_bounds)} bands were given, and the network has"
            f" {network.num_exits} exits"
        )
    opinion = None
    if score == AGREEMENT and proxy is not None and any(evaluated_exits(thresholds, search_bounds)[:-1]):
        with eval_mode(proxy):
            opinion = proxy(x)

    def confidence(logits: Tensor, places: Tensor) -> Tensor:
        if score == AGREEMENT and opinion is None:  # no image may leave early: nobody's agreement is asked for
            return CONFIDENCES["max_softmax"](logits)
        return score_exit(score, logits, None if opinion is None else opinion[places], gamma)

    with eval_mode(network):
        return _run(network, x, thresholds, search_bounds, confidence)


def evaluated_exits(thresholds: Sequence[float], search_bounds: Sequence[float]) -> tuple[bool, ...]:
    """Which exits' heads are computed: those that let somebody leave, or whose band keeps somebody from doing so.

    A band counts only where a later exit is open. The last exit's always is.
    """
    open_ = [threshold < math.inf for threshold in thresholds[:-1]]
    return *(
        is_open or (search_bound < math.inf and any(open_[place + 1 :]))
        for place, (is_open, search_bound) in enumerate(zip(open_, search_bounds[:-1], strict=True))
    ), True


def _run(
    network: MultiExitNetwork,
    x: Tensor,
    thresholds: Sequence[float],
    search_bounds: Sequence[float],
    confidence: Callable[[Tensor, Tensor], Tensor],
) -> EarlyExitOutput:
    evaluated = evaluated_exits(thresholds, search_bounds)
    last = network.num_exits - 1
    staying = torch.arange(len(x), device=x.device)  # places in the batch of those who are still in the network
    eligible: Tensor | None = None  # of those: who may leave before the last exit; None is all of them
    found: list[tuple[Tensor, EarlyExitOutput]] = []

    def predict_with_exits(places: Tensor, logits: Tensor, scores: Tensor, exit_: int) -> None:
        exits = torch.full_like(places, exit_)
        found.append((places, EarlyExitOutput(logits, exits, scores.double())))

    for exit_, (stage, head) in enumerate(zip(network.stages, network.heads, strict=True)):
        x = stage(x)
        if exit_ == last:
            logits = head(x)
            predict_with_exits(staying, logits, confidence(logits, staying), exit_)
            break
        threshold, search_bound = thresholds[exit_], search_bounds[exit_]
        if not evaluated[exit_] or (eligible is not None and not eligible.any()):
            continue
        logits = head(x if eligible is None else x[eligible])
        places = staying if eligible is None else staying[eligible]
        scores = confidence(logits, places).double()  # thresholds are doubles: float32(0.9) is not 0.9
        leaves, go_on = scores >= threshold, scores < search_bound
        leaving, eligible_after = int(leaves.sum()), int(go_on.sum())
        if eligible is None and leaving == len(x):
            predict_with_exits(staying, logits, scores, exit_)
            break
        if eligible is None and leaving + eligible_after == len(x):
            # The common case, of no band: who does not leave may leave later.
            if leaving:
                predict_with_exits(staying[leaves], logits[leaves], scores[leaves], exit_)
                staying, x = staying[go_on], _rows(x, go_on)
            continue
        asked = torch.arange(len(x), device=x.device) if eligible is None else eligible.nonzero().squeeze(1)
        if leaving:
            predict_with_exits(staying[asked[leaves]], logits[leaves], scores[leaves], exit_)
        eligible = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        eligible[asked] = go_on
        if leaving:
            stays = torch.ones_like(eligible)
            stays[asked[leaves]] = False
            staying, eligible, x = staying[stays], eligible[stays], _rows(x, stays)
            if not len(staying):
                break
    return _in_order(found)


def _in_order(found: list[tuple[Tensor, EarlyExitOutput]]) -> EarlyExitOutput:
    """Those who left, exit by exit, as they stood in the batch."""
    if len(found) == 1:
        return found[0][1]
    order = torch.cat([places for places, _ in found]).argsort()
    logits, exits, scores = (torch.cat(parts)[order] for parts in zip(*(part for _, part in found), strict=True))
    return EarlyExitOutput(logits, exits, scores)


def _rows(x: Tensor, chosen: Tensor) -> Tensor:
    """Some rows, in the memory format of all."""
    if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return x[chosen].contiguous(memory_format=torch.channels_last)
    return x[chosen]
