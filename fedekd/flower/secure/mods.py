"""Mods of a site before and after Flower's SecAgg+ mod."""

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
from fedekd.flower.messages import ROUND, arrays_of, error_reason, from_arrays, pack, values_of
from fedekd.flower.secure.aggregation import MIN_SITES, MODULUS, STEPS, SecureAggregation
from fedekd.flower.site_errors import SiteError

App = Callable[[Message, Context], Message]


def require_protocol(message: Message, context: Context, call_next: App) -> Message:
    """Refuse requests that would reveal this site's update; a mod before Flower's.

    Raises:
        SiteError: The message is not part of SecAgg+; half of the sites or fewer could unmask; the masks do not cover
            the update; or both secrets of a site are requested.
    """
    # "train.default" reaches this mod too, and Flower's mod passes it on unmasked.
    if message.metadata.message_type != MessageType.TRAIN:
        raise SiteError(f"secure: message type {message.metadata.message_type!r} is not part of secure aggregation")
    request = message.content.config_records.get(RECORD_KEY_CONFIGS, {})
    if request.get(Key.STAGE) == Stage.SETUP:
        _require_safe_setup(request)
    elif request.get(Key.STAGE) == Stage.UNMASK:
        active, lost = request.get(Key.ACTIVE_NODE_ID_LIST, []), request.get(Key.DEAD_NODE_ID_LIST, [])
        if len({*active, *lost}) < len(active) + len(lost):  # Flower checks the counts only
            raise SiteError(
                "secure: a site is listed twice in stage unmask; both of its secrets would reveal its update"
            )
    return call_next(message, context)


def _require_safe_setup(request: Mapping[str, Any]) -> None:
    sites, threshold = request.get(Key.SAMPLE_NUMBER), request.get(Key.THRESHOLD)
    is_safe = isinstance(sites, int) and isinstance(threshold, int) and threshold >= MIN_SITES and 2 * threshold > sites
    if not is_safe:
        raise SiteError(
            f"secure: expected an unmask threshold of at least {MIN_SITES} and more than half of {sites} sites,"
            f" got {threshold}"
        )
    for name, expected in {
        Key.SHARE_NUMBER: sites,
        Key.TARGET_RANGE: STEPS,
        Key.MOD_RANGE: MODULUS,
        Key.MAX_WEIGHT: 1.0,
    }.items():
        if request.get(name) != expected:
            raise SiteError(f"secure: {name}: expected {expected}, got {request.get(name)!r}")
    SecureAggregation(float(request.get(Key.CLIPPING_RANGE, 0.0)))


def to_client_result(message: Message, context: Context, call_next: App) -> Message:
    """Convert Flower's fit messages to rounds and back; a mod after Flower's.

    The request becomes a message of type `ROUND`; of the result, the quantized change of the weights is masked.

    Raises:
        SiteError: The round fails, or the update cannot be quantized: an invalid part of the sum is not traceable.
    """
    request = recorddict_to_fitins(message.content, keep_input=True)
    names, arrays = json.loads(str(request.config["names"])), parameters_to_ndarrays(request.parameters)
    received = {name: torch.from_numpy(np.array(array)) for name, array in zip(names, arrays, strict=True)}
    content = pack(json.loads(str(request.config["values"])), received)
    reply = call_next(Message(content, message.metadata.dst_node_id, ROUND), context)
    if reply.has_error():
        raise SiteError(error_reason(reply))  # Flower's mod does not check for errors
    secure = SecureAggregation(float(str(request.config["max_change"])))
    try:
        changes = ndarrays_to_parameters(secure.quantize(from_arrays(arrays_of(reply)), received))
    except UserError as error:  # names a tensor of the model, which the server has too
        raise SiteError(str(error)) from error
    # One example per site, whatever its number of samples: the mean is uniform.
    result = FitRes(Status(Code.OK, ""), changes, 1, {"values": json.dumps(values_of(reply))})
    return Message(fitres_to_recorddict(result, keep_input=True), reply_to=message)
