"""Mod of a site that converts the dtypes of messages."""

from __future__ import annotations

from collections.abc import Callable

from flwr.app import Context, Message

from fedekd.federation.wire import from_wire, state_to_wire
from fedekd.flower.messages import arrays_of, dtypes_from_json, from_arrays, pack, values_of

App = Callable[[Message, Context], Message]


def convert_dtypes(message: Message, context: Context, call_next: App) -> Message:
    """Convert tensors from and to their transport dtypes; runs before users' mods.

    Mods after it get the dtypes of the models: the noise of differential privacy is added before the rounding, which is
    then post-processing.
    """
    values = values_of(message)
    dtypes = dtypes_from_json(values.pop("dtypes", {}))
    if not dtypes:
        return call_next(message, context)
    message.content = pack(values, from_wire(from_arrays(arrays_of(message)), dtypes))
    reply = call_next(message, context)
    if not reply.has_error():
        reply.content = pack(values_of(reply), state_to_wire(from_arrays(arrays_of(reply)), dtypes))
    return reply
