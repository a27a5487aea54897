"""Engine whose clients are Flower nodes at real sites."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

from flwr.app import Message
from flwr.serverapp import Grid

from fedekd.errors import UserError, describe_error
from fedekd.federation import ClientResult, RoundRequest
from fedekd.federation.local_baseline import LocalBaseline
from fedekd.federation.observer import Observer, SilentObserver
from fedekd.federation.references import Reference, ReferenceScores, reference_to_json
from fedekd.flower.description import require_description
from fedekd.flower.messages import (
    BASELINE,
    DESCRIBE,
    LAST_ROUND,
    ROUND,
    SCORE,
    arrays_of,
    baseline_metrics,
    client_result_from_json,
    comparison_request_to_json,
    dtypes_to_json,
    error_reason,
    from_arrays,
    pack,
    parse_values,
    payload_bytes,
    reference_choice,
    values_of,
)
from fedekd.flower.secure.aggregation import SecureAggregation
from fedekd.methods import Broadcast, StateDict
from fedekd.methods.base import state_dict_bytes

#: Bytes by which an update may exceed the broadcast before it is rejected unread; array headers need some.
_HEADER_BYTES = 2**20


class FlowerEngine:
    """Engine of a federation of sites: one message each way per round.

    Client states stay at the sites; the server has only their version numbers.

    Args:
        grid: Flower's connection to the nodes.
        nodes: Flower's node id of each site number.
        timeout: Seconds to wait for the replies of a round; None waits forever.
        observer: Receives warnings.
        descriptions: Description of each site number; a site that reconnects must have the same. None skips the check.
        secure: Secure aggregation of the updates; None lets each site send its update in the clear.
    """

    has_seeded_noise = False

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
        """Train the local baseline at each site; the sites send its metrics only.

        Raises:
            UserError: A site does not return valid scores.
        """
        contents = {site: pack({"rounds": count}) for site, count in rounds.items()}
        baselines = {}
        for site, reply in self._send(BASELINE, contents, None):
            try:
                baselines[site] = LocalBaseline([], metrics=baseline_metrics(reply, rounds[site]))
            except UserError as error:
                self.observer.warn(f"rejected the reply of site {self._title(site)}: {error}")
        self._require_replies(rounds, baselines, "local baseline")
        return baselines

    def train_references(self, references: Mapping[int, Reference]) -> dict[int, ReferenceScores]:
        """Train a further reference at each site; the sites send its metrics only.

        Raises:
            UserError: A site does not return valid scores.
        """
        contents = {site: pack({"reference": reference_to_json(reference)}) for site, reference in references.items()}
        scores = {}
        for site, reply in self._send(BASELINE, contents, None):
            rounds = references[site].scored_rounds
            try:
                metrics = baseline_metrics(reply, len(rounds))
                scores[site] = ReferenceScores(rounds, metrics, reference_choice(reply))
            except UserError as error:
                self.observer.warn(f"rejected the reply of site {self._title(site)}: {error}")
        self._require_replies(references, scores, "reference")
        return scores

    def run_clients(self, request: RoundRequest) -> Iterator[ClientResult]:
        """Yield the results of a round in the order of the replies.

        A participant without a usable reply is left out with a warning.

        Raises:
            UserError: A reply is missing in the last round, which needs all participants.
        """
        values = {
            site: {
                "round": request.round_idx,
                "version": self._versions.get(site, 0),
                "comparison": comparison_request_to_json(request.comparison),
                **dtypes_to_json(request.dtypes, request.broadcast.to(site)),
            }
            for site in request.participants
        }
        if request.collect_updates and self.secure:
            results = self._run_secure(values, request.broadcast)
        else:
            results = self._run_plain(values, request.broadcast, request.collect_updates)
        received = set()
        for result in results:
            self._versions[result.client] = self._versions.get(result.client, 0) + 1
            received.add(result.client)
            yield result
        if missing := ", ".join(self._title(site) for site in request.participants if site not in received):
            reason = f"round {request.round_idx}: no valid reply from site {missing}"
            if not request.collect_updates:
                raise UserError(f"{reason}. The last round needs every site: start the sites and repeat the command.")
            self.observer.warn(f"{reason}; left out of this round")

    def evaluate(self, number: int) -> dict[str, float]:
        """Return all metrics of a site's current model on its test split.

        Raises:
            UserError: The site does not reply.
        """
        contents = {number: pack({"version": self._versions.get(number, 0)})}
        replies: dict[int, Any] = {}
        for site, reply in self._send(SCORE, contents, None):
            try:
                replies[site] = values_of(reply).get("metrics")
            except UserError as error:
                self.observer.warn(f"rejected the reply of site {self._title(site)}: {error}")
        self._require_replies(contents, replies, "score")
        metrics: dict[str, float] = replies[number]  # the orchestrator checks them
        return metrics

    def client_state(self, number: int) -> Any:
        """Return the version number of a site's state, which stays at the site."""
        return {"version": self._versions.get(number, 0)}

    def load_client_state(self, number: int, state: Any) -> None:
        """Set the version from which a site continues; the site has it on disk."""
        self._versions[number] = int(state["version"])

    def close(self) -> None:
        """Do nothing: the sites' processes are not the server's to end."""

    def _send(
        self, message_type: str, contents: Mapping[int, Any], timeout: float | None
    ) -> Iterator[tuple[int, Message]]:
        """Send a message to each site and yield (site, reply); warn of error replies."""
        self._find_restarted(contents)
        messages = {site: Message(content, self.nodes[site], message_type) for site, content in contents.items()}
        for reply in self.grid.send_and_receive(messages.values(), timeout=timeout):
            # Match by message id: the SuperLink replies itself for a node that is offline.
            message_id = reply.metadata.reply_to_message_id
            site = next((site for site, message in messages.items() if message.metadata.message_id == message_id), None)
            if reply.has_error():
                self.observer.warn(f"site {self._title(site)} failed: {error_reason(reply)}")
            elif site is not None:
                yield site, reply

    def _find_restarted(self, sites: Iterable[int]) -> None:
        """Update the node ids of sites that have reconnected under a new one."""
        connected = set(self.grid.get_node_ids())
        absent = {site for site in sites if self.nodes[site] not in connected}
        if not absent:
            return
        new_nodes = connected - set(self.nodes.values())
        for node, description in request_descriptions(self.grid, new_nodes, warn=self.observer.warn).items():
            site = description["site"]
            expected = None if self.descriptions is None else self.descriptions.get(site)
            if site in absent and expected is not None and dict(expected) != description:
                self.observer.warn(f"site {self._title(site)} reconnected with other data or settings; left out")
            elif site in absent:
                self.nodes[site] = node

    def _run_plain(
        self, values: Mapping[int, Mapping[str, Any]], broadcast: Broadcast, collect_updates: bool
    ) -> Iterator[ClientResult]:
        """Yield results with unmasked updates; reject malformed or oversized replies."""
        contents = {site: pack(site_values, broadcast.to(site)) for site, site_values in values.items()}
        message_type, timeout = (ROUND, self.timeout) if collect_updates else (LAST_ROUND, None)
        for site, reply in self._send(message_type, contents, timeout):
            try:
                arrays, sent_bytes = arrays_of(reply), state_dict_bytes(broadcast.to(site))
                if payload_bytes(arrays) > sent_bytes + _HEADER_BYTES:
                    raise UserError(f"update of {payload_bytes(arrays):,} bytes, but {sent_bytes:,} bytes were sent")
                yield _result_of(site, values_of(reply), from_arrays(arrays))
            except (UserError, ValueError, TypeError) as error:
                self.observer.warn(f"rejected the reply of site {self._title(site)}: {error}")

    def _run_secure(self, values: Mapping[int, Mapping[str, Any]], broadcast: Broadcast) -> Iterator[ClientResult]:
        """Yield results whose updates are all the mean from secure aggregation."""
        assert self.secure is not None
        self._find_restarted(values)
        self.secure.require_supported(broadcast)
        nodes = {site: self.nodes[site] for site in values}
        try:
            replies, mean = self.secure.run_round(
                self.grid, nodes, values, broadcast.shared, self.timeout, self.observer.warn
            )
        except UserError:
            raise
        except Exception as error:  # Flower's workflow does not validate replies and may fail in any way
            self.observer.warn(f"secure aggregation failed: {describe_error(error)}")
            return
        for site, text in replies.items():
            try:
                yield _result_of(site, parse_values(text), mean)
            except UserError as error:
                self.observer.warn(
                    f"rejected the reply of site {self._title(site)}, but its update is in the mean: {error}"
                )

    def _require_replies(self, expected: Iterable[int], received: Collection[int], subject: str) -> None:
        if missing := ", ".join(self._title(site) for site in expected if site not in received):
            raise UserError(f"no {subject} from site {missing}. Start the sites and repeat the command.")

    def _title(self, site: int | None) -> str:
        """Return the quoted name of a site, or its number."""
        description = {} if self.descriptions is None or site is None else self.descriptions.get(site, {})
        name = description.get("name")
        return str(site) if name is None else repr(name)


def _result_of(site: int, values: Mapping[str, Any], state: StateDict) -> ClientResult:
    """Build a site's result.

    Raises:
        UserError: The reply is invalid or names another client.
    """
    result = client_result_from_json(values, state)
    if result.client != site:
        raise UserError(f"expected the result of client {site}, got client {result.client}")
    return result


def request_descriptions(
    grid: Grid, nodes: set[int], timeout: float | None = 120.0, warn: Callable[[str], None] | None = None
) -> dict[int, dict[str, Any]]:
    """Request the descriptions of nodes; a node that does not reply is left out.

    Args:
        grid: Flower's connection to the nodes.
        nodes: Node ids.
        timeout: Seconds to wait for the replies.
        warn: Called for a node with an error or an invalid reply, which is left out; None raises instead.

    Returns:
        The description by node id.

    Raises:
        UserError: A node replies with an error or an invalid description, and `warn` is None.
    """
    messages = [Message(pack({}), node, DESCRIBE) for node in nodes]
    descriptions = {}
    for reply in grid.send_and_receive(messages, timeout=timeout) if messages else ():
        try:
            if reply.has_error():
                raise UserError(error_reason(reply))
            description = values_of(reply)
            require_description(description)
        except UserError as error:
            if warn is None:
                raise UserError(f"a site sent no description: {error}") from error
            warn(f"a site sent no description: {error}")
        else:
            descriptions[int(reply.metadata.src_node_id)] = description
    return descriptions


def wait_for_sites(grid: Grid, sites: int, seconds: float) -> tuple[dict[int, int], dict[int, dict[str, Any]]]:
    """Wait until all sites are connected and have sent their descriptions.

    Args:
        grid: Flower's connection to the nodes.
        sites: Number of sites, at least 1.
        seconds: Time limit.

    Returns:
        The node id by site number, and the description by site number, both in ascending order.

    Raises:
        UserError: Too few sites connect in time, a description is invalid, or the site numbers are not 0..sites-1.
    """
    descriptions: dict[int, dict[str, Any]] = {}
    end = time.monotonic() + seconds
    while len(descriptions) < sites:
        connected = set(grid.get_node_ids())
        descriptions = {node: description for node, description in descriptions.items() if node in connected}
        descriptions |= request_descriptions(grid, connected - descriptions.keys())
        if len(descriptions) < sites:
            if time.monotonic() > end:
                raise UserError(
                    f"sites: expected {sites} within {seconds:g} s, got {len(descriptions)}."
                    " Start the missing sites or raise wait."
                )
            time.sleep(0.5)
    nodes = dict(sorted((description["site"], node) for node, description in descriptions.items()))
    if list(nodes) != list(range(sites)) or len(descriptions) != sites:
        numbers = ", ".join(str(number) for number in sorted(d["site"] for d in descriptions.values()))
        raise UserError(
            f"number: expected 0 to {sites - 1}, one per site, got {numbers}. Correct number in each --node-config."
        )
    return nodes, {site: descriptions[node] for site, node in nodes.items()}
