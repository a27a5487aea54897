"""Server side of secure aggregation: SecAgg+ through Flower's workflow.

The sites mask the changes of the weights, rounded to a grid on which sums are exact, so a run repeats bit for bit.
Flower's workflow expects the messages of its older strategies; this module translates them for the server, `mods` for
a site.

Reference:
    Bell et al., Secure Single-Server Aggregation with (Poly)Logarithmic Overhead, CCS 2020.
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
from fedekd.flower.secure.validation import ValidatingGrid
from fedekd.methods import Broadcast, StateDict

#: Grid steps in [-max_change, max_change], and the modulus of their sum over the sites.
STEPS, MODULUS = 2**22, 2**32

#: In a sum of two sites each knows the other's update; the sum of more than MAX_SITES overflows the modulus.
MIN_SITES, MAX_SITES = 3, MODULUS // STEPS - 1


def unmask_threshold(sites: int) -> int:
    """Return how many sites are needed to unmask the sum: max(MIN_SITES, 2n / 3).

    More than half: a server that requests the mask of a site from some sites and its key from the others then has too
    few shares of both.

    Example:
        >>> [unmask_threshold(sites) for sites in (3, 4, 5, 6, 9)]
        [3, 3, 4, 4, 6]
    """
    return max(MIN_SITES, math.ceil(2 * sites / 3))


def require_num_sites(sites: int) -> None:
    """Check that the updates of so many sites can be hidden and summed.

    Raises:
        UserError: The number is outside [MIN_SITES, MAX_SITES].
    """
    if not MIN_SITES <= sites <= MAX_SITES:
        raise UserError(
            f"secure: expected {MIN_SITES} to {MAX_SITES} sites per round, got {sites}."
            " Change sites or --participation."
        )


@dataclass(frozen=True)
class SecureAggregation:
    """Quantization of updates and one round of SecAgg+.

    Attributes:
        max_change: Largest change of a weight that can be transmitted, a power of two.

    Raises:
        UserError: `max_change` is not a power of two.
    """

    max_change: float = 8.0

    def __post_init__(self) -> None:
        if not (self.max_change > 0 and math.frexp(self.max_change)[0] == 0.5):
            raise UserError(f"secure_range: expected a power of two, got {self.max_change}")

    @property
    def resolution(self) -> float:
        """Return the grid step; the mean deviates by at most half of it."""
        return 2 * self.max_change / STEPS

    def require_supported(self, broadcast: Broadcast) -> None:
        """Check that a method's messages can be summed.

        Raises:
            UserError: The broadcast differs between sites, or holds integers.
        """
        if broadcast.personal:
            raise UserError("secure: expected a method that sends the same state to all sites. Set secure=false.")
        for name, tensor in broadcast.shared.items():
            if not tensor.is_floating_point():
                raise UserError(
                    f"secure: expected floating-point weights, got {name!r} of {tensor.dtype}."
                    " Use a model without integer buffers (BatchNorm has one)."
                )

    def quantize(self, update: StateDict, received: StateDict) -> list[npt.NDArray[np.float64]]:
        """Return the change of each weight, rounded to the grid.

        Flower's stochastic rounding then changes nothing.

        Args:
            update: State that a site would send.
            received: State that the site received.

        Returns:
            One vector per tensor, in the order of `received`. Vectors, because Flower cannot sum 0-d arrays.

        Raises:
            UserError: Names or sizes differ, a value is not finite, or a change exceeds `max_change`.
        """
        if update.keys() != received.keys():
            raise UserError(
                f"update: unexpected or missing tensors {', '.join(sorted(update.keys() ^ received.keys()))[:200]}"
            )
        changes = []
        for name, before in received.items():
            change = (update[name].double() - before.double()).reshape(-1)
            largest = float(change.abs().max()) if change.numel() else 0.0
            if not largest <= self.max_change - self.resolution:  # also rejects NaN
                raise UserError(
                    f"secure_range: expected changes below {self.max_change:g}, got {largest:.4g} in {name!r}."
                    " Raise secure_range at the server."
                )
            changes.append((torch.round(change / self.resolution) * self.resolution).numpy())
        return changes

    def apply(self, sent: StateDict, changes: list[npt.NDArray[np.float64]]) -> dict[str, torch.Tensor]:
        """Return the sent state plus a change per tensor, as from `quantize`."""
        return {
            name: (tensor.double() + torch.from_numpy(change).reshape(tensor.shape)).to(tensor.dtype)
            for (name, tensor), change in zip(sent.items(), changes, strict=True)
        }

    def run_round(
        self,
        grid: Grid,
        nodes: Mapping[int, int],
        values: Mapping[int, Mapping[str, Any]],
        sent: StateDict,
        timeout: float | None,
        warn: Callable[[str], None],
    ) -> tuple[dict[int, str], dict[str, torch.Tensor]]:
        """Run one round and return the mean of the updates.

        Args:
            grid: Flower's connection to the nodes.
            nodes: Node id of each site.
            values: JSON values of the request to each site.
            sent: State that all sites receive.
            timeout: Seconds to wait in each of the four stages of the protocol; None waits forever.
            warn: Called for each site whose reply is missing or rejected.

        Returns:
            The JSON text of the reply of each site whose update is in the mean, and the mean. Both are empty if fewer
            sites than `unmask_threshold` remain.

        Raises:
            UserError: The number of sites is not supported.
            ValueError: The unmasked sum exceeds the range of a sum of valid updates.
        """
        require_num_sites(len(values))
        strategy = _Strategy({nodes[site]: site_values for site, site_values in values.items()}, sent, self.max_change)
        state = RecordDict({MAIN_CONFIGS_RECORD: ConfigRecord({WorkflowKey.CURRENT_ROUND: 1})})
        state[MAIN_PARAMS_RECORD] = ArrayRecord({})
        context = Context(run_id=0, node_id=0, node_config={}, state=state, run_config={})
        workflow = _Workflow(
            1.0,  # each site shares its secrets with all others
            unmask_threshold(len(values)),
            max_weight=1.0,
            clipping_range=self.max_change,
            quantization_range=STEPS,
            modulus_range=MODULUS,
            timeout=timeout,
        )
        sites = {nodes[site]: site for site in values}
        manager: Any = SimpleNamespace(num_available=lambda: len(values))
        validating_grid = ValidatingGrid(grid, sites, [tensor.numel() for tensor in sent.values()], warn)
        workflow(validating_grid, LegacyContext(context, strategy=strategy, client_manager=manager))
        if not strategy.replies:
            return {}, {}
        if not all(np.abs(change).max(initial=0.0) <= self.max_change for change in strategy.changes):
            raise ValueError("the unmasked sum is out of range: a site sent an invalid update, which one is unknown")
        replies = {sites[node]: text for node, text in strategy.replies.items()}
        return replies, self.apply(sent, strategy.changes)


class _Workflow(SecAggPlusWorkflow):  # type: ignore[misc]  # Flower has no types here
    """Flower's workflow, with sites that drop out before they have shared their keys."""

    def share_keys_stage(self, grid: Any, context: Any, state: Any) -> bool:
        """Continue with the sites that shared their keys: the others add no masks."""
        enough = bool(super().share_keys_stage(grid, context, state))
        active = set(state.active_node_ids)
        state.sampled_node_ids = active
        state.nid_to_neighbours = {node: state.nid_to_neighbours[node] & active for node in active}
        return enough


class _Strategy(FedAvg):  # type: ignore[misc]
    """Strategy for Flower's workflow: builds the requests and stores the mean."""

    def __init__(self, values: Mapping[int, Mapping[str, Any]], sent: StateDict, max_change: float) -> None:
        super().__init__()
        self.values, self.sent, self.max_change = values, sent, max_change
        self.replies: dict[int, str] = {}
        self.changes: list[npt.NDArray[np.float64]] = []

    def configure_fit(self, server_round: int, parameters: Any, client_manager: Any) -> list[Any]:
        """Return the request to each node."""
        arrays = ndarrays_to_parameters([tensor.detach().cpu().numpy() for tensor in self.sent.values()])
        config = {"names": json.dumps(list(self.sent)), "max_change": self.max_change}
        return [
            (SimpleNamespace(node_id=node), FitIns(arrays, {"values": json.dumps(node_values), **config}))
            for node, node_values in self.values.items()
        ]

    def aggregate_fit(self, server_round: int, results: Any, failures: Any) -> tuple[None, dict[str, Any]]:
        """Store the mean, which every result holds, and the JSON text of each reply."""
        self.replies = {proxy.node_id: str(result.metrics["values"]) for proxy, result in results}
        self.changes = parameters_to_ndarrays(results[0][1].parameters) if results else []
        return None, {}
