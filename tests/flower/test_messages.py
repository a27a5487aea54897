"""What travels arrives as it was, and what cannot be read is told in one line."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch

pytest.importorskip("flwr")

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from fedekd.do_no_harm import Comparison, DoNoHarm
from fedekd.early_exit.client_tradeoff import ExitTradeoff
from fedekd.errors import UserError
from fedekd.federation import ClientResult
from fedekd.federation.engines.base import ComparisonRequest
from fedekd.flower.messages import (
    NOTE,
    STATE,
    VISIT,
    from_arrays,
    look_from_json,
    look_to_json,
    note_of,
    num_bytes,
    packed,
    state_of,
    to_arrays,
    visit_from_json,
    visit_to_json,
)
from fedekd.methods import Update

from .conftest import carried

pytestmark = pytest.mark.flower

EXTREMES = torch.tensor([0.0, -0.0, 1e-45, -3e38, math.inf, -math.inf, math.nan, 0.1])
TENSORS = {
    "float32": EXTREMES,
    "float64": EXTREMES.double() / 3,
    "float16": torch.tensor([1.0, 6e-8], dtype=torch.float16),
    "int64": torch.tensor([2**63 - 1, -(2**63), 0]),
    "uint8": torch.arange(256, dtype=torch.uint8),
    "bool": torch.tensor([True, False]),
    "0-dim": torch.tensor(7),
    "0-dim float": torch.tensor(0.1),
    "empty": torch.empty(0),
    "empty, with a shape": torch.empty(3, 0, 2, dtype=torch.int64),
    "channels last": torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last),
    "transposed": torch.randn(3, 4).t(),
    "every other": torch.arange(10)[::2],
    "learned": torch.nn.Parameter(torch.randn(2)),
}


def bits(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.dtype, tuple(tensor.shape), tensor.detach().contiguous().numpy().tobytes()


def message(content: RecordDict) -> Message:
    return carried(Message(content, 5, VISIT))


def test_tensors_arrive_bit_for_bit() -> None:
    arrived = from_arrays(state_of(message(packed({}, TENSORS))))
    assert list(arrived) == list(TENSORS)
    assert {name: bits(tensor) for name, tensor in arrived.items()} == {n: bits(t) for n, t in TENSORS.items()}


def test_what_has_arrived_is_the_receivers_own() -> None:
    record = to_arrays({"weight": torch.zeros(3)})
    first, second = from_arrays(record)["weight"], from_arrays(record)["weight"]
    first.add_(1)  # a view of the bytes could not be written to
    assert second.tolist() == [0, 0, 0]


def test_sending_copies_and_keeps_no_history() -> None:
    weight = torch.nn.Parameter(torch.zeros(3))
    record = to_arrays({"weight": weight * 1})
    with torch.no_grad():
        weight.add_(1)
    assert from_arrays(record)["weight"].tolist() == [0, 0, 0]


def test_bytes_are_counted_before_anything_is_unpacked() -> None:
    record = to_arrays({"a": torch.zeros(1000), "b": torch.zeros(10, dtype=torch.int64)})
    assert 4080 <= num_bytes(record) <= 4080 + 2 * 200  # names, shapes and dtypes in each array's own header
    junk = ArrayRecord({"a": Array("float32", (1,), "numpy.ndarray", b"x" * 77), "b": Array("?", (), "?", b"y" * 5)})
    assert num_bytes(junk) == 82
    assert num_bytes(ArrayRecord({})) == 0


def npy(header: str, body: bytes = b"") -> bytes:
    """An array's bytes with a header of one's own."""
    padded = header.ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(padded).to_bytes(2, "little") + padded.encode() + body


NO_ARRAYS = {
    "cut": to_arrays({"a": torch.zeros(3)})["a"].data[:-1],
    "pickled": npy("{'descr': '|O', 'fortran_order': False, 'shape': (1,)}", b"\x80\x04K\x01...."),
    "text": b"no array",
    "nothing": b"",
    "zip": b"PK\x03\x04 nor a zip",
    "huge": npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776,)}", b"1234"),
    "of no size": npy("{'descr': '|V0', 'fortran_order': False, 'shape': (1000,)}"),
    "deep": npy("-" * 9000 + "1"),
    "open": npy("(" * 9000),
}


@pytest.mark.parametrize("data", NO_ARRAYS.values(), ids=NO_ARRAYS)
def test_bytes_that_are_no_array_are_a_value_error(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        from_arrays(ArrayRecord({"a": Array("float32", (3,), "numpy.ndarray", data)}))


def test_a_note_and_no_tensors() -> None:
    found = message(packed({"round": 3, "score": math.nan, "look": None, "name": "Zürich"}))
    note = note_of(found)
    assert math.isnan(note.pop("score"))
    assert note == {"round": 3, "look": None, "name": "Zürich"}
    assert not found.content.array_records
    assert dict(state_of(found)) == {}
    assert list(message(packed({}, {})).content.array_records) == [STATE]  # mods of Flower want exactly one


@pytest.mark.parametrize(
    "content",
    [
        RecordDict({}),
        RecordDict({"other": ConfigRecord({"json": "{}"})}),
        RecordDict({NOTE: ConfigRecord({"text": "{}"})}),
        RecordDict({NOTE: ConfigRecord({"json": "{"})}),
        RecordDict({NOTE: ConfigRecord({"json": "{'a':\n1}"})}),
        RecordDict({NOTE: ConfigRecord({"json": b"\xff\xfe"})}),
        RecordDict({NOTE: ConfigRecord({"json": "[1, 2]"})}),
        RecordDict({NOTE: ConfigRecord({"json": "null"})}),
        RecordDict({NOTE: ConfigRecord({"json": 7})}),
        RecordDict({NOTE: to_arrays({"json": torch.zeros(1)})}),
    ],
)
def test_unreadable_notes_are_one_line(content: RecordDict) -> None:
    with pytest.raises(UserError) as caught:
        note_of(message(content))
    assert "note" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_look_there_and_back() -> None:
    look = ComparisonRequest(
        DoNoHarm(confidence=0.95, margin=0.01, looks=3, rule="better", clip=2.0), {0: 3, 2: 1, 11: 2}
    )
    assert look_from_json(json.loads(json.dumps(look_to_json(look)))) == look
    assert look_to_json(None) is None
    assert look_from_json(None) is None


BARE = ClientResult(2, 0.75, 3, {"loss": 0.1, "gate/weight_mean": 1 / 3}, None)
UPDATE = Update(2, {"w": torch.randn(2, 2)}, 17)
TRADEOFF = ExitTradeoff([[0.4, 0.7], [1.0, math.nan]], [[0.5, 0.45, 0.8]])
COMPARISON = Comparison("local", 20, 3, 2, -0.05, 0.8125, 0.1)


def told(visit: ClientResult) -> str:
    """All of a visit but its tensors, NaN as NaN."""
    return repr({**asdict(replace(visit, update=None)), "update": visit.update and visit.update.num_samples})


@pytest.mark.parametrize(
    "visit",
    [
        BARE,
        replace(BARE, score=math.nan, supervised_rounds=0, logs={}, update=UPDATE),
        replace(BARE, score=1e-300, logs={"loss": math.inf, "exit_1/accuracy": math.nan}),
        replace(BARE, tradeoff=TRADEOFF),
        replace(BARE, comparison=COMPARISON, update=UPDATE),
        replace(BARE, tradeoff=ExitTradeoff(), comparison=replace(COMPARISON, p_value=math.nan, level=math.nan)),
    ],
    ids=["bare", "first", "extreme", "exits", "compared", "both"],
)
def test_a_visit_there_and_back(visit: ClientResult) -> None:
    arrived = message(packed(visit_to_json(visit), None if visit.update is None else visit.update.state))
    assert "w" not in str(note_of(arrived).get("update"))
    found = visit_from_json(note_of(arrived), from_arrays(state_of(arrived)))
    assert told(found) == told(visit)
    assert type(found.tradeoff) is type(visit.tradeoff)
    assert type(found.comparison) is type(visit.comparison)
    if visit.update is None:
        assert found.update is None
    else:
        assert found.update is not None
        assert found.update.client == 2
        assert bits(found.update.state["w"]) == bits(visit.update.state["w"])


def lacking(name: str) -> dict[str, Any]:
    return {key: value for key, value in visit_to_json(BARE).items() if key != name}


@pytest.mark.parametrize(
    "note",
    [
        {},
        *(lacking(name) for name in ("client", "score", "supervised_rounds", "logs", "num_samples")),
        {**visit_to_json(BARE), "update": {"w": 1}},
        {**visit_to_json(BARE), "surprise": 1},
        {**visit_to_json(BARE), "num_samples": "many"},
        {**visit_to_json(BARE), "num_samples": 3, "client": "me"},
        {**visit_to_json(BARE), "tradeoff": {"exit": []}},
        {**visit_to_json(BARE), "comparison": [1]},
        {**visit_to_json(BARE), "comparison": {"deployed": "local"}},
    ],
)
def test_what_is_no_visit_is_one_line(note: Mapping[str, Any]) -> None:
    with pytest.raises(UserError, match="no visit") as caught:
        visit_from_json(note, {})
    assert "\n" not in str(caught.value)


def test_a_note_without_end_is_one_line() -> None:
    with pytest.raises(UserError, match="note"):
        note_of(message(RecordDict({NOTE: ConfigRecord({"json": "[" * 100_000})})))


JUNK = {"deployed": "x", "samples": "a", "worse": None, "better": 1, "gain": "b", "p_value": [], "level": 0}


@pytest.mark.parametrize(
    "said",
    [
        {"score": "0.9"},
        {"score": None},
        {"supervised_rounds": "3"},
        {"supervised_rounds": None},
        {"logs": None},
        {"logs": {"loss": "low"}},
        {"num_samples": -5},
        {"num_samples": math.inf},
        {"tradeoff": {"exits": 5}},
        {"tradeoff": [1]},
        {"tradeoff": {"exits": [[0.5]]}},
        {"client": 2.0},
        {"score": 10**400},
        {"comparison": JUNK},
    ],
    ids=lambda said: str(said)[:40],
)
def test_values_of_another_kind_are_no_visit(said: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="no visit"):
        visit_from_json({**visit_to_json(BARE), **said}, {})
