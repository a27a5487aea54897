"""What a site puts around Flower's mod for secure aggregation: what it agrees to, and what it lets be masked."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from flwr.app import Context, Message
from flwr.app.message_type import MessageType
from flwr.common import Code, FitRes, Status, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS, Key, Stage
from flwr.compat.common.recorddict_compat import fitres_to_recorddict, recorddict_to_fitins

from fedekd.errors import UserError
from fedekd.flower.messages import VISIT, from_arrays, note_of, packed, reason_of, state_of
from fedekd.flower.secure import LEAST, MODULUS, STEPS, SecureAggregation

App = Callable[[Message, Context], Message]


def require_protocol(message: Message, context: Context, call_next: App) -> Message:
    """A mod, before Flower's: a site takes part only in sums of which nobody can take one part out again.

    Raises:
        UserError: If fewer than half of the sites, or of three, could unmask the sum; if the masks do not cover what
            is masked; or if both secrets of a site are asked for.
    """
    if (
        message.metadata.message_type != MessageType.TRAIN
    ):  # "train.default" comes here too, and Flower's mod lets it by
        raise UserError(f"a message of type {message.metadata.message_type!r} is no part of secure aggregation")
    told = message.content.config_records.get(RECORD_KEY_CONFIGS, {})
    if told.get(Key.STAGE) == Stage.SETUP:
        _require_cover(told)
    elif told.get(Key.STAGE) == Stage.UNMASK:
        left, lost = told.get(Key.ACTIVE_NODE_ID_LIST, []), told.get(Key.DEAD_NODE_ID_LIST, [])
        if len({*left, *lost}) < len(left) + len(lost):  # Flower counts them, and does not look at who they are
            raise UserError("a site is named twice in the stage unmask: with both of its secrets it would be unmasked")
    return call_next(message, context)


def _require_cover(told: Mapping[str, Any]) -> None:
    sites, needed = told.get(Key.SAMPLE_NUMBER), told.get(Key.THRESHOLD)
    if not (isinstance(sites, int) and isinstance(needed, int) and needed >= LEAST and 2 * needed > sites):
        raise UserError(f"{needed} of {sites} sites are to unmask the sum: more than half must, and {LEAST} at least")
    for name, value in {
        Key.SHARE_NUMBER: sites,
        Key.TARGET_RANGE: STEPS,
        Key.MOD_RANGE: MODULUS,
        Key.MAX_WEIGHT: 1.0,
    }.items():
        if told.get(name) != value:
            raise UserError(f"secure aggregation with {name} {told.get(name)!r}, and it must be {value}")
    SecureAggregation(float(told.get(Key.CLIPPING_RANGE, 0.0)))


def to_client_result(message: Message, context: Context, call_next: App) -> Message:
    """A mod, after Flower's: what it hands on becomes a visit, and the visit's update the changes that it masks.

    Raises:
        UserError: If the visit fails, or its update cannot be carried: a site must not spoil a sum in which nobody
            finds its part again.
    """
    asked = recorddict_to_fitins(message.content, keep_input=True)
    names, values = json.loads(str(asked.config["names"])), parameters_to_ndarrays(asked.parameters)
    sent = {name: torch.from_numpy(np.array(value)) for name, value in zip(names, values, strict=True)}
    content = packed(json.loads(str(asked.config["note"])), sent)
    reply = call_next(Message(content, message.metadata.dst_node_id, VISIT), context)
    if reply.has_error():
        raise UserError(reason_of(reply))  # Flower's mod looks for no error
    carried = SecureAggregation(float(str(asked.config["largest_change"])))
    changes = ndarrays_to_parameters(carried.changes(from_arrays(state_of(reply)), sent))
    # Counted once, whatever its number of samples: the mean is uniform.
    answer = FitRes(Status(Code.OK, ""), changes, 1, {"note": json.dumps(note_of(reply))})
    return Message(fitres_to_recorddict(answer, keep_input=True), reply_to=message)
