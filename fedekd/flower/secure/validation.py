"""Validation of the replies in SecAgg+, which Flower's workflow does not check."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from flwr.app import Message
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS, Key, Stage
from flwr.serverapp import Grid
from flwr.supercore.primitives.asymmetric import bytes_to_public_key

from fedekd.errors import describe_error
from fedekd.flower.messages import error_reason, parse_values, read_array


class ValidatingGrid:
    """Grid that drops invalid replies with a warning.

    Args:
        grid: Flower's connection to the nodes.
        sites: Site number of each node id.
        lengths: Lengths of the vectors that are summed.
        warn: Called for each site whose reply is missing or rejected.
    """

    def __init__(
        self, grid: Grid, sites: Mapping[int, int], lengths: Sequence[int], warn: Callable[[str], None]
    ) -> None:
        self.grid, self.sites, self.warn = grid, sites, warn
        self.shapes = [(1,), *((length,) for length in lengths)]  # Flower puts the sum of the weights first

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Return the valid replies."""
        sent = list(messages)
        requests = [dict(message.content.config_records[RECORD_KEY_CONFIGS]) for message in sent]
        replies = list(self.grid.send_and_receive(sent, timeout=timeout))
        pending = {  # built now, because the grid assigns the message ids when it sends
            message.metadata.message_id: (message.metadata.dst_node_id, request)
            for message, request in zip(sent, requests, strict=True)
        }
        valid = []
        for reply in replies:
            message_id = reply.metadata.reply_to_message_id  # not the sender: see `FlowerEngine._send`
            if message_id not in pending:
                continue
            node, request = pending.pop(message_id)
            if reply.has_error():
                self.warn(f"site {self.sites[node]} failed: {error_reason(reply)}")
            elif (reason := self._check(node, request, reply)) is not None:
                self.warn(f"rejected the reply of site {self.sites[node]}: {reason}")
            else:
                valid.append(reply)
        within = "" if timeout is None else f" within {timeout:g} s"
        for node, _ in pending.values():
            self.warn(f"site {self.sites[node]} did not reply{within}")
        return valid

    def _check(self, node: int, request: Mapping[str, Any], reply: Message) -> str | None:
        """Return why a reply is rejected; None if it is valid."""
        checks = {
            Stage.SETUP: self._has_keys,
            Stage.SHARE_KEYS: self._has_shares,
            Stage.COLLECT_MASKED_VECTORS: self._has_masked_vectors,
            Stage.UNMASK: self._has_secrets,
        }
        stage = str(request[Key.STAGE])
        try:
            values = reply.content.config_records[RECORD_KEY_CONFIGS]
            is_valid = checks[stage](node, request, values)
            if stage == Stage.COLLECT_MASKED_VECTORS:
                parse_values(reply.content.config_records["fitres.metrics"]["values"])
        except Exception as error:  # the content is arbitrary, and so are the errors of reading it
            return f"unreadable content in stage {stage}: {describe_error(error)}"
        return None if is_valid else f"unexpected content in stage {stage}"

    def _has_keys(self, node: int, request: Mapping[str, Any], values: Mapping[str, Any]) -> bool:
        """Return True for two public keys."""
        return all(bytes_to_public_key(values[name]) is not None for name in (Key.PUBLIC_KEY_1, Key.PUBLIC_KEY_2))

    def _has_shares(self, node: int, request: Mapping[str, Any], values: Mapping[str, Any]) -> bool:
        """Return True for one encrypted share per other site."""
        others = sorted(int(name) for name in request if name not in (Key.STAGE, str(node)))
        return sorted(values[Key.DESTINATION_LIST]) == others and _are_bytes(values[Key.CIPHERTEXT_LIST], len(others))

    def _has_masked_vectors(self, node: int, request: Mapping[str, Any], values: Mapping[str, Any]) -> bool:
        """Return True for int64 vectors of the expected lengths."""
        parts = values[Key.MASKED_PARAMETERS]
        if len(parts) != len(self.shapes):
            return False
        arrays = (read_array(part) for part in parts)
        return all(
            (array.shape, array.dtype) == (shape, np.dtype(np.int64))
            for array, shape in zip(arrays, self.shapes, strict=True)
        )

    def _has_secrets(self, node: int, request: Mapping[str, Any], values: Mapping[str, Any]) -> bool:
        """Return True for one share of each remaining and each lost site."""
        expected = [*request[Key.ACTIVE_NODE_ID_LIST], *request[Key.DEAD_NODE_ID_LIST]]
        return list(values[Key.NODE_ID_LIST]) == expected and _are_bytes(values[Key.SHARE_LIST], len(expected))


def _are_bytes(values: Sequence[Any], length: int) -> bool:
    return len(values) == length and all(isinstance(value, bytes) for value in values)
