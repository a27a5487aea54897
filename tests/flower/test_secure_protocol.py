"""SecAgg+ between a server and sites that only send random updates: mean, faults and attacks."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("flwr")

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.client.mod import secaggplus_mod
from flwr.client.mod.utils import make_ffn
from flwr.common import bytes_to_ndarray, ndarray_to_bytes
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS, Key, Stage

from fedekd.errors import UserError
from fedekd.flower.apps import Settings
from fedekd.flower.messages import pack, values_of
from fedekd.flower.secure.aggregation import STEPS, SecureAggregation, unmask_threshold
from fedekd.flower.secure.mods import require_protocol, to_client_result
from fedekd.methods import Broadcast

from .conftest import FakeGrid, Reply, request_lost, site_error

pytestmark = pytest.mark.flower

SECURE = SecureAggregation(max_change=2.0)
SETUP, SHARE, COLLECT, UNMASK = Stage.all()
SENT = {"weight": torch.linspace(-30, 30, 200).reshape(20, 10), "bias": torch.zeros(())}


def stage_of(message: Message) -> str | None:
    return message.content.config_records.get(RECORD_KEY_CONFIGS, {}).get(Key.STAGE)


class RandomSite:
    """Site behind the mods that replies with a random update."""

    def __init__(self, node: int) -> None:
        generator = torch.Generator().manual_seed(node)
        self.update = {name: value + torch.randn(value.shape, generator=generator) / 4 for name, value in SENT.items()}
        self.context = Context(1, node, {}, RecordDict(), {})
        self.app = make_ffn(self._reply, [require_protocol, secaggplus_mod, to_client_result])

    def _reply(self, message: Message, context: Context) -> Message:
        return Message(pack(values_of(message), self.update), reply_to=message)

    def __call__(self, message: Message) -> RecordDict:
        return self.app(message, self.context).content


class SecureRound:
    """One round of `count` sites, numbered from 1, at nodes 101, 102, ..."""

    def __init__(self, count: int, intercept: Any = None) -> None:
        self.sites = {site: RandomSite(100 + site) for site in range(1, count + 1)}
        self.warnings: list[str] = []
        grid = FakeGrid()
        grid.nodes = {100 + site: random_site for site, random_site in self.sites.items()}
        if intercept is not None:
            grid.intercept = intercept
        nodes = {site: 100 + site for site in self.sites}
        values = {site: {"site": site} for site in self.sites}
        self.replies, self.mean = SECURE.run_round(grid, nodes, values, SENT, 1.0, self.warnings.append)

    def assert_mean_of(self, remaining: list[int]) -> None:
        """The mean and the JSON values are those of these sites."""
        assert {site: json.loads(text) for site, text in self.replies.items()} == {n: {"site": n} for n in remaining}
        for name, tensor in self.mean.items():
            expected = torch.stack([self.sites[site].update[name].double() for site in remaining]).mean(0)
            assert tensor.shape == SENT[name].shape
            torch.testing.assert_close(tensor.double(), expected, rtol=1e-7, atol=SECURE.resolution / 2 + 1e-7)


@pytest.mark.parametrize(
    ("count", "lost"),
    [
        (3, {}),
        (4, {2: COLLECT}),
        (6, {1: SHARE, 2: COLLECT}),
        (6, {1: COLLECT, 2: COLLECT}),
        (7, {1: SETUP, 2: COLLECT}),
        (9, {1: SETUP, 5: SHARE, 3: COLLECT}),
        (9, {1: COLLECT, 2: UNMASK, 3: UNMASK}),
    ],
)
def test_run_round_lost_sites_gives_mean_of_remaining(count: int, lost: dict[int, str]) -> None:
    result = SecureRound(
        count,
        lambda message, reply: None if lost.get(message.metadata.dst_node_id - 100) == stage_of(message) else reply(),
    )
    result.assert_mean_of([site for site in range(1, count + 1) if lost.get(site) in (None, UNMASK)])
    assert sorted(result.warnings) == [f"site {site} did not reply within 1 s" for site in sorted(lost)]


@pytest.mark.parametrize(
    ("count", "stage"), [*((3, stage) for stage in Stage.all()), (4, COLLECT), (5, COLLECT), (6, COLLECT), (9, COLLECT)]
)
@pytest.mark.parametrize("fault", [request_lost, site_error])
def test_run_round_below_threshold_gives_no_mean(count: int, stage: str, fault: Any) -> None:
    num_lost = count - unmask_threshold(count) + 1

    def intercept(message: Message, reply: Reply) -> Message | None:
        is_lost = message.metadata.dst_node_id <= 100 + num_lost and stage_of(message) == stage
        return fault(message, reply) if is_lost else reply()

    result = SecureRound(count, intercept)
    assert (result.replies, result.mean) == ({}, {})
    reason = "did not reply within 1 s" if fault is request_lost else "failed: <class 'OSError'>:<'the disk is full'>"
    assert sorted(result.warnings) == [f"site {site} {reason}" for site in range(1, num_lost + 1)]


def site_2_sends(stage: str, change: Any) -> Any:
    """Site 2 sends changed values in one stage."""

    def intercept(message: Message, reply: Reply) -> Message:
        matches = message.metadata.dst_node_id == 102 and stage_of(message) == stage
        result = reply()  # the mods change the message
        if matches:
            values = dict(result.content.config_records[RECORD_KEY_CONFIGS])
            result.content[RECORD_KEY_CONFIGS] = ConfigRecord(change(values))
        return result

    return intercept


def change_vectors(change: Any) -> Any:
    """Change the masked vectors."""
    return lambda values: {
        **values,
        Key.MASKED_PARAMETERS: [
            ndarray_to_bytes(part) for part in change([bytes_to_ndarray(p) for p in values[Key.MASKED_PARAMETERS]])
        ],
    }


INVALID_REPLIES = {
    "no keys": (SETUP, lambda values: {"nothing": 1}),
    "invalid key": (SETUP, lambda values: {**values, Key.PUBLIC_KEY_1: b"key"}),
    "key of wrong type": (SETUP, lambda values: {**values, Key.PUBLIC_KEY_2: 5}),
    "shares for other sites": (SHARE, lambda values: {**values, Key.DESTINATION_LIST: [1, 2, 3, 4]}),
    "too few shares": (SHARE, lambda values: {**values, Key.CIPHERTEXT_LIST: values[Key.CIPHERTEXT_LIST][1:]}),
    "no vectors": (COLLECT, lambda values: {"nothing": 1}),
    "invalid vectors": (COLLECT, lambda values: {Key.MASKED_PARAMETERS: [b"\x00", b"x", b"y"]}),
    "one vector": (COLLECT, change_vectors(lambda parts: parts[:1])),
    "short vectors": (COLLECT, change_vectors(lambda parts: [parts[0], parts[1][:1], parts[2]])),
    "columns": (COLLECT, change_vectors(lambda parts: [parts[0], parts[1][:, None], parts[2]])),
    "floats": (COLLECT, change_vectors(lambda parts: [part.astype(float) for part in parts])),
}


@pytest.mark.parametrize("what", INVALID_REPLIES)
def test_run_round_invalid_reply_is_rejected_and_named(what: str) -> None:
    stage, change = INVALID_REPLIES[what]
    result = SecureRound(5, site_2_sends(stage, change))
    result.assert_mean_of([1, 3, 4, 5])
    [warning] = result.warnings
    assert warning.startswith("rejected the reply of site 2: un")
    assert f"content in stage {stage}" in warning
    assert "\n" not in warning


@pytest.mark.parametrize("text", [None, 5, "[]", "{", "[" * 100_000], ids=["none", "number", "list", "open", "deep"])
def test_run_round_unreadable_json_is_rejected_and_named(text: Any) -> None:
    def intercept(message: Message, reply: Reply) -> Message:
        matches = message.metadata.dst_node_id == 102 and stage_of(message) == COLLECT
        result = reply()
        if matches:
            result.content["fitres.metrics"] = ConfigRecord({} if text is None else {"values": text})
        return result

    result = SecureRound(5, intercept)
    result.assert_mean_of([1, 3, 4, 5])
    [warning] = result.warnings
    assert warning.startswith(f"rejected the reply of site 2: unreadable content in stage {COLLECT}")
    assert "\n" not in warning


@pytest.mark.parametrize(
    "change",
    [
        lambda values: {Key.NODE_ID_LIST: [5], Key.SHARE_LIST: [b"x"]},
        lambda values: {**values, Key.SHARE_LIST: values[Key.SHARE_LIST][1:]},
        lambda values: {**values, Key.SHARE_LIST: [5] * len(values[Key.SHARE_LIST])},
    ],
    ids=["other sites", "too few", "wrong type"],
)
def test_run_round_invalid_reply_in_last_stage_keeps_update(change: Any) -> None:
    result = SecureRound(5, site_2_sends(UNMASK, change))
    result.assert_mean_of([1, 2, 3, 4, 5])
    assert len(result.warnings) == 1


def test_run_round_sum_out_of_range_raises() -> None:
    change = change_vectors(lambda parts: [parts[0], (parts[1] + 2**31) % 2**32, parts[2]])
    with pytest.raises(ValueError, match="the unmasked sum is out of range"):
        SecureRound(5, site_2_sends(COLLECT, change))


def test_run_round_undecryptable_share_is_reported_by_receiver() -> None:
    result = SecureRound(
        9,
        site_2_sends(SHARE, lambda values: {**values, Key.CIPHERTEXT_LIST: [b"x", *values[Key.CIPHERTEXT_LIST][1:]]}),
    )
    assert len(result.replies) == 8
    [warning] = result.warnings
    assert "failed" in warning


#: Requests of a malicious server: stage and changed values.
ATTACKS: dict[str, tuple[str, dict[str, Any]]] = {
    "one of three unmasks": (SETUP, {Key.THRESHOLD: 1}),
    "two of three unmask": (SETUP, {Key.THRESHOLD: 2}),
    "half of the sites unmask": (SETUP, {Key.SAMPLE_NUMBER: 6, Key.SHARE_NUMBER: 6}),
    "more shares than sites": (SETUP, {Key.SHARE_NUMBER: 10}),
    "small masks": (SETUP, {Key.MOD_RANGE: 2}),
    "few steps": (SETUP, {Key.TARGET_RANGE: 1}),
    "small weight": (SETUP, {Key.MAX_WEIGHT: 1e9}),
    "invalid range": (SETUP, {Key.CLIPPING_RANGE: 1e-9}),
    "threshold of wrong type": (SETUP, {Key.THRESHOLD: 3.0}),
    "both secrets of two sites": (UNMASK, {Key.DEAD_NODE_ID_LIST: [101, 102]}),
    "one site three times": (UNMASK, {Key.ACTIVE_NODE_ID_LIST: [101, 101, 101], Key.DEAD_NODE_ID_LIST: [102]}),
}


@pytest.mark.parametrize("what", ATTACKS)
def test_require_protocol_unsafe_request_is_refused(what: str) -> None:
    stage, values = ATTACKS[what]
    errors = []

    def attack(message: Message, reply: Reply) -> Message | None:
        if message.metadata.dst_node_id != 102 or stage_of(message) != stage:
            return reply()
        message.content[RECORD_KEY_CONFIGS].update(values)
        result = reply()
        assert result.has_error()
        errors.append(result.error.reason)
        return result

    SecureRound(3, attack)
    [error] = errors
    assert "SiteError" in error or "UserError" in error
    assert "\n" not in error


@pytest.mark.parametrize(("change", "largest"), [(torch.nan, "nan"), (torch.inf, "inf"), (2.5, "2.5"), (-2.0, "2")])
def test_quantize_change_out_of_range_raises(change: float, largest: str) -> None:
    received = {"a": torch.zeros(3), "b": torch.zeros(2, 2)}
    update = {**received, "b": torch.tensor([[0.0, change], [0.0, 0.0]])}
    message = rf"secure_range: expected changes below 2, got {largest} in 'b'\. Raise secure_range"
    with pytest.raises(UserError, match=message):
        SECURE.quantize(update, received)


def test_quantize_other_names_raise() -> None:
    with pytest.raises(UserError, match="unexpected or missing tensors c"):
        SECURE.quantize({**SENT, "c": torch.zeros(1)}, SENT)


def test_quantize_result_is_on_the_grid() -> None:
    received = {"a": torch.randn(1000)}
    [change] = SECURE.quantize({"a": received["a"] + torch.randn(1000).clamp(-1.9, 1.9)}, received)
    steps = (change + 2.0) * (STEPS / 4.0)
    assert (steps == np.round(steps)).all()
    assert steps.min() >= 0
    assert steps.max() <= STEPS


def test_require_supported_personal_or_integer_state_raises() -> None:
    with pytest.raises(UserError, match="expected a method that sends the same state to all sites"):
        SECURE.require_supported(Broadcast({}, {0: {"a": torch.zeros(1)}}))
    with pytest.raises(UserError, match=r"floating-point weights, got 'bn\.num_batches_tracked' of torch\.int64"):
        SECURE.require_supported(Broadcast({"bn.num_batches_tracked": torch.tensor(3)}))
    SECURE.require_supported(Broadcast({"a": torch.zeros(1)}))


@pytest.mark.parametrize("count", [0, 1, 2, 1024])
def test_run_round_unsupported_number_of_sites_raises(count: int) -> None:
    message = f"secure: expected 3 to 1023 sites per round, got {count}"
    with pytest.raises(UserError, match=message):
        SECURE.run_round(FakeGrid(), dict.fromkeys(range(count), 5), {n: {} for n in range(count)}, {}, None, print)
    if count:
        with pytest.raises(UserError, match=message):
            Settings((), count, secure=True)
