"""Seeded hostile replies of one site through the Flower path; `tests/federation/hostile.py` has the full count."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("flwr")

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from fedekd.federation.aggregate_validation import is_finite
from fedekd.flower.messages import ROUND, STATE, VALUES, arrays_of, from_arrays, to_arrays, values_of
from tests.federation.hostile import COUNT, WELL_FORMED, Tally, harm_of_mean, hostile_state, hostile_values

from .conftest import NODES, RecordingObserver, Sites

pytestmark = pytest.mark.flower

COUNT_SITES = 5
HEADER = "{{'descr': '{descr}', 'fortran_order': {order}, 'shape': {shape}}}"


def hostile_bytes(draw: random.Random, content: bytes) -> bytes:
    """The bytes of an array with bits flipped, cut, or with a false header."""
    changed = bytearray(content)
    kind = draw.choice(("flip", "flips", "header flip", "cut", "longer", "header", "empty"))
    if kind in ("flip", "flips", "header flip"):
        for _ in range(draw.randint(2, 40) if kind == "flips" else 1):
            end = 128 if kind == "header flip" else len(changed)
            changed[draw.randrange(min(end, len(changed)))] ^= 1 << draw.randrange(8)
        return bytes(changed)
    if kind == "cut":
        return content[: draw.randrange(len(content))]
    if kind == "longer":
        return content + bytes(draw.randint(1, 2**21))
    if kind == "empty":
        return b""
    descr = draw.choice(("<f4", ">f4", "<f8", "|O", "|V0", "<c8", "<M8", "|b1", "<i8", "<U1"))
    shape = draw.choice(("(1099511627776,)", "(0,)", "()", "(-1,)", "(2, 2)", "(10**400,)", "(4,)", "(1,) * 99"))
    text = HEADER.format(descr=descr, order=draw.choice(("True", "False", "7")), shape=shape).ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode() + content[128:]


def hostile_text(draw: random.Random, values: Mapping[str, Any]) -> Any:
    """A JSON text with a changed note, or one that is not JSON."""
    text = json.dumps(hostile_values(draw, dict(values)), default=str)
    broken = (
        lambda: text[: draw.randrange(len(text))],
        lambda: "[" * 10 ** draw.randint(1, 5),
        lambda: '{"a":' * 900 + "1" + "}" * 900,
        lambda: '{"a": ' + "9" * 5001 + "}",
        lambda: '{"logs": "' + "x" * 2**20 + '"}',
        lambda: text.replace("loss", "\\ud800"),
        lambda: text.replace("loss", "\\u202e\\u001b[2J"),
        lambda: "",
        lambda: 7,
        lambda: [1.0, 2.0],
        lambda: b"\xff",
    )
    return draw.choice(broken)() if draw.random() < 0.4 else text


def hostile_reply(draw: random.Random, honest: RecordDict, sent: Mapping[str, torch.Tensor]) -> tuple[str, RecordDict]:
    """The honest content with one change of the tensors, their bytes, their names or the note."""
    state, text = from_arrays(honest.array_records[STATE]), honest.config_records[VALUES]["json"]
    record, kind = to_arrays(state), draw.choice(("tensors", "tensors", "tensors", "bytes", "names", "note", "records"))
    content = RecordDict({VALUES: ConfigRecord({"json": text})})
    if kind == "tensors":
        kind, state = hostile_state(draw, state, sent, WELL_FORMED)
        record = to_arrays(state)
    elif kind == "bytes":
        name = draw.choice(list(state))
        record[name] = Array("float32", (3,), "numpy.ndarray", hostile_bytes(draw, record[name].data))
    elif kind == "names":
        name = draw.choice(list(state))
        record["\x1b[31m" + name if draw.random() < 0.5 else name * 100] = record.pop(name)
    elif kind == "note":
        content[VALUES] = ConfigRecord({"json": hostile_text(draw, json.loads(str(text)))})
    elif draw.random() < 0.5:
        return kind, RecordDict({STATE: record})
    else:
        record = ArrayRecord({})
    content[STATE] = record
    return kind, content


def test_run_hostile_replies_leave_everything_finite_and_in_range(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = "--client.private_model=tests.federation.test_hostile_updates.NormCNN"
    all_options = [*options, "--method=FedAvg", "--method.weights=samples", model, "--rounds=1"]
    all_options = [option for option in all_options if "num_clients" not in option]
    sites = Sites(
        tmp_path, [*all_options, f"--data.num_clients={COUNT_SITES}", "--data.min_samples=6"], count=COUNT_SITES
    )
    server = sites.server(observer=(observer := RecordingObserver()))
    server.method.init_server(server.spec)
    initial, sent = dict(server.method.server_state), server.method.broadcast(range(COUNT_SITES), 0).to(0)
    server._run_round(0)
    contents = {
        reply.metadata.src_node_id: reply.content
        for reply in sites.grid.replies
        if reply.metadata.message_type == ROUND
    }
    replay(sites, contents)
    honest = {node: from_arrays(content.array_records[STATE]) for node, content in contents.items()}
    others = [state for node, state in honest.items() if node != NODES[0]]
    network, images = server.spec.build_model("private", 0), torch.rand(4, 1, 8, 8)
    draw, tally = random.Random(1), Tally()
    hostile = contents[NODES[0]]
    for _ in range(COUNT):
        kind, content = hostile_reply(draw, hostile, sent)
        sites.grid.nodes[NODES[0]] = lambda message, content=content: content
        sites.grid.replies.clear()
        sites.grid.requests.clear()
        observer.warnings.clear()
        server.method.server_state = dict(initial)
        server._run_round(0)
        assert is_finite(server.method.server_state)
        assert all(len(text) < 400 and "\n" not in text for text in observer.warnings)
        if observer.warnings:
            tally.rejected += 1
            continue
        tally.accepted[kind] = tally.accepted.get(kind, 0) + 1
        [reply] = [reply for reply in sites.grid.replies if reply.metadata.src_node_id == NODES[0]]
        assert values_of(reply)["num_samples"] == json.loads(str(hostile.config_records[VALUES]["json"]))["num_samples"]
        if harm := harm_of_mean([from_arrays(arrays_of(reply)), *others], network, images):
            tally.harmful.append(f"{kind}: {harm}")
    with capsys.disabled():
        print(f"\n{COUNT} hostile replies through Flower: {tally.text()}; accepted: {tally.accepted}")
    assert tally.harmful == []
    assert tally.rejected > COUNT / 3


def replay(sites: Sites, contents: Mapping[int, RecordDict]) -> None:
    """Let each node repeat its reply."""
    for node, content in contents.items():
        answer: Callable[[Message], RecordDict] = lambda message, content=content: content  # noqa: E731
        sites.grid.nodes[node] = answer
