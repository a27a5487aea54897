"""Messages arrive unchanged, and unreadable content raises a one-line error."""

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
    ROUND,
    STATE,
    VALUES,
    arrays_of,
    baseline_metrics,
    by_key,
    client_result_from_json,
    client_result_to_json,
    comparison_request_from_json,
    comparison_request_to_json,
    dtypes_from_json,
    dtypes_to_json,
    from_arrays,
    pack,
    payload_bytes,
    to_arrays,
    values_of,
)
from fedekd.methods import ClientUpdate

from .conftest import over_wire

pytestmark = pytest.mark.flower

EXTREMES = torch.tensor([0.0, -0.0, 1e-45, -3e38, math.inf, -math.inf, math.nan, 0.1])
TENSORS = {
    "float32": EXTREMES,
    "float64": EXTREMES.double() / 3,
    "float16": torch.tensor([1.0, 6e-8], dtype=torch.float16),
    "int64": torch.tensor([2**63 - 1, -(2**63), 0]),
    "uint8": torch.arange(256, dtype=torch.uint8),
    "bool": torch.tensor([True, False]),
    "0-d int": torch.tensor(7),
    "0-d float": torch.tensor(0.1),
    "empty": torch.empty(0),
    "empty with a shape": torch.empty(3, 0, 2, dtype=torch.int64),
    "channels last": torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last),
    "transposed": torch.randn(3, 4).t(),
    "strided": torch.arange(10)[::2],
    "parameter": torch.nn.Parameter(torch.randn(2)),
}


def bits(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.dtype, tuple(tensor.shape), tensor.detach().contiguous().numpy().tobytes()


def receive(content: RecordDict) -> Message:
    return over_wire(Message(content, 5, ROUND))


def test_arrays_over_wire_are_bitwise_equal() -> None:
    received = from_arrays(arrays_of(receive(pack({}, TENSORS))))
    assert list(received) == list(TENSORS)
    assert {name: bits(tensor) for name, tensor in received.items()} == {n: bits(t) for n, t in TENSORS.items()}


def test_from_arrays_result_is_writable_and_independent() -> None:
    record = to_arrays({"weight": torch.zeros(3)})
    first, second = from_arrays(record)["weight"], from_arrays(record)["weight"]
    first.add_(1)
    assert second.tolist() == [0, 0, 0]


def test_to_arrays_parameter_is_copied_and_detached() -> None:
    weight = torch.nn.Parameter(torch.zeros(3))
    record = to_arrays({"weight": weight * 1})
    with torch.no_grad():
        weight.add_(1)
    assert from_arrays(record)["weight"].tolist() == [0, 0, 0]


def test_payload_bytes_counts_without_unpacking() -> None:
    record = to_arrays({"a": torch.zeros(1000), "b": torch.zeros(10, dtype=torch.int64)})
    assert 4080 <= payload_bytes(record) <= 4080 + 2 * 200  # each array has a header
    junk = ArrayRecord({"a": Array("float32", (1,), "numpy.ndarray", b"x" * 77), "b": Array("?", (), "?", b"y" * 5)})
    assert payload_bytes(junk) == 82
    assert payload_bytes(ArrayRecord({})) == 0


def npy(header: str, body: bytes = b"") -> bytes:
    """An .npy file with a given header."""
    padded = header.ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(padded).to_bytes(2, "little") + padded.encode() + body


INVALID_ARRAYS = {
    "truncated": to_arrays({"a": torch.zeros(3)})["a"].data[:-1],
    "pickled": npy("{'descr': '|O', 'fortran_order': False, 'shape': (1,)}", b"\x80\x04K\x01...."),
    "text": b"no array",
    "no bytes": b"",
    "zip": b"PK\x03\x04 and more",
    "shape of 4 TiB": npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776,)}", b"1234"),
    "elements of 0 bytes": npy("{'descr': '|V0', 'fortran_order': False, 'shape': (1000,)}"),
    "deep header": npy("-" * 9000 + "1"),
    "unclosed header": npy("(" * 9000),
}


@pytest.mark.parametrize("data", INVALID_ARRAYS.values(), ids=INVALID_ARRAYS)
def test_from_arrays_invalid_bytes_raise_value_error(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        from_arrays(ArrayRecord({"a": Array("float32", (3,), "numpy.ndarray", data)}))


def test_values_without_tensors_arrive_unchanged() -> None:
    message = receive(pack({"round": 3, "score": math.nan, "comparison": None, "name": "Zürich"}))
    values = values_of(message)
    assert math.isnan(values.pop("score"))
    assert values == {"round": 3, "comparison": None, "name": "Zürich"}
    assert not message.content.array_records
    assert dict(arrays_of(message)) == {}
    assert list(receive(pack({}, {})).content.array_records) == [STATE]  # Flower's mods expect exactly one


@pytest.mark.parametrize(
    "content",
    [
        RecordDict({}),
        RecordDict({"other": ConfigRecord({"json": "{}"})}),
        RecordDict({VALUES: ConfigRecord({"text": "{}"})}),
        RecordDict({VALUES: ConfigRecord({"json": "{"})}),
        RecordDict({VALUES: ConfigRecord({"json": "{'a':\n1}"})}),
        RecordDict({VALUES: ConfigRecord({"json": b"\xff\xfe"})}),
        RecordDict({VALUES: ConfigRecord({"json": "[1, 2]"})}),
        RecordDict({VALUES: ConfigRecord({"json": "null"})}),
        RecordDict({VALUES: ConfigRecord({"json": 7})}),
        RecordDict({VALUES: ConfigRecord({"json": "[" * 100_000})}),
        RecordDict({VALUES: ConfigRecord({"json": '{"logs": {"\\ud800": 1.0}}'})}),
        RecordDict({VALUES: ConfigRecord({"json": '{"a": "' + "x" * 2**20 + '"}'})}),
        RecordDict({VALUES: ConfigRecord({"json": '{"a": ' + "[" * 40 + "]" * 40 + "}"})}),
        RecordDict({VALUES: to_arrays({"json": torch.zeros(1)})}),
    ],
    ids=range(14),
)
def test_values_of_invalid_record_raises_one_line(content: RecordDict) -> None:
    with pytest.raises(UserError, match="JSON") as caught:
        values_of(receive(content))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_comparison_request_round_trip_is_equal() -> None:
    rule = DoNoHarm(confidence=0.95, margin=0.01, looks=3, rule="better", clip=2.0)
    request = ComparisonRequest(rule, {0: 3, 2: 1, 11: 2})
    assert comparison_request_from_json(json.loads(json.dumps(comparison_request_to_json(request)))) == request
    assert comparison_request_to_json(None) is None
    assert comparison_request_from_json(None) is None


RESULT = ClientResult(2, 0.75, 3, {"loss": 0.1, "gate/weight_mean": 1 / 3}, None)
UPDATE = ClientUpdate(2, {"w": torch.randn(2, 2)}, 17)
TRADEOFF = ExitTradeoff([[0.4, 0.7], [1.0, math.nan]], [[0.5, 0.45, 0.8]])
COMPARISON = Comparison("local", 20, 3, 2, -0.05, 0.8125, 0.1)


def text_of(result: ClientResult) -> str:
    """A result without tensors, as text, in which NaN equals NaN."""
    return repr({**asdict(replace(result, update=None)), "update": result.update and result.update.num_samples})


@pytest.mark.parametrize(
    "result",
    [
        RESULT,
        replace(RESULT, score=math.nan, supervised_rounds=0, logs={}, update=UPDATE),
        replace(RESULT, score=1e-300, logs={"loss": math.inf, "exit_1/accuracy": math.nan}),
        replace(RESULT, tradeoff=TRADEOFF),
        replace(RESULT, comparison=COMPARISON, update=UPDATE),
        replace(RESULT, tradeoff=ExitTradeoff(), comparison=replace(COMPARISON, p_value=math.nan, level=math.nan)),
    ],
    ids=["bare", "first round", "extreme values", "exits", "compared", "exits and compared"],
)
def test_client_result_round_trip_is_equal(result: ClientResult) -> None:
    message = receive(pack(client_result_to_json(result), None if result.update is None else result.update.state))
    assert "update" not in values_of(message)
    received = client_result_from_json(values_of(message), from_arrays(arrays_of(message)))
    assert text_of(received) == text_of(result)
    assert type(received.tradeoff) is type(result.tradeoff)
    assert type(received.comparison) is type(result.comparison)
    if result.update is None:
        assert received.update is None
    else:
        assert received.update is not None
        assert received.update.client == 2
        assert bits(received.update.state["w"]) == bits(result.update.state["w"])


VALID = client_result_to_json(RESULT)
REQUIRED = ("client", "score", "supervised_rounds", "logs", "metrics", "num_samples")
WRONG_TYPES = {"deployed": "x", "samples": "a", "worse": None, "better": 1, "gain": "b", "p_value": [], "level": 0}


@pytest.mark.parametrize(
    "values",
    [
        {},
        *({name: value for name, value in VALID.items() if name != missing} for missing in REQUIRED),
        {**VALID, "update": {"w": 1}},
        {**VALID, "surprise": 1},
        {**VALID, "num_samples": "many"},
        {**VALID, "num_samples": -5},
        {**VALID, "num_samples": math.inf},
        {**VALID, "num_samples": 3, "client": "me"},
        {**VALID, "client": 2.0},
        {**VALID, "score": "0.9"},
        {**VALID, "score": None},
        {**VALID, "score": 10**400},
        {**VALID, "supervised_rounds": "3"},
        {**VALID, "supervised_rounds": None},
        {**VALID, "logs": None},
        {**VALID, "logs": {"loss": "low"}},
        {**VALID, "logs": {"a b": 1.0}},
        {**VALID, "logs": {f"n{index}": 1.0 for index in range(200_000)}},
        {**VALID, "tradeoff": {"exit": []}},
        {**VALID, "tradeoff": {"exits": 5}},
        {**VALID, "tradeoff": [1]},
        {**VALID, "tradeoff": {"exits": [[0.5]]}},
        {**VALID, "comparison": [1]},
        {**VALID, "comparison": {"deployed": "local"}},
        {**VALID, "comparison": WRONG_TYPES},
    ],
    ids=lambda values: str({name: value for name, value in values.items() if VALID.get(name, "") != value})[:50],
)
def test_client_result_invalid_values_raise_one_line(values: Mapping[str, Any]) -> None:
    with pytest.raises(UserError, match="invalid client result") as caught:
        client_result_from_json(values, {})
    assert "\n" not in str(caught.value)


def test_baseline_metrics_of_more_rounds_are_cut() -> None:
    metrics = [{"accuracy": score, "ece": 1 - score} for score in (0.1, 0.2, 0.3)]
    message = receive(pack({"metrics": by_key(metrics)}))
    assert baseline_metrics(message, 2) == metrics[:2]
    with pytest.raises(UserError, match="accuracy: expected 4 numbers"):
        baseline_metrics(message, 4)


def test_dtypes_are_json_of_the_sent_tensors_only() -> None:
    dtypes = {"a": torch.float32, "b": torch.float64, "gone": torch.float32}
    values = dtypes_to_json(dtypes, {"a": torch.ones(1), "b": torch.ones(1), "c": torch.tensor(1)})
    assert values == {"dtypes": {"a": "float32", "b": "float64"}}
    assert dtypes_from_json(json.loads(json.dumps(values))["dtypes"]) == {"a": torch.float32, "b": torch.float64}
    assert dtypes_to_json({}, {"a": torch.ones(1)}) == {}
    with pytest.raises(UserError, match=r"^dtypes: expected float32 or float64, got 'int8'"):
        dtypes_from_json({"a": "int8"})
