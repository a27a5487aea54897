"""Messages between server and site: one record of arrays, one record of JSON."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from numpy.lib import format as npy

from fedekd.do_no_harm.rule import Comparison, DoNoHarm
from fedekd.early_exit.client_tradeoff import ExitTradeoff
from fedekd.errors import UserError
from fedekd.federation.engines.base import ClientResult, ComparisonRequest
from fedekd.federation.update_validation import invalid_field, is_number, with_plain_logs
from fedekd.federation.wire import Dtypes
from fedekd.methods import ClientUpdate, StateDict

#: Names of the two records of a message. Flower's mods expect exactly one record of each kind.
STATE, VALUES = "state", "values"

#: Largest JSON text of a message in bytes, and its deepest nesting. A description has a few numbers per class.
_MAX_TEXT, _MAX_DEPTH = 2**20, 32

#: Message types. Only ROUND carries tensors in both directions; Flower's mods apply to it.
DESCRIBE, BASELINE, SCORE, LAST_ROUND, ROUND = (
    "query.describe",
    "query.baseline",
    "query.score",
    "query.last_round",
    "train.round",
)


def to_arrays(state: StateDict) -> ArrayRecord:
    """Convert tensors to Flower's arrays: names, shapes, dtypes and raw bytes."""
    return ArrayRecord({name: Array(tensor.detach().cpu().contiguous().numpy()) for name, tensor in state.items()})


def from_arrays(record: ArrayRecord) -> dict[str, torch.Tensor]:
    """Convert Flower's arrays to tensors; the inverse of `to_arrays`.

    Raises:
        ValueError: The bytes of an array are not a numeric .npy file of the declared size.
    """
    return {name: torch.from_numpy(read_array(array.data)) for name, array in record.items()}


def read_array(content: bytes) -> npt.NDArray[Any]:
    """Read a numeric .npy file from bytes, without pickle.

    The size is checked first, so that a false header cannot allocate memory.

    Raises:
        ValueError: The header is unreadable, the dtype is not numeric, or the size differs from the header's.
    """
    buffer = io.BytesIO(content)
    try:
        version = npy.read_magic(buffer)
        read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, fortran, dtype = read(buffer)
    except Exception as error:  # NumPy parses the header as a Python literal, which fails in many ways
        raise ValueError(f"array with an unreadable header: {type(error).__name__}") from error
    start = buffer.tell()
    if dtype.kind not in "biuf":  # object arrays execute code; elements of zero bytes fit any shape
        raise ValueError(f"array of unsupported dtype {dtype}")
    if math.prod(shape) * dtype.itemsize != len(content) - start:
        raise ValueError(f"array of shape {shape} and {dtype} in {len(content) - start} bytes")
    # Copy: received bytes are read-only.
    return np.array(np.ndarray(shape, dtype, content, start, order="F" if fortran else "C"))


def payload_bytes(record: ArrayRecord) -> int:
    """Bytes of a record's arrays with their headers, counted before unpacking."""
    return sum(len(array.data) for array in record.values())


def pack(values: Mapping[str, Any], state: StateDict | None = None) -> RecordDict:
    """Build the content of a message from JSON values and optional tensors."""
    content = RecordDict({VALUES: ConfigRecord({"json": json.dumps(values)})})
    if state is not None:
        content[STATE] = to_arrays(state)
    return content


def values_of(message: Message) -> dict[str, Any]:
    """Read the JSON values of a message.

    Raises:
        UserError: The record is missing or not a JSON object.
    """
    try:
        text = message.content.config_records[VALUES]["json"]
    except KeyError as error:
        raise UserError(f"message without JSON values: {type(error).__name__} {error}") from error
    return parse_values(text)


def parse_values(text: Any) -> dict[str, Any]:
    """Parse a JSON object that another machine sent.

    Raises:
        UserError: The text is not a JSON object, is too large or nested too deeply, or has a lone surrogate.
    """
    try:
        if not isinstance(text, str) or len(text.encode()) > _MAX_TEXT:
            size = f"{len(text):,} characters" if isinstance(text, str) else type(text).__name__
            raise ValueError(f"expected a text of at most {_MAX_TEXT:,} bytes, got {size}")
        values: Any = json.loads(text)
        _require_depth(values)
        if "\\u" in text:
            json.dumps(values, ensure_ascii=False).encode()  # no file and no logger can store a lone surrogate
    except (ValueError, RecursionError) as error:
        raise UserError(f"message with invalid JSON values: {type(error).__name__} {str(error)[:200]}") from error
    if not isinstance(values, dict):
        raise UserError(f"message values: expected a JSON object, got {type(values).__name__}")
    return values


def _require_depth(values: Any) -> None:
    """Check the nesting level by level.

    Raises:
        ValueError: If it is deeper than any message of fedekd.
    """
    level = [values]
    for _ in range(_MAX_DEPTH):
        containers = [item for item in level if isinstance(item, dict | list)]
        if not containers:
            return
        level = [child for item in containers for child in (item.values() if isinstance(item, dict) else item)]
    raise ValueError(f"nested more than {_MAX_DEPTH} levels deep")


def arrays_of(message: Message) -> ArrayRecord:
    """Return the arrays of a message; empty if it has none."""
    return message.content.array_records.get(STATE, ArrayRecord({}))


def error_reason(reply: Message) -> str:
    """Return the last line of an error reply: of a traceback, the exception itself."""
    lines = [line.strip() for line in str(reply.error.reason or "").splitlines() if line.strip()]
    return lines[-1][:500] if lines else "no reason given"


def comparison_request_to_json(request: ComparisonRequest | None) -> dict[str, Any] | None:
    """Convert a comparison request to JSON values."""
    if request is None:
        return None
    rounds = {str(client): count for client, count in request.rounds.items()}
    return {"rule": asdict(request.rule), "rounds": rounds, "splits": request.splits}


def comparison_request_from_json(values: Mapping[str, Any] | None) -> ComparisonRequest | None:
    """Convert JSON values to a comparison request."""
    if values is None:
        return None
    rounds = {int(client): count for client, count in values["rounds"].items()}
    return ComparisonRequest(DoNoHarm(**values["rule"]), rounds, tuple(values["splits"]))


def dtypes_to_json(dtypes: Dtypes, state: StateDict) -> dict[str, Any]:
    """Convert the dtypes of a message's converted tensors to JSON values.

    A message without converted tensors has no such value.
    """
    names = {name: str(dtype).removeprefix("torch.") for name, dtype in dtypes.items() if name in state}
    return {"dtypes": names} if names else {}


def dtypes_from_json(names: Mapping[str, str]) -> dict[str, torch.dtype]:
    """Convert JSON values to dtypes of converted tensors.

    Raises:
        UserError: A dtype is not one that is converted for transport.
    """
    known = {"float32": torch.float32, "float64": torch.float64}
    if unknown := [dtype for dtype in names.values() if dtype not in known]:
        raise UserError(f"dtypes: expected float32 or float64, got {str(unknown[0])[:60]!r}")
    return {name: known[dtype] for name, dtype in names.items()}


def client_result_to_json(result: ClientResult) -> dict[str, Any]:
    """Convert a client's result to JSON values, without the tensors of its update."""
    result = with_plain_logs(result)
    num_samples = None if result.update is None else result.update.num_samples
    return {**{name: value for name, value in asdict(result).items() if name != "update"}, "num_samples": num_samples}


def client_result_from_json(values: Mapping[str, Any], state: StateDict) -> ClientResult:
    """Build a client's result from JSON values and the tensors of its update.

    Raises:
        UserError: A field is missing, unknown or of the wrong type.
    """
    try:
        arguments = {name: value for name, value in values.items() if name != "num_samples"}
        nested: dict[str, Any] = {"tradeoff": ExitTradeoff, "comparison": Comparison}
        arguments |= {name: cls(**arguments[name]) for name, cls in nested.items() if arguments.get(name) is not None}
        num_samples = values["num_samples"]
        arguments["metrics"]  # required of a site
        update = None if num_samples is None else ClientUpdate(arguments["client"], state, num_samples)
        result = ClientResult(**arguments, update=update)
        if reason := invalid_field(result):
            raise ValueError(reason)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"invalid client result: {type(error).__name__} {str(error)[:200]}") from error
    return result


def by_key(metrics: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    """Return metrics per round as one list per key, which is shorter as JSON."""
    return {key: [values[key] for values in metrics] for key in (metrics[0] if metrics else ())}


def reference_choice(message: Message) -> dict[str, float]:
    """Read what a reference has chosen, such as its learning rate.

    Raises:
        UserError: It is not numbers by name.
    """
    choice = values_of(message).get("choice", {})
    if (
        not isinstance(choice, dict)
        or not choice.keys() <= {"lr", "epochs"}
        or not all(map(is_number, choice.values()))
    ):
        raise UserError(f"reference: expected lr and epochs, got {str(choice)[:60]}")
    return {name: float(value) for name, value in choice.items()}


def baseline_metrics(message: Message, rounds: int) -> list[dict[str, float]]:
    """Read the local baseline's metrics of each round, and leave out later ones.

    Raises:
        UserError: They are not numbers, or fewer than the rounds.
    """
    metrics = values_of(message).get("metrics")
    if not isinstance(metrics, dict) or not metrics:
        raise UserError(f"local baseline: expected metrics by name, got {str(metrics)[:60]}")
    for key, values in metrics.items():
        if not isinstance(values, list) or len(values) < rounds or not all(map(is_number, values)):
            raise UserError(f"local baseline: {key[:60]}: expected {rounds} numbers, got {str(values)[:60]}")
    return [{key: float(values[index]) for key, values in metrics.items()} for index in range(rounds)]
