"""Secure aggregation: the server learns the mean of the sites' updates, and of no site what it has sent.

The protocol is SecAgg+ (Bell et al., CCS 2020) as Flower has it: its workflow at the server, its mod at each site. It
wants what Flower's older strategies say to their clients; this file translates. What is hidden is the change of the
weights, rounded to a grid on which sums are exact: so a federation comes to the same figures each time.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.common import FitIns, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.server import LegacyContext
from flwr.server.client_manager import SimpleClientManager
from flwr.server.strategy import FedAvg
from flwr.server.workflow import SecAggPlusWorkflow
from flwr.server.workflow.constant import MAIN_CONFIGS_RECORD, MAIN_PARAMS_RECORD
from flwr.server.workflow.constant import Key as WorkflowKey
from flwr.serverapp import Grid

from fedekd.errors import UserError
from fedekd.flower.messages import reason_of
from fedekd.methods import Broadcast, StateDict

#: Into how many steps the range of a change is divided. Flower sums modulo 2^32: 1,024 sites fit.
STEPS = 2**22

#: Which part of the sites must be there to take the masks off: more than half, so that a server that asks some for the
#: one secret of a site and some for the other learns nothing.
THRESHOLD = 2 / 3

#: Fewer sites than this hide nothing: of the sum of two, each knows the other's part.
LEAST = 3


@dataclass(frozen=True)
class SecureAggregation:
    """A round in which each update is hidden among the others.

    Attributes:
        range: The largest change of a weight that can be carried, a power of two; it is carried to range / 2^21.
    """

    range: float = 8.0

    def __post_init__(self) -> None:
        if not (self.range > 0 and math.frexp(self.range)[0] == 0.5):
            raise UserError(f"secure_range is {self.range}, and must be a power of two")

    @property
    def resolution(self) -> float:
        """The step between two changes that can be carried: the mean is off by no more than half of it."""
        return 2 * self.range / STEPS

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

    def visits(
        self, grid: Grid, notes: Mapping[int, Mapping[str, Any]], sent: StateDict, timeout: float | None
    ) -> tuple[dict[int, str], dict[str, torch.Tensor]]:
        """Let sites visit, and sum what they send.

        Args:
            grid: The way to them.
            notes: By node, what its site is told of its visit.
            sent: What all of them are sent.
            timeout: Seconds to wait in each of the four stages of the protocol; None waits on.

        Returns:
            By node, the note of its answer as JSON, of those whose updates are in the mean; and the mean.

        Raises:
            UserError: If too few are there.
        """
        if len(notes) < LEAST:
            raise UserError(f"secure aggregation needs at least {LEAST} sites in a round, and there are {len(notes)}")
        strategy = _Strategy(notes, sent, self.range)
        state = RecordDict({MAIN_CONFIGS_RECORD: ConfigRecord({WorkflowKey.CURRENT_ROUND: 1})})
        state[MAIN_PARAMS_RECORD] = ArrayRecord({})
        context = Context(run_id=0, node_id=0, node_config={}, state=state, run_config={})
        workflow = _Workflow(
            1.0, THRESHOLD, max_weight=1.0, clipping_range=self.range, quantization_range=STEPS, timeout=timeout
        )
        workflow(grid, LegacyContext(context, strategy=strategy, client_manager=_Sites(len(notes))))
        if len(strategy.changes) != len(sent):
            return {}, {}
        mean = {}
        for (name, tensor), change in zip(sent.items(), strategy.changes, strict=True):
            mean[name] = (tensor.double() + torch.from_numpy(change).reshape(tensor.shape)).to(tensor.dtype)
        return strategy.answers, mean


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

    def __init__(self, notes: Mapping[int, Mapping[str, Any]], sent: StateDict, range: float) -> None:
        super().__init__()
        self.notes, self.sent, self.range = notes, sent, range
        self.answers: dict[int, str] = {}
        self.changes: list[Any] = []

    def configure_fit(self, server_round: int, parameters: Any, client_manager: Any) -> list[Any]:
        """Each site's node, and what it is sent."""
        arrays = ndarrays_to_parameters([tensor.detach().cpu().numpy() for tensor in self.sent.values()])
        names = json.dumps(list(self.sent))
        return [
            (
                SimpleNamespace(node_id=node),
                FitIns(arrays, {"note": json.dumps(note), "names": names, "range": self.range}),
            )
            for node, note in self.notes.items()
        ]

    def aggregate_fit(self, server_round: int, results: Any, failures: Any) -> tuple[None, dict[str, Any]]:
        """Take the mean, which every result holds, and what each site says beside it."""
        self.answers = {proxy.node_id: str(answer.metrics["note"]) for proxy, answer in results}
        self.changes = parameters_to_ndarrays(results[0][1].parameters) if results else []
        return None, {}


class _Sites(SimpleClientManager):  # type: ignore[misc]
    """Tells Flower's log how many sites there are."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def num_available(self) -> int:
        """How many there are."""
        return self.number


class TellingGrid:
    """A way to the sites that tells which of them could not answer; Flower's workflow passes over them."""

    def __init__(self, grid: Grid, numbers: Mapping[int, int], warn: Callable[[str], None]) -> None:
        self.grid, self.numbers, self.warn = grid, numbers, warn

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """The answers, errors among them."""
        sent = list(messages)
        replies = list(self.grid.send_and_receive(sent, timeout=timeout))
        nodes = {message.metadata.message_id: message.metadata.dst_node_id for message in sent}
        for reply in replies:
            if reply.has_error():
                number = self.numbers[nodes[reply.metadata.reply_to_message_id]]
                self.warn(f"site {number} could not answer: {reason_of(reply)}")
        return replies
