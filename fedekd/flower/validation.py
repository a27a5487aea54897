"""What sites answer in the stages of secure aggregation, vetted: Flower's workflow takes it as it comes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from flwr.app import Message
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS, Key, Stage
from flwr.serverapp import Grid
from flwr.supercore.primitives.asymmetric import bytes_to_public_key

from fedekd.flower.messages import note_from, one_line, read_array, reason_of


class ValidatingGrid:
    """A way to the sites that keeps back, and tells, what the sum cannot go on with.

    Args:
        grid: The way to the sites.
        sites: By node, the site's number.
        lengths: Of the vectors that are summed.
        warn: Is told of each site whose answer is missing or refused.
    """

    def __init__(
        self, grid: Grid, sites: Mapping[int, int], lengths: Sequence[int], warn: Callable[[str], None]
    ) -> None:
        self.grid, self.sites, self.warn = grid, sites, warn
        self.shapes = [(1,), *((length,) for length in lengths)]  # the first is the sum of the weights

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """The answers that are sound."""
        sent = list(messages)
        asked = [dict(message.content.config_records[RECORD_KEY_CONFIGS]) for message in sent]
        replies = list(self.grid.send_and_receive(sent, timeout=timeout))
        waiting = {message.metadata.message_id: each for message, each in zip(sent, asked, strict=True)}
        nodes = {message.metadata.message_id: message.metadata.dst_node_id for message in sent}
        sound = []
        for reply in replies:
            answered = reply.metadata.reply_to_message_id  # not by who sent it: see `FlowerEngine`
            if answered not in waiting:
                continue
            node, told = nodes[answered], waiting.pop(answered)
            if reply.has_error():
                self.warn(f"site {self.sites[node]} could not answer: {reason_of(reply)}")
            elif (reason := self._objection(node, told, reply)) is not None:
                self.warn(f"refused the answer of site {self.sites[node]}: {reason}")
            else:
                sound.append(reply)
        for unanswered in waiting:
            within = "" if timeout is None else f" within {timeout:g} s"
            self.warn(f"site {self.sites[nodes[unanswered]]} has not answered{within}")
        return sound

    def _objection(self, node: int, asked: Mapping[str, Any], reply: Message) -> str | None:
        """Why an answer cannot be gone on with, in a few words; None if it can."""
        stages = {
            Stage.SETUP: self._keys,
            Stage.SHARE_KEYS: self._shares,
            Stage.COLLECT_MASKED_VECTORS: self._masked,
            Stage.UNMASK: self._secrets,
        }
        stage = str(asked[Key.STAGE])
        try:
            said = reply.content.config_records[RECORD_KEY_CONFIGS]
            fits = stages[stage](node, asked, said)
            if stage == Stage.COLLECT_MASKED_VECTORS:
                note_from(reply.content.config_records["fitres.metrics"]["note"])
        except Exception as error:  # whatever it holds instead
            return one_line(f"what it says in the stage {stage} cannot be read: {type(error).__name__} {error}")
        return None if fits else f"what it says in the stage {stage} is not what it was asked for"

    def _keys(self, node: int, asked: Mapping[str, Any], said: Mapping[str, Any]) -> bool:
        """Two public keys."""
        return all(bytes_to_public_key(said[name]) is not None for name in (Key.PUBLIC_KEY_1, Key.PUBLIC_KEY_2))

    def _shares(self, node: int, asked: Mapping[str, Any], said: Mapping[str, Any]) -> bool:
        """Encrypted shares, one for each other site; whether they can be opened only those can say."""
        others = sorted(int(name) for name in asked if name not in (Key.STAGE, str(node)))
        return sorted(said[Key.DESTINATION_LIST]) == others and _all_bytes(said[Key.CIPHERTEXT_LIST], len(others))

    def _masked(self, node: int, asked: Mapping[str, Any], said: Mapping[str, Any]) -> bool:
        """Vectors as long as those that were sent."""
        parts = said[Key.MASKED_PARAMETERS]
        if len(parts) != len(self.shapes):
            return False
        arrays = (read_array(part) for part in parts)
        return all(
            (array.shape, array.dtype) == (shape, np.dtype(np.int64))
            for array, shape in zip(arrays, self.shapes, strict=True)
        )

    def _secrets(self, node: int, asked: Mapping[str, Any], said: Mapping[str, Any]) -> bool:
        """A share of the one secret of each site that is left, and of the other one of each that is lost."""
        wanted = [*asked[Key.ACTIVE_NODE_ID_LIST], *asked[Key.DEAD_NODE_ID_LIST]]
        return list(said[Key.NODE_ID_LIST]) == wanted and _all_bytes(said[Key.SHARE_LIST], len(wanted))


def _all_bytes(values: Sequence[Any], number: int) -> bool:
    return len(values) == number and all(isinstance(value, bytes) for value in values)
