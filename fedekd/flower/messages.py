"""What travels between the server and a site: tensors as one record of arrays, all else as one record of JSON."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, fields
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
from fedekd.methods import StateDict, Update

#: Names of the two records of a message. Flower's own mods want one of each kind.
STATE, NOTE = "state", "note"

#: What a site is asked. `train` alone carries tensors both ways, and is what mods of Flower work on.
HELLO, REFERENCE, SCORE, ABSORB, VISIT = (
    "query.hello",
    "query.reference",
    "query.score",
    "query.absorb",
    "train.visit",
)


def to_arrays(state: StateDict) -> ArrayRecord:
    """Tensors as Flower carries them: names, shapes, dtypes and bytes, and nothing that could be run."""
    return ArrayRecord({name: Array(tensor.detach().cpu().contiguous().numpy()) for name, tensor in state.items()})


def from_arrays(record: ArrayRecord) -> dict[str, torch.Tensor]:
    """The inverse of `to_arrays`.

    Raises:
        ValueError: If an array's bytes are not the array that they say they are.
    """
    return {name: torch.from_numpy(read_array(array.data)) for name, array in record.items()}


def read_array(content: bytes) -> npt.NDArray[Any]:
    """An array from the bytes of an .npy file, once they are known to be as many as its header says.

    Raises:
        ValueError: If they are not, are no such file, or hold objects, which would have to be run.
    """
    buffer = io.BytesIO(content)
    try:
        version = npy.read_magic(buffer)
        read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, fortran, dtype = read(buffer)
    except Exception as error:  # a header is parsed as Python's literals are, and may fail in as many ways
        raise ValueError(f"an array with an unreadable header: {type(error).__name__}") from error
    start = buffer.tell()
    if dtype.kind not in "biuf":  # objects would have to be run, and elements of no bytes fit any shape
        raise ValueError(f"an array of {dtype}")
    if math.prod(shape) * dtype.itemsize != len(content) - start:
        raise ValueError(f"an array of shape {shape}, {dtype}, in {len(content) - start} bytes")
    # A copy: what came over a wire may not be written to.
    return np.array(np.ndarray(shape, dtype, content, start, order="F" if fortran else "C"))


def num_bytes(record: ArrayRecord) -> int:
    """Bytes of a record's arrays, before they are unpacked."""
    return sum(len(array.data) for array in record.values())


def packed(note: Mapping[str, Any], state: StateDict | None = None) -> RecordDict:
    """The content of a message."""
    content = RecordDict({NOTE: ConfigRecord({"json": json.dumps(note)})})
    if state is not None:
        content[STATE] = to_arrays(state)
    return content


def note_of(message: Message) -> dict[str, Any]:
    """What a message says beside its tensors.

    Raises:
        UserError: If it says nothing that can be read.
    """
    try:
        return note_from(str(message.content.config_records[NOTE]["json"]))
    except KeyError as error:
        raise UserError(f"a message without a readable note: {type(error).__name__} {error}") from error


def note_from(text: str) -> dict[str, Any]:
    """What a note says.

    Raises:
        UserError: If it is no JSON object.
    """
    try:
        note: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"a message without a readable note: {type(error).__name__} {error}") from error
    if not isinstance(note, dict):
        raise UserError("a message whose note is no JSON object")
    return note


def state_of(message: Message) -> ArrayRecord:
    """The tensors of a message; none if it carries none."""
    return message.content.array_records.get(STATE, ArrayRecord({}))


def reason_of(reply: Message) -> str:
    """Of an error the last line, which is the error itself where it has a trace."""
    lines = [line.strip() for line in str(reply.error.reason or "").splitlines() if line.strip()]
    return lines[-1][:500] if lines else "it does not say why"


def one_line(text: str) -> str:
    """What a site has said, fit for a line of a log."""
    return " ".join(text.split())[:500]


def look_to_json(look: ComparisonRequest | None) -> dict[str, Any] | None:
    """What a client is to compare, as JSON."""
    if look is None:
        return None
    return {"rule": asdict(look.rule), "rounds": {str(number): rounds for number, rounds in look.rounds.items()}}


def look_from_json(values: Mapping[str, Any] | None) -> ComparisonRequest | None:
    """The inverse of `look_to_json`."""
    if values is None:
        return None
    return ComparisonRequest(
        DoNoHarm(**values["rule"]), {int(number): rounds for number, rounds in values["rounds"].items()}
    )


def visit_to_json(visit: ClientResult) -> dict[str, Any]:
    """All of a visit but the tensors of its update."""
    samples = None if visit.update is None else visit.update.num_samples
    return {**{name: value for name, value in asdict(visit).items() if name != "update"}, "num_samples": samples}


def visit_from_json(values: Mapping[str, Any], state: StateDict) -> ClientResult:
    """The inverse of `visit_to_json`, with the tensors.

    Raises:
        UserError: If it is not what a visit looks like.
    """
    try:
        _require_kinds(values)
        rest = {name: value for name, value in values.items() if name != "num_samples"}
        parts: dict[str, Any] = {"tradeoff": ExitTradeoff, "comparison": Comparison}
        rest |= {name: part(**rest[name]) for name, part in parts.items() if rest.get(name) is not None}
        samples = values["num_samples"]
        update = None if samples is None else Update(int(rest["client"]), state, int(samples))
        return ClientResult(**rest, update=update)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"an answer that is no visit: {type(error).__name__} {error}") from error


def scores_of(message: Message, rounds: int) -> list[float]:
    """Local's scores, one a round.

    Raises:
        UserError: If they are something else.
    """
    scores = note_of(message).get("scores")
    if not isinstance(scores, list) or len(scores) < rounds or not all(map(is_number, scores)):
        raise UserError(f"its scores of Local are {str(scores)[:80]}, and {rounds} numbers are needed")
    return [float(score) for score in scores]


def _require_kinds(values: Mapping[str, Any]) -> None:
    """Hold what a site says of its visit to what a row of metrics can take.

    Raises:
        ValueError: Naming what is of another kind.
    """
    samples = values["num_samples"]
    sound = {
        "client": is_count(values["client"]),
        "score": is_number(values["score"]),
        "supervised_rounds": is_count(values["supervised_rounds"]),
        "logs": isinstance(values["logs"], dict) and all(map(is_number, values["logs"].values())),
        "num_samples": samples is None or is_count(samples),
        "tradeoff": values.get("tradeoff") is None or _is_tradeoff(values["tradeoff"]),
        "comparison": values.get("comparison") is None or _is_comparison(values["comparison"]),
    }
    if wrong := [name for name, fits in sound.items() if not fits]:
        raise ValueError(f"its {wrong[0]} is {str(values[wrong[0]])[:80]!r}")


def is_number(value: Any) -> bool:
    """Whether it is a number that a float can hold."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return isinstance(value, float) or abs(value) < 2**53


def is_count(value: Any) -> bool:
    """Whether it is a whole number from 0 to 2^53."""
    return isinstance(value, int) and is_number(value) and value >= 0


def _is_tradeoff(value: Any) -> bool:
    """Lists of (cost, accuracy), and of (budget, cost, accuracy), as `ExitTradeoff` has them."""
    lengths = {"exits": 2, "budgets": 3}
    return (
        isinstance(value, dict)
        and value.keys() == lengths.keys()
        and all(
            isinstance(value[name], list)
            and all(isinstance(p, list) and len(p) == length and all(map(is_number, p)) for p in value[name])
            for name, length in lengths.items()
        )
    )


def _is_comparison(value: Any) -> bool:
    """The fields of `Comparison`."""
    names = {field.name for field in fields(Comparison)}
    if not isinstance(value, dict) or value.keys() != names or value["deployed"] not in ("federated", "local"):
        return False
    counts = ("samples", "worse", "better")
    return all(is_count(value[n]) for n in counts) and all(is_number(value[n]) for n in names - {"deployed", *counts})
