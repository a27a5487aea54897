"""What travels between the server and a site: tensors as one record of arrays, all else as one record of JSON."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from numpy.lib import format as npy

from fedekd.certificates import Comparison, DoNoHarm
from fedekd.errors import UserError
from fedekd.federation.engine import Look, Visit
from fedekd.federation.exit_tradeoff import ExitTradeoff
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
    return {name: torch.from_numpy(_array(array.data)) for name, array in record.items()}


def _array(content: bytes) -> npt.NDArray[Any]:
    """An array from the bytes of an .npy file, once they are known to be as many as its header says.

    Raises:
        ValueError: If they are not, are no such file, or hold objects, which would have to be run.
    """
    buffer = io.BytesIO(content)
    version = npy.read_magic(buffer)
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, fortran, dtype = read(buffer)
    start = buffer.tell()
    if dtype.hasobject:
        raise ValueError("an array of objects")
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
        note: Any = json.loads(str(message.content.config_records[NOTE]["json"]))
    except (KeyError, ValueError) as error:
        raise UserError(f"a message without a readable note: {type(error).__name__} {error}") from error
    if not isinstance(note, dict):
        raise UserError("a message whose note is no JSON object")
    return note


def state_of(message: Message) -> ArrayRecord:
    """The tensors of a message; none if it carries none."""
    return message.content.array_records.get(STATE, ArrayRecord({}))


def look_to_json(look: Look | None) -> dict[str, Any] | None:
    """What a client is to compare, as JSON."""
    if look is None:
        return None
    return {"rule": asdict(look.rule), "rounds": {str(number): rounds for number, rounds in look.rounds.items()}}


def look_from_json(values: Mapping[str, Any] | None) -> Look | None:
    """The inverse of `look_to_json`."""
    if values is None:
        return None
    return Look(DoNoHarm(**values["rule"]), {int(number): rounds for number, rounds in values["rounds"].items()})


def visit_to_json(visit: Visit) -> dict[str, Any]:
    """All of a visit but the tensors of its update."""
    samples = None if visit.update is None else visit.update.num_samples
    return {**{name: value for name, value in asdict(visit).items() if name != "update"}, "num_samples": samples}


def visit_from_json(values: Mapping[str, Any], state: StateDict) -> Visit:
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
        return Visit(**rest, update=update)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"an answer that is no visit: {type(error).__name__} {error}") from error


def _require_kinds(values: Mapping[str, Any]) -> None:
    """Hold what a site says of its visit to what a row of metrics can take.

    Raises:
        ValueError: Naming what is of another kind.
    """

    def number(value: Any, kind: type | tuple[type, ...] = (int, float)) -> bool:
        return isinstance(value, kind) and not isinstance(value, bool)

    samples, tradeoff = values["num_samples"], values.get("tradeoff")
    sound = {
        "score": number(values["score"]),
        "supervised_rounds": number(values["supervised_rounds"], int),
        "logs": isinstance(values["logs"], dict) and all(map(number, values["logs"].values())),
        "num_samples": samples is None or (number(samples, int) and samples >= 0),
        "tradeoff": tradeoff is None
        or all(
            isinstance(lines, list) and all(isinstance(line, list) and all(map(number, line)) for line in lines)
            for lines in tradeoff.values()
        ),
    }
    if wrong := [name for name, fits in sound.items() if not fits]:
        raise ValueError(f"its {wrong[0]} is {str(values[wrong[0]])[:80]!r}")
