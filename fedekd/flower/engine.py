"""Clients that are sites of their own, reached through Flower: one message each way a round."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from flwr.app import Message
from flwr.serverapp import Grid

from fedekd.errors import UserError
from fedekd.federation.engines.base import ClientResult, RoundRequest
from fedekd.federation.local_baseline import LocalBaseline
from fedekd.federation.observer import Observer, SilentObserver
from fedekd.flower.description import require_description
from fedekd.flower.messages import (
    ABSORB,
    HELLO,
    REFERENCE,
    SCORE,
    VISIT,
    from_arrays,
    look_to_json,
    note_from,
    note_of,
    num_bytes,
    one_line,
    packed,
    reason_of,
    scores_of,
    state_of,
    visit_from_json,
)
from fedekd.flower.secure import SecureAggregation
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
        descriptions: By number, what each site told of itself; who comes back must be the same. None asks nobody.
        secure: Hides each update among the others; None lets every site send its own.
    """

    def __init__(
        self,
        grid: Grid,
        nodes: Mapping[int, int],
        timeout: float | None = None,
        observer: Observer | None = None,
        descriptions: Mapping[int, Mapping[str, Any]] | None = None,
        secure: SecureAggregation | None = None,
    ) -> None:
        self.descriptions, self.secure = descriptions, secure
        self.grid, self.nodes, self.timeout = grid, dict(nodes), timeout
        self.observer = observer or SilentObserver()
        self._versions: dict[int, int] = {}

    def local_baselines(self, rounds: Mapping[int, int]) -> dict[int, LocalBaseline]:
        """Local's reference for each site, trained there; only its scores are told."""
        asked = {number: packed({"rounds": wanted}) for number, wanted in rounds.items()}
        found = {}
        for number, reply in self._ask(REFERENCE, asked, None):
            try:
                found[number] = LocalBaseline(scores_of(reply, rounds[number]))
            except UserError as error:
                self.observer.warn(f"refused the answer of site {number}: {error}")
        self._require_all(asked, found, "has no answer to what Local comes to there")
        return found

    def run_clients(self, request: RoundRequest) -> Iterator[ClientResult]:
        """The participants, as they answer; those that do not are missing, but for the last round."""
        round_idx, broadcast, collect_updates = request.round_idx, request.broadcast, request.collect_updates
        comparison = look_to_json(request.comparison)
        notes = {
            number: {"round": round_idx, "version": self._versions.get(number, 0), "look": comparison}
            for number in request.participants
        }
        hidden = collect_updates and self.secure
        visited = []
        for visit in self._hidden(notes, broadcast) if hidden else self._open(notes, broadcast, collect_updates):
            self._versions[visit.client] = self._versions.get(visit.client, 0) + 1
            visited.append(visit.client)
            yield visit
        if missing := [str(number) for number in request.participants if number not in visited]:
            told = f"round {round_idx}: no usable answer from the sites {', '.join(missing)}"
            if not collect_updates:
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
        self._look_for(asked)
        messages = {number: Message(content, self.nodes[number], what) for number, content in asked.items()}
        for reply in self.grid.send_and_receive(messages.values(), timeout=timeout):
            # Not by who sent it: the SuperLink answers in place of a node that is gone.
            answered = reply.metadata.reply_to_message_id
            number = next((n for n, message in messages.items() if message.metadata.message_id == answered), None)
            if reply.has_error():
                self.observer.warn(f"site {number} could not answer: {reason_of(reply)}")
            elif number is not None:
                yield number, reply

    def _look_for(self, numbers: Iterable[int]) -> None:
        """Find sites again that are there under another node's number, as after a new installation."""
        known = set(self.grid.get_node_ids())
        gone = {number for number in numbers if self.nodes[number] not in known}
        if not gone:
            return
        newcomers = introduced(self.grid, known - set(self.nodes.values()), warn=self.observer.warn)
        for node, description in newcomers.items():
            number = int(description["number"])
            expected = None if self.descriptions is None else self.descriptions.get(number)
            if number in gone and expected is not None and dict(expected) != description:
                self.observer.warn(f"site {number} has come back with other data or settings, and is left out")
            elif number in gone:
                self.nodes[number] = node

    def _open(
        self, notes: Mapping[int, Mapping[str, Any]], broadcast: Broadcast, upload: bool
    ) -> Iterator[ClientResult]:
        """Visits as they come, with what each site sends; what cannot be read or had better not be is refused."""
        asked = {number: packed(note, broadcast.to(number)) for number, note in notes.items()}
        for number, reply in self._ask(VISIT if upload else ABSORB, asked, self.timeout if upload else None):
            try:
                arrays, sent = state_of(reply), size_of(broadcast.to(number))
                if num_bytes(arrays) > sent + _SLACK:
                    raise UserError(f"its update has {num_bytes(arrays):,} bytes, and it was sent {sent:,}")
                yield _own_visit(number, note_of(reply), from_arrays(arrays))
            except (UserError, ValueError, TypeError) as error:
                self.observer.warn(f"refused the answer of site {number}: {error}")

    def _hidden(self, notes: Mapping[int, Mapping[str, Any]], broadcast: Broadcast) -> Iterator[ClientResult]:
        """Visits whose updates are all the mean of what the sites have sent: more is not known here."""
        assert self.secure is not None
        self._look_for(notes)
        self.secure.require(broadcast)
        nodes = {number: self.nodes[number] for number in notes}
        try:
            answers, mean = self.secure.visits(
                self.grid, nodes, notes, broadcast.shared, self.timeout, self.observer.warn
            )
        except UserError:
            raise
        except Exception as error:  # Flower's workflow may fail of what it is told in many ways
            self.observer.warn(one_line(f"secure aggregation has failed: {type(error).__name__} {error}"))
            return
        for number, note in answers.items():
            try:
                yield _own_visit(number, note_from(note), mean)
            except UserError as error:
                self.observer.warn(f"refused the answer of site {number}, but its update is in the sum: {error}")

    def _require_all(self, asked: Mapping[int, Any], found: Mapping[int, Any], lack: str) -> None:
        missing = [str(number) for number in asked if number not in found]
        if missing:
            raise UserError(f"site {', '.join(missing)} {lack}; start it again to go on")


def _own_visit(number: int, note: Mapping[str, Any], state: StateDict) -> ClientResult:
    """A site's visit.

    Raises:
        UserError: If it is none, or another site's.
    """
    visit = visit_from_json(note, state)
    if visit.client != number:
        raise UserError(f"it speaks for client {visit.client}")
    return visit


def introduced(
    grid: Grid, nodes: set[int], timeout: float | None = 120.0, warn: Callable[[str], None] | None = None
) -> dict[int, dict[str, Any]]:
    """What each of these nodes tells of its site.

    Args:
        grid: The way to the nodes.
        nodes: Which.
        timeout: Seconds to wait for them.
        warn: Is told of a node that answers with an error, which is then left out; None lets that be an error.

    Raises:
        UserError: If a node cannot introduce itself, and that is an error.
    """
    messages = [Message(packed({}), node, HELLO) for node in nodes]
    found = {}
    for reply in grid.send_and_receive(messages, timeout=timeout) if messages else ():
        if reply.has_error():
            told = reason_of(reply)
        else:
            try:
                description = note_of(reply)
                require_description(description)
            except UserError as error:
                told = str(error)
            else:
                found[int(reply.metadata.src_node_id)] = description
                continue
        told = f"a site could not introduce itself: {told}"
        if warn is None:
            raise UserError(told)
        warn(told)
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
        here = set(grid.get_node_ids())
        found = {node: description for node, description in found.items() if node in here}
        found |= introduced(grid, here - found.keys())
        if len(found) < sites:
            if time.monotonic() > end:
                raise UserError(f"{len(found)} of {sites} sites have come within {seconds:g} s (sites, wait)")
            time.sleep(0.5)
    numbers = sorted(int(description["number"]) for description in found.values())
    if numbers != list(range(sites)):
        raise UserError(f"the sites have the numbers {', '.join(map(str, numbers))}, and must be 0..{sites - 1}")
    return found
