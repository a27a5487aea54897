"""Ensembles at serving time: several networks that answer as one network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from fedekd.errors import require
from fedekd.functional import upcast_to_float32
from fedekd.functional.log_linear import LOWEST_LOG_PROBABILITY
from fedekd.models.multi_exit import MultiExitNetwork
from fedekd.tasks import Task


class Ensemble(nn.Module):
    r"""Log-linear ensemble of classifiers, or linear ensemble of regressors.

    $$\log p(y \mid x) = \sum_m w_m \log \mathrm{softmax}(z_m(x) + o_m)_y + \mathrm{const}, \qquad
    \hat y(x) = \sum_m w_m (z_m(x) + o_m)$$

    An offset is the log prior of a network that was trained with its prior added, or the mean target in regression.

    Args:
        members: M networks by name, at least one; each maps a batch to (B, C).
        weights: $w_m$, shape (M,), at least 0.
        offsets: $o_m$, shape (M, C), added to the outputs of a member.
        task: `classification` or `regression`.

    Raises:
        UserError: If the shapes differ.

    Example:
        >>> members = {"a": nn.Flatten(), "b": nn.Flatten()}
        >>> ensemble = Ensemble(members, torch.tensor([0.5, 0.5]), torch.zeros(2, 4), "regression")
        >>> ensemble(torch.ones(1, 1, 2, 2))
        tensor([[1., 1., 1., 1.]])
    """

    weights: Tensor
    offsets: Tensor

    def __init__(self, members: Mapping[str, nn.Module], weights: Tensor, offsets: Tensor, task: Task) -> None:
        super().__init__()
        size = len(members)
        require(weights.shape == (size,), "weights", f"shape ({size},)", tuple(weights.shape))
        require(len(offsets) == size and offsets.ndim == 2, "offsets", f"shape ({size}, C)", tuple(offsets.shape))
        self.members = nn.ModuleDict(members)
        self.task = task
        self.register_buffer("weights", weights.detach())
        self.register_buffer("offsets", offsets.detach())

    def forward(self, x: Tensor) -> Tensor:
        """Map a batch to unnormalised log-probabilities, or to values, (B, C)."""
        members = zip(self.members.values(), self.weights, self.offsets, strict=True)
        terms = [_term(_last(member(x)), weight, offset, self.task) for member, weight, offset in members]
        return torch.stack(terms).sum(dim=0)


def _term(output: Tensor, weight: Tensor, offset: Tensor, task: Task) -> Tensor:
    """Return the term of a member for its outputs (B, C), in at least float32."""
    shifted = upcast_to_float32(output) + offset
    if task == "regression":
        return weight * shifted
    # The weights are fitted to log-probabilities with this lower bound.
    return weight * torch.log_softmax(shifted, dim=1).clamp_min(LOWEST_LOG_PROBABILITY)


def _last(output: Tensor | list[Tensor]) -> Tensor:
    return output if isinstance(output, Tensor) else output[-1]


@dataclass(frozen=True)
class StageOutput:
    """Output of a stage, and the sum of the other members' terms (B, C).

    Early-exit inference removes rows between stages, as from a tensor.
    """

    hidden: Tensor
    others: Tensor
    ndim = 2

    @property
    def device(self) -> torch.device:
        """Device of the tensors."""
        return self.hidden.device

    def __len__(self) -> int:
        return len(self.hidden)

    def __getitem__(self, rows: Tensor) -> StageOutput:
        return StageOutput(self.hidden[rows], self.others[rows])


class _FirstStage(nn.Module):
    """First stage of the network with exits; runs the other members."""

    def __init__(self, stage: nn.Module, others: Ensemble | None) -> None:
        super().__init__()
        self.stage, self.others = stage, others

    def forward(self, x: Tensor) -> StageOutput:
        return StageOutput(self.stage(x), x.new_zeros(x.shape[0], 1) if self.others is None else self.others(x))


class _LaterStage(nn.Module):
    def __init__(self, stage: nn.Module) -> None:
        super().__init__()
        self.stage = stage

    def forward(self, x: StageOutput) -> StageOutput:
        return StageOutput(self.stage(x.hidden), x.others)


class _Head(nn.Module):
    """Head of one exit; adds the other members' terms to its own."""

    weight: Tensor
    offset: Tensor

    def __init__(self, head: nn.Module, weight: Tensor, offset: Tensor, task: Task) -> None:
        super().__init__()
        self.head, self.task = head, task
        self.register_buffer("weight", weight.detach())
        self.register_buffer("offset", offset.detach())

    def forward(self, x: StageOutput) -> Tensor:
        return _term(self.head(x.hidden), self.weight, self.offset, self.task) + x.others


class MultiExitEnsemble(MultiExitNetwork):
    """Ensemble of a network with exits and plain networks, one output per exit.

    The plain members run once, in the first stage, and are part of every exit.

    Args:
        network: The network with exits.
        weight: Weight of `network`, a scalar.
        offset: Offset of `network`, shape (C,).
        others: Ensemble of the other members; None without any.
        task: `classification` or `regression`.
    """

    def __init__(
        self, network: MultiExitNetwork, weight: Tensor, offset: Tensor, others: Ensemble | None, task: Task
    ) -> None:
        nn.Module.__init__(self)  # the heads are wrapped, which MultiExitNetwork does not accept
        first, *rest = network.stages
        self.stages = nn.ModuleList([_FirstStage(first, others), *map(_LaterStage, rest)])
        self.heads = nn.ModuleList([_Head(head, weight, offset, task) for head in network.heads])
        self._network = (network,)

    def shallow(self, depth: int) -> MultiExitNetwork:
        """Return the ensemble at the first exits; see `MultiExitNetwork.shallow`."""
        head, first = cast(_Head, self.heads[0]), cast(_FirstStage, self.stages[0])
        return MultiExitEnsemble(self._network[0].shallow(depth), head.weight, head.offset, first.others, head.task)

    @property
    def head(self) -> nn.Linear:
        """Last linear layer of the network with exits."""
        return self._network[0].head

    def features(self, x: Tensor) -> Tensor:
        """Return the features of the network with exits, (B, num_features)."""
        return self._network[0].features(x)

    def exits_and_features(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return the outputs of all exits and the features of one pass."""
        state: Any = x
        exits = []
        for stage, head in zip(self.stages, self.heads, strict=True):
            state = stage(state)
            exits.append(head(state))
        return exits, self._network[0]._embed(state.hidden)


def build_ensemble(members: Mapping[str, nn.Module], weights: Tensor, offsets: Tensor, task: Task) -> nn.Module:
    """Build an ensemble, with exits if its first member has them.

    Args:
        members: M networks by name; only the first may have exits.
        weights: Weight of each member, shape (M,).
        offsets: Offset of each member, shape (M, C).
        task: `classification` or `regression`.

    Returns:
        An `Ensemble`, or a `MultiExitEnsemble`.
    """
    names = list(members)
    first = members[names[0]]
    if not isinstance(first, MultiExitNetwork):
        return Ensemble(members, weights, offsets, task)
    rest = {name: members[name] for name in names[1:]}
    others = Ensemble(rest, weights[1:], offsets[1:], task) if rest else None
    return MultiExitEnsemble(first, weights[0], offsets[0], others, task)
