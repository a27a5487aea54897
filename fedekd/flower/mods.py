"""What a site adds to Flower's mod for secure aggregation: what it agrees to, and what it lets be masked."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from flwr.app import Context, Message
from flwr.common import Code, FitRes, Status, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS, Key, Stage
from flwr.compat.common.recorddict_compat import fitres_to_recorddict, recorddict_to_fitins

from fedekd.errors import UserError
from fedekd.flower.messages import VISIT, from_arrays, note_of, packed, state_of
from fedekd.flower.secure import LEAST, SecureAggregation
from fedekd.methods import StateDict

App = Callable[[Message, Context], Message]


def require_threshold(message: Message, context: Context, call_next: App) -> Message:
    """A mod, before Flower's: a site takes part only where more than half of the sites must agree to unmask.

    Raises:
        UserError: If fewer are said to be enough.
    """
    told = message.content.config_records.get(RECORD_KEY_CONFIGS, {})
    if told.get(Key.STAGE) == Stage.SETUP:
        needed, sites = int(str(told[Key.THRESHOLD])), int(str(told[Key.SAMPLE_NUMBER]))
        if sites < LEAST or not 2 * needed > sites:
            raise UserError(
                f"{needed} of {sites} sites are said to be enough to unmask; more than half of 3 or more are"
            )
    return call_next(message, context)


def as_visit(message: Message, context: Context, call_next: App) -> Message:
    """A mod, after Flower's: what it hands on becomes a visit, and the visit's update the changes that it masks.

    Raises:
        UserError: If the update is not like what was sent, is not finite, or changes a weight by more than can be
            carried: a site must not spoil a sum in which nobody finds its part again.
    """
    asked = recorddict_to_fitins(message.content, keep_input=True)
    names, values = json.loads(str(asked.config["names"])), parameters_to_ndarrays(asked.parameters)
    sent = {name: torch.from_numpy(np.array(value)) for name, value in zip(names, values, strict=True)}
    content = packed(json.loads(str(asked.config["note"])), sent)
    inner = Message(content, message.metadata.dst_node_id, VISIT)
    reply = call_next(inner, context)
    if reply.has_error():
        return Message(reply.error, reply_to=message)
    changes = _changes(from_arrays(state_of(reply)), sent, float(str(asked.config["range"])))
    # Counted once, whatever its number of samples: the mean is uniform.
    answer = FitRes(Status(Code.OK, ""), ndarrays_to_parameters(changes), 1, {"note": json.dumps(note_of(reply))})
    return Message(fitres_to_recorddict(answer, keep_input=True), reply_to=message)


def _changes(update: StateDict, sent: StateDict, range: float) -> list[Any]:
    """By how much each weight is to change, on the grid: what Flower would round at random is whole already."""
    if update.keys() != sent.keys():
        raise UserError(f"the update has other names: {', '.join(sorted(update.keys() ^ sent.keys()))[:200]}")
    step = SecureAggregation(range).resolution
    found = []
    for name, before in sent.items():
        change = update[name].double() - before.double()
        largest = float(change.abs().max()) if change.numel() else 0.0
        if not largest <= range - step:  # nor if it is NaN
            raise UserError(
                f"{name!r} changes by {largest:.4g}, and secure aggregation carries {range:g} (secure_range)"
            )
        found.append((torch.round(change / step) * step).reshape(-1).numpy())  # Flower sums no array without axes
    return found
