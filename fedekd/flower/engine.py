"""Clients that are sites of their own, reached through Flower: one message each way a round."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from flwr.app import Message
from flwr.serverapp import Grid

from fedekd.errors import UserError
from fedekd.federation.engine import Look, Visit
from fedekd.federation.observer import Observer, SilentObserver
from fedekd.federation.reference import LocalReference
from fedekd.flower.messages import (
    ABSORB,
    HELLO,
    REFERENCE,
    SCORE,
    VISIT,
    from_arrays,
    look_to_json,
    note_of,
    num_bytes,
    packed,
    state_of,
    visit_from_json,
)
from fedekd.methods import Broadcast, StateDict
from fedekd.methods.base import num_bytes as size_of

#: How much larger than what was sent an update may be before it is refused unread: names and headers take some.
_SLACK = 2**20


class FlowerEngine:
    """Asks sites for what a round needs. Their states stay with them; a state is known here by its version.

    Args:
        grid: Flower's way to the sites.
        nodes: By a site's number, Flower's number of its node.
        timeout: Seconds to wait for the answers of a round; None waits on.
        observer: Is told what goes wrong.
    """

    def __init__(
        self,
        grid: Grid,
        nodes: Mapping[int, int],
        timeout: float | None = None,
        observer: Observer | None = None,
    ) -> None:
        self.grid, self.nodes, self.timeout = grid, dict(nodes), timeout
        self.observer = observer or SilentObserver()
        self._versions: dict[int, int] = {}

    def references(self, rounds: Mapping[int, int]) -> dict[int, LocalReference]:
        """Local's reference for each site, trained there; only its scores are told."""
        asked = {number: packed({"rounds": wanted}) for number, wanted in rounds.items()}
        found = {}
        for number, reply in self._ask(REFERENCE, asked, None):
            found[number] = LocalReference([float(score) for score in note_of(reply)["scores"]])
        self._require_all(asked, found, "has no answer to what Local comes to there")
        return found

    def visit(
        self,
        participants: Sequence[int],
        broadcast: Broadcast,
        round: int,
        upload: bool,
        look: Look | None = None,
    ) -> Iterator[Visit]:
        """The participants, as they answer; those that do not are missing, but for the last round."""
        asked = {}
        for number in participants:
            version = self._versions.get(number, 0)
            note = {"round": round, "version": version, "look": look_to_json(look)}
            asked[number] = packed(note, broadcast.to(number))
        visited = []
        for number, reply in self._ask(VISIT if upload else ABSORB, asked, self.timeout if upload else None):
            visit = self._visit_of(number, reply, broadcast.to(number))
            if visit is not None:
                self._versions[number] = self._versions.get(number, 0) + 1
                visited.append(number)
                yield visit
        if missing := [str(number) for number in participants if number not in visited]:
            told = f"round {round}: no usable answer from the sites {', '.join(missing)}"
            if not upload:
                raise UserError(f"{told}, and the federation cannot end without them; start it again to go on")
            self.observer.warn(f"{told}; they are missing from this round")

    def score(self, number: int) -> float:
        """A site's score as it is now."""
        asked = {number: packed({"version": self._versions.get(number, 0)})}
        found = {who: float(note_of(reply)["score"]) for who, reply in self._ask(SCORE, asked, None)}
        self._require_all(asked, found, "has not told its score")
        return found[number]

    def client_state(self, number: int) -> Any:
        """The version of a site's state: the state itself never leaves it."""
        return {"version": self._versions.get(number, 0)}

    def load_client_state(self, number: int, state: Any) -> None:
        """Let a site go on from a version that it has on its disk."""
        self._versions[number] = int(state["version"])

    def close(self) -> None:
        """Sites belong to themselves: there is nothing to end."""

    def _ask(self, what: str, asked: Mapping[int, Any], timeout: float | None) -> Iterator[tuple[int, Message]]:
        """Send each site its message, and give the answers as they come; a site's error is told, and no answer."""
        known = set(self.grid.get_node_ids())
        if gone := {number for number in asked if self.nodes[number] not in known}:
            self.nodes |= {n: node for n, node in found_sites(self.grid, known - set(self.nodes.values())) if n in gone}
        numbers = {node: number for number, node in self.nodes.items()}
        messages = [Message(content, self.nodes[number], what) for number, content in asked.items()]
        for reply in self.grid.send_and_receive(messages, timeout=timeout):
            number = numbers.get(reply.metadata.src_node_id)
            if reply.has_error():
                lines = [line.strip() for line in str(reply.error.reason or "unknown").splitlines() if line.strip()]
                self.observer.warn(f"site {number} could not answer: {lines[-1][:500]}")
            elif number is not None:
                yield number, reply

    def _visit_of(self, number: int, reply: Message, sent: StateDict) -> Visit | None:
        """A site's visit; None if it cannot be read, or is so large that it had better not be."""
        try:
            arrays = state_of(reply)
            if num_bytes(arrays) > size_of(sent) + _SLACK:
                raise UserError(f"its update has {num_bytes(arrays):,} bytes, and it was sent {size_of(sent):,}")
            visit = visit_from_json(note_of(reply), from_arrays(arrays))
            if visit.client != number:
                raise UserError(f"it speaks for client {visit.client}")
        except (UserError, ValueError, TypeError) as error:
            self.observer.warn(f"refused the answer of site {number}: {error}")
            return None
        return visit

    def _require_all(self, asked: Mapping[int, Any], found: Mapping[int, Any], lack: str) -> None:
        missing = [str(number) for number in asked if number not in found]
        if missing:
            raise UserError(f"site {', '.join(missing)} {lack}; start it again to go on")


def found_sites(grid: Grid, nodes: set[int]) -> list[tuple[int, int]]:
    """The number of each of these nodes that answers, with the node's."""
    return [(int(description["number"]), node) for node, description in introduced(grid, nodes).items()]


def introduced(grid: Grid, nodes: set[int], timeout: float | None = 120.0) -> dict[int, dict[str, Any]]:
    """What each of these nodes tells of its site; a node that answers with an error is left out.

    Raises:
        UserError: If a site's error is one that somebody there must mend; it is told.
    """
    messages = [Message(packed({}), node, HELLO) for node in nodes]
    found = {}
    for reply in grid.send_and_receive(messages, timeout=timeout) if messages else ():
        if reply.has_error():
            raise UserError(f"a site could not introduce itself: {str(reply.error.reason).strip().splitlines()[-1]}")
        found[int(reply.metadata.src_node_id)] = note_of(reply)
    return found


def wait_for_sites(grid: Grid, sites: int, seconds: float, observer: Observer) -> dict[int, dict[str, Any]]:
    """Wait until so many sites are there, and let them introduce themselves.

    Returns:
        By node, what its site tells.

    Raises:
        UserError: If they do not come in time, or two of them have the same number.
    """
    found: dict[int, dict[str, Any]] = {}
    end = time.monotonic() + seconds
    while len(found) < sites:
        found |= introduced(grid, set(grid.get_node_ids()) - found.keys())
        if len(found) < sites:
            if time.monotonic() > end:
                raise UserError(f"{len(found)} of {sites} sites have come within {seconds:g} s (sites, wait)")
            time.sleep(0.5)
    numbers = sorted(int(description["number"]) for description in found.values())
    if numbers != list(range(sites)):
        raise UserError(f"the sites have the numbers {', '.join(map(str, numbers))}, and must be 0..{sites - 1}")
    return found
