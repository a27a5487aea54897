"""Secure aggregation: the server learns the mean of the sites' updates, and of no site what it has sent.

The protocol is SecAgg+ (Bell et al., CCS 2020) as Flower has it: its workflow at the server, its mod at each site. It
wants what Flower's older strategies say to their clients; this file translates for the server, `mods` for a site. What
is masked is the change of the weights, on a grid on which sums are exact: so a federation repeats to the last bit.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, RecordDict
from flwr.common import FitIns, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.server import LegacyContext
from flwr.server.strategy import FedAvg
from flwr.server.workflow import SecAggPlusWorkflow
from flwr.server.workflow.constant import MAIN_CONFIGS_RECORD, MAIN_PARAMS_RECORD
from flwr.server.workflow.constant import Key as WorkflowKey
from flwr.serverapp import Grid

from fedekd.errors import UserError
from fedekd.flower.validation import ValidatingGrid
from fedekd.methods import Broadcast, StateDict

#: Into how many steps a change is divided, and modulo what the steps of all sites are summed.
STEPS, MODULUS = 2**22, 2**32

#: Fewer sites than this hide nothing: of the sum of two, each knows the other's part. Of more the sum overflows.
LEAST, MOST = 3, MODULUS // STEPS - 1


def needed_to_unmask(sites: int) -> int:
    """How many of the sites must be left at the end: two thirds, and no fewer than hide each other.

    More than half, so that a server that asks some of them for the one secret of a site and others for the other has
    too few of both.

    Example:
        >>> [needed_to_unmask(sites) for sites in (3, 4, 5, 6, 9)]
        [3, 3, 4, 4, 6]
    """
    return max(LEAST, math.ceil(2 * sites / 3))


def require_sites(sites: int) -> None:
    """Hold the number of sites in a round to what can be hidden and summed.

    Raises:
        UserError: If they are too few or too many.
    """
    if not LEAST <= sites <= MOST:
        raise UserError(f"secure aggregation is of {LEAST} to {MOST} sites in a round, and there are {sites}")


@dataclass(frozen=True)
class SecureAggregation:
    """A round in which each update is hidden among the others.

    Attributes:
        largest_change: Of a weight, that can be carried: a power of two. It is carried to a 2^21st of that.
    """

    largest_change: float = 8.0

    def __post_init__(self) -> None:
        if not (self.largest_change > 0 and math.frexp(self.largest_change)[0] == 0.5):
            raise UserError(f"secure_range is {self.largest_change}, and must be a power of two")

    @property
    def resolution(self) -> float:
        """The step between two changes that can be carried: the mean is off by no more than half of it."""
        return 2 * self.largest_change / STEPS

    def require(self, broadcast: Broadcast) -> None:
        """Hold what is sent to what can be summed.

        Raises:
            UserError: If it differs from site to site, or holds integers.
        """
        if broadcast.personal:
            raise UserError("secure aggregation needs a method that sends all sites the same")
        for name, tensor in broadcast.shared.items():
            if not tensor.is_floating_point():
                raise UserError(f"secure aggregation sums floating-point weights, and {name!r} is {tensor.dtype}")

    def changes(self, update: StateDict, sent: StateDict) -> list[npt.NDArray[np.float64]]:
        """By how much each weight is to change, on the grid: what Flower would round at random is whole already.

        Args:
            update: What a site would send.
            sent: What it was sent.

        Returns:
            One vector a tensor, in the order of `sent`; Flower sums no array without axes.

        Raises:
            UserError: If the update is not like what was sent, is not finite, or changes a weight by more than can be
                carried.
        """
        if update.keys() != sent.keys():
            raise UserError(f"the update has other names: {', '.join(sorted(update.keys() ^ sent.keys()))[:200]}")
        found = []
        for name, before in sent.items():
            change = (update[name].double() - before.double()).reshape(-1)
            largest = float(change.abs().max()) if change.numel() else 0.0
            if not largest <= self.largest_change - self.resolution:  # nor if it is NaN
                raise UserError(f"{name!r} changes by {largest:.4g}, and secure_range is {self.largest_change:g}")
            found.append((torch.round(change / self.resolution) * self.resolution).numpy())
        return found

    def changed(self, sent: StateDict, changes: list[npt.NDArray[np.float64]]) -> dict[str, torch.Tensor]:
        """What was sent, changed by such vectors."""
        found = {}
        for (name, tensor), change in zip(sent.items(), changes, strict=True):
            found[name] = (tensor.double() + torch.from_numpy(change).reshape(tensor.shape)).to(tensor.dtype)
        return found

    def visits(
        self,
        grid: Grid,
        nodes: Mapping[int, int],
        notes: Mapping[int, Mapping[str, Any]],
        sent: StateDict,
        timeout: float | None,
        warn: Callable[[str], None],
    ) -> tuple[dict[int, str], dict[str, torch.Tensor]]:
        """Let sites visit, and sum what they send.

        Args:
            grid: The way to them.
            nodes: By site, Flower's number of its node.
            notes: By site, what it is told of its visit.
            sent: What all of them are sent.
            timeout: Seconds to wait in each of the four stages of the protocol; None waits on.
            warn: Is told of each site whose answer is missing or refused.

        Returns:
            By site, the note of its answer as JSON, of those whose updates are in the mean; and the mean. Nothing if
            too few of them are left.

        Raises:
            UserError: If there are too few or too many sites.
            ValueError: If what they have sent is no sum of such changes.
        """
        require_sites(len(notes))
        strategy = _Strategy({nodes[site]: note for site, note in notes.items()}, sent, self.largest_change)
        state = RecordDict({MAIN_CONFIGS_RECORD: ConfigRecord({WorkflowKey.CURRENT_ROUND: 1})})
        state[MAIN_PARAMS_RECORD] = ArrayRecord({})
        context = Context(run_id=0, node_id=0, node_config={}, state=state, run_config={})
        workflow = _Workflow(
            1.0,  # each site shares its secrets with all
            needed_to_unmask(len(notes)),
            max_weight=1.0,
            clipping_range=self.largest_change,
            quantization_range=STEPS,
            modulus_range=MODULUS,
            timeout=timeout,
        )
        sites = {nodes[site]: site for site in notes}
        manager: Any = SimpleNamespace(num_available=lambda: len(notes))
        vetting = ValidatingGrid(grid, sites, [tensor.numel() for tensor in sent.values()], warn)
        workflow(vetting, LegacyContext(context, strategy=strategy, client_manager=manager))
        if not strategy.answers:
            return {}, {}
        if not all(np.abs(change).max(initial=0.0) <= self.largest_change for change in strategy.changes):
            raise ValueError("the sum is not of masked changes: a site has spoilt it, and nobody can say which")
        answers = {sites[node]: answer for node, answer in strategy.answers.items()}
        return answers, self.changed(sent, strategy.changes)


class _Workflow(SecAggPlusWorkflow):  # type: ignore[misc]  # Flower has no types here
    """Flower's workflow, in which a site may also be lost before it has shared its keys."""

    def share_keys_stage(self, grid: Any, context: Any, state: Any) -> bool:
        """Go on with those who have shared their keys: the others mask nothing, and nobody holds their secrets."""
        enough = bool(super().share_keys_stage(grid, context, state))
        here = set(state.active_node_ids)
        state.sampled_node_ids = here
        state.nid_to_neighbours = {node: state.nid_to_neighbours[node] & here for node in here}
        return enough


class _Strategy(FedAvg):  # type: ignore[misc]
    """What Flower's workflow asks of a strategy: whom to send what, and where to put the mean."""

    def __init__(self, notes: Mapping[int, Mapping[str, Any]], sent: StateDict, largest_change: float) -> None:
        super().__init__()
        self.notes, self.sent, self.largest_change = notes, sent, largest_change
        self.answers: dict[int, str] = {}
        self.changes: list[npt.NDArray[np.float64]] = []

    def configure_fit(self, server_round: int, parameters: Any, client_manager: Any) -> list[Any]:
        """Each site's node, and what it is sent."""
        arrays = ndarrays_to_parameters([tensor.detach().cpu().numpy() for tensor in self.sent.values()])
        shared = {"names": json.dumps(list(self.sent)), "largest_change": self.largest_change}
        return [
            (SimpleNamespace(node_id=node), FitIns(arrays, {"note": json.dumps(note), **shared}))
            for node, note in self.notes.items()
        ]

    def aggregate_fit(self, server_round: int, results: Any, failures: Any) -> tuple[None, dict[str, Any]]:
        """Take the mean, which every result holds, and what each site says beside it."""
        self.answers = {proxy.node_id: str(answer.metrics["note"]) for proxy, answer in results}
        self.changes = parameters_to_ndarrays(results[0][1].parameters) if results else []
        return None, {}
