"""By secure aggregation the server comes to the mean of the updates, and to nothing else of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("flwr")

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.client.mod import secaggplus_mod
from flwr.client.mod.utils import make_ffn
from flwr.clientapp.mod import LocalDpMod
from flwr.common import bytes_to_ndarray
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS, Key, Stage

from fedekd.errors import UserError
from fedekd.federation.checkpoint import CheckpointFolder
from fedekd.flower import apps, mods
from fedekd.flower.apps import Settings, make_client_app, serve
from fedekd.flower.messages import VISIT, note_of, packed
from fedekd.flower.secure import STEPS, SecureAggregation
from fedekd.methods import Broadcast

from .conftest import NODES, SITES, Answer, FakeGrid, Hospitals, StoppedError, Watch, broken, carried, lost, same

pytestmark = pytest.mark.flower

SECURE = SecureAggregation(range=2.0)
STAGES = Stage.all()

Updates = dict[int, dict[str, torch.Tensor]]


@pytest.fixture(autouse=True)
def sites(monkeypatch: pytest.MonkeyPatch) -> None:
    """All sites are in this process, and each is made once."""
    monkeypatch.setattr(apps, "_site", lru_cache(maxsize=None)(apps._site.__wrapped__))


class Node:
    """A site as Flower's runtime runs it: its app, and a context that lasts."""

    at_work = -1

    def __init__(self, hospitals: Hospitals, number: int, *own: Any, **settings: Any) -> None:
        chosen = Settings(
            tuple(hospitals.options), SITES, folder=str(hospitals.folder / f"hospital-{number}"), **settings
        )
        self.number = number
        self.app = make_client_app(chosen, mods=own)
        self.context = Context(1, NODES[number], {"number": number}, RecordDict(), {})

    def __call__(self, message: Message) -> RecordDict:
        Node.at_work = self.number
        return self.app(message, self.context).content


def behind_apps(hospitals: Hospitals, *own: Any) -> Hospitals:
    """The same sites, each behind its app."""
    for number, node in NODES.items():
        hospitals.grid.nodes[node] = Node(hospitals, number, *own)
    return hospitals


@pytest.fixture
def nodes(hospitals: Hospitals) -> Hospitals:
    """Three sites and two rounds."""
    return behind_apps(hospitals)


@pytest.fixture
def once(options: list[str], undisturbed: Any, tmp_path: Path) -> Hospitals:
    """Three sites and one round: the server ends with the mean of the first proxies."""
    return behind_apps(Hospitals(tmp_path, [*options, "--rounds=1"], undisturbed[2] / "local"))


def stage_of(message: Message) -> str | None:
    """Of the protocol; None of a message that is no part of it."""
    return message.content.config_records.get(RECORD_KEY_CONFIGS, {}).get(Key.STAGE)


@pytest.fixture
def updates(monkeypatch: pytest.MonkeyPatch) -> Updates:
    """By site, the last update that it was to mask."""
    found: Updates = {}
    changes = mods._changes

    def noting(update: Any, sent: Any, range: float) -> Any:
        found[Node.at_work] = dict(update)
        return changes(update, sent, range)

    monkeypatch.setattr(mods, "_changes", noting)
    return found


def at(number: int, stage: str, meddler: Callable[[Message, Answer], Message | None]) -> Any:
    """Meddle with one stage at one site, in the first round."""
    rest = [meddler]

    def meddle(message: Message, answer: Answer) -> Message | None:
        meant = message.metadata.dst_node_id == NODES[number] and stage_of(message) == stage
        return rest.pop()(message, answer) if meant and rest else answer()

    return meddle


def first_mean(once: Hospitals) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], Watch]:
    """The first proxy, what the server makes of the only round, and what it says."""
    server = once.server(observer=(watch := Watch()), secure=SECURE)
    first = {name: tensor.clone() for name, tensor in server.blueprint.network("proxy", "server").state_dict().items()}
    server.run()
    return first, dict(server.method.server_state), watch


def mean_of(updates: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.stack([update[name].double() for update in updates]).mean(0) for name in updates[0]}


def assert_mean(found: dict[str, torch.Tensor], updates: list[dict[str, torch.Tensor]]) -> None:
    for name, mean in mean_of(updates).items():
        largest = float((found[name].double() - mean).abs().max())
        assert largest <= SECURE.resolution / 2 + 1e-7, name  # 1e-7: a weight of 1 in float32


def test_the_server_has_the_mean(once: Hospitals, updates: Updates) -> None:
    first, mean, watch = first_mean(once)
    assert not watch.warnings
    assert sorted(updates) == [0, 1, 2]
    assert_mean(mean, list(updates.values()))
    moved = max(float((mean[name] - first[name]).abs().max()) for name in mean)
    assert moved > 1000 * SECURE.resolution


def test_no_message_holds_an_update(once: Hospitals, updates: Updates) -> None:
    first, _, _ = first_mean(once)
    changes = [
        torch.cat([(update[name] - first[name]).double().flatten() for name in first]).numpy()
        for update in updates.values()
    ]
    assert all(np.abs(change).max() > 0 for change in changes)
    masked = []
    for answer in once.grid.answers:
        assert all(not dict(record) for record in answer.content.array_records.values())
        parts = answer.content.config_records.get(RECORD_KEY_CONFIGS, {}).get(Key.MASKED_PARAMETERS)
        if parts is not None:
            masked.append(np.concatenate([bytes_to_ndarray(part).flatten() for part in parts[1:]]).astype(float))
    assert len(masked) == SITES
    for sent in masked:
        assert len(sent) == len(changes[0])
        assert np.quantile(sent / 2**32, [0.1, 0.5, 0.9]) == pytest.approx([0.1, 0.5, 0.9], abs=0.02)
        for change in changes:
            assert abs(np.corrcoef(sent, change)[0, 1]) < 5 / len(sent) ** 0.5
    # Nor does the sum of two hold the third's.
    for pair in ((0, 1), (0, 2), (1, 2)):
        both = (masked[pair[0]] + masked[pair[1]]) % 2**32
        assert all(abs(np.corrcoef(both, change)[0, 1]) < 5 / len(both) ** 0.5 for change in changes)


def test_a_run_is_the_same_each_time_and_near_the_open_one(
    nodes: Hospitals, undisturbed: Any, options: list[str], tmp_path: Path
) -> None:
    nodes.server(tmp_path / "one", secure=SECURE).run()
    again = behind_apps(Hospitals(tmp_path / "again", options, undisturbed[2] / "local"))
    with pytest.raises(StoppedError):
        again.server(tmp_path / "two", Watch(stop_after=1), secure=SECURE).run()
    again.server(tmp_path / "two", secure=SECURE).run()
    assert (tmp_path / "one/metrics.csv").read_bytes() == (tmp_path / "two/metrics.csv").read_bytes()
    proxies = [
        CheckpointFolder(folder / "checkpoints").load()[0].server for folder in (tmp_path / "one", tmp_path / "two")
    ]  # type: ignore[union-attr]
    assert same(*proxies)
    for name, tensor in undisturbed[0].method.server_state.items():
        torch.testing.assert_close(proxies[0][name], tensor, rtol=0, atol=1e-3)
    kinds = {message.metadata.message_type for message in nodes.grid.sent}
    assert VISIT not in kinds


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("how", [lost, broken], ids=["lost", "broken"])
def test_who_is_lost_is_not_in_the_mean(stage: str, how: Any, once: Hospitals, updates: Updates) -> None:
    once.grid.meddle = at(1, stage, how)
    _, mean, watch = first_mean(once)
    counted = list(NODES) if stage == Stage.UNMASK else [0, 2]  # at the end all that is asked for is what two can give
    assert_mean(mean, [updates[number] for number in counted])
    assert watch.rows[0]["comm/updates"] == len(counted)
    told = ["round 0: no usable answer from the sites 1; they are missing from this round"]
    assert [line for line in watch.warnings if line.startswith("round")] == (told if len(counted) == 2 else [])
    if how is broken:
        assert any(line.startswith("site 1 could not answer") and "the disk is full" in line for line in watch.warnings)


def test_and_takes_part_again(nodes: Hospitals) -> None:
    nodes.grid.meddle = at(1, Stage.COLLECT_MASKED_VECTORS, broken)
    nodes.server(observer=(watch := Watch()), secure=SECURE).run()
    assert [row["comm/updates"] for row in watch.rows] == [2, 3]


def test_of_two_that_are_lost_the_round_is_lost(once: Hospitals) -> None:
    once.grid.meddle = lambda message, answer: (
        broken(message, answer)
        if message.metadata.dst_node_id in (NODES[0], NODES[1]) and stage_of(message) == Stage.COLLECT_MASKED_VECTORS
        else answer()
    )
    first, mean, watch = first_mean(once)
    assert same(mean, first)
    assert any("no usable answer from the sites 0, 1, 2" in line for line in watch.warnings)


def test_a_site_that_is_away_is_left_out(nodes: Hospitals) -> None:
    away = nodes.grid.nodes[NODES[2]]

    def before(round: int) -> None:
        if round == 0:
            del nodes.grid.nodes[NODES[2]]
        else:
            nodes.grid.nodes[NODES[2]] = away

    watch = Watch(before)
    server = nodes.server(observer=watch, secure=SECURE)
    server.run()
    assert [row["comm/updates"] for row in watch.rows] == [2, 3]


JUNK: dict[str, Any] = {
    Stage.SETUP: {"nothing": 1},
    Stage.SHARE_KEYS: {Key.DESTINATION_LIST: [1], Key.CIPHERTEXT_LIST: [b"x", b"y"]},
    Stage.COLLECT_MASKED_VECTORS: {Key.MASKED_PARAMETERS: [b"\x00", b"no array"]},
    Stage.UNMASK: {Key.NODE_ID_LIST: [5], Key.SHARE_LIST: [b"x"]},
}


@pytest.mark.parametrize("stage", STAGES)
def test_junk_ends_no_run(stage: str, nodes: Hospitals) -> None:
    def junk(message: Message, answer: Answer) -> Message:
        reply = answer()
        reply.content[RECORD_KEY_CONFIGS] = ConfigRecord(JUNK[stage])
        return reply

    nodes.grid.meddle = at(1, stage, junk)
    nodes.server(observer=(watch := Watch()), secure=SECURE).run()
    assert [row["comm/updates"] for row in watch.rows] == [0, 3]
    assert any(line.startswith("secure aggregation has failed") and "\n" not in line for line in watch.warnings)


@pytest.mark.parametrize("note", ["[]", "{", '{"client": 2}', "[" * 100_000], ids=lambda note: note[:14])
def test_a_site_whose_note_cannot_be_read_is_told(note: str, nodes: Hospitals) -> None:
    def other(message: Message, answer: Answer) -> Message:
        reply = answer()
        reply.content["fitres.metrics"] = ConfigRecord({"note": note})
        return reply

    nodes.grid.meddle = at(1, Stage.COLLECT_MASKED_VECTORS, other)
    nodes.server(observer=(watch := Watch()), secure=SECURE).run()
    assert [row["comm/updates"] for row in watch.rows] == [2, 3]
    assert watch.warnings[0].startswith("refused the answer of site 1, but its update is in the sum: ")


@pytest.mark.parametrize(("needed", "of"), [(1, 3), (2, 4), (2, 2), (0, 3)])
def test_a_site_agrees_to_no_sum_that_few_can_unmask(needed: int, of: int, once: Hospitals) -> None:
    def weak(message: Message, answer: Answer) -> Message | None:
        node: Any = once.grid.nodes[NODES[1]]
        told = message.content[RECORD_KEY_CONFIGS]
        told[Key.THRESHOLD], told[Key.SAMPLE_NUMBER] = needed, of
        with pytest.raises(UserError, match=f"{needed} of {of} sites"):
            node(message)
        return None

    once.grid.meddle = at(1, Stage.SETUP, weak)
    _, _, watch = first_mean(once)
    assert watch.rows[0]["comm/updates"] == 2


@pytest.mark.parametrize(
    ("change", "words"),
    [(torch.nan, "changes by nan"), (torch.inf, "changes by inf"), (2.5, "changes by 2.5"), (-2.0, "changes by 2,")],
)
def test_an_update_that_cannot_be_carried_does_not_leave_its_site(change: float, words: str) -> None:
    sent = {"a": torch.zeros(3), "b": torch.zeros(2, 2)}
    update = {**sent, "b": torch.tensor([[0.0, change], [0.0, 0.0]])}
    with pytest.raises(UserError, match=rf"'b' {words}.*secure_range"):
        mods._changes(update, sent, 2.0)
    with pytest.raises(UserError, match="other names: c"):
        mods._changes({**sent, "c": torch.zeros(1)}, sent, 2.0)


def test_what_flower_would_round_at_random_is_whole() -> None:
    sent = {"a": torch.randn(1000)}
    [change] = mods._changes({"a": sent["a"] + torch.randn(1000).clamp(-1.9, 1.9)}, sent, 2.0)
    steps = (change + 2.0) * (STEPS / 4.0)
    assert (steps == np.round(steps)).all()
    assert steps.min() >= 0
    assert steps.max() <= STEPS


def test_other_mods_come_first(once: Hospitals) -> None:
    clip = LocalDpMod(clipping_norm=0.01, sensitivity=0.0, epsilon=1.0, delta=1e-5)
    behind_apps(once, clip)
    first, mean, watch = first_mean(once)
    assert not watch.warnings
    moved = torch.cat([(mean[name] - first[name]).double().flatten() for name in first]).norm()
    assert 0.001 < float(moved) <= 0.0101


def test_a_site_can_keep_to_it(hospitals: Hospitals) -> None:
    for by, own in (("run", {}), ("node", {"secure": True})):
        node = Node(hospitals, 0, secure=by == "run")
        node.context.node_config.update(own)
        message = Message(packed({"round": 0, "version": 0, "look": None}, {}), NODES[0], VISIT)
        with pytest.raises(UserError, match="secure aggregation alone"):
            node(carried(message))


def test_what_is_sent_must_be_one_state_of_floats() -> None:
    with pytest.raises(UserError, match="sends all sites the same"):
        SECURE.require(Broadcast({}, {0: {"a": torch.zeros(1)}}))
    with pytest.raises(UserError, match=r"'bn\.num_batches_tracked' is torch\.int64"):
        SECURE.require(Broadcast({"bn.num_batches_tracked": torch.tensor(3)}))
    SECURE.require(Broadcast({"a": torch.zeros(1)}))


def test_two_hide_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="at least 3 sites in a round, and there are 2"):
        SECURE.visits(FakeGrid(), {1: {}, 2: {}}, {}, None)
    with pytest.raises(UserError, match="secure aggregation needs at least 3 sites, and sites is 2"):
        Settings((), 2, secure=True)


@pytest.mark.parametrize("range", [0.0, -2.0, 3.0, float("nan"), float("inf")])
def test_the_range_is_a_power_of_two(range: float) -> None:
    with pytest.raises(UserError, match=f"secure_range is {range}, and must be a power of two"):
        Settings((), 3, secure_range=range)


def test_settings_are_read(options: list[str]) -> None:
    told = {"options": "--rounds 2", "sites": 3, "secure": True, "secure_range": 4}
    assert (Settings.of(told).secure, Settings.of(told).secure_range) == (True, 4.0)
    with pytest.raises(UserError, match="secure is 'yes', and must be true or false"):
        Settings.of({**told, "secure": "yes"})


def test_a_method_that_looks_at_each_update_is_refused(options: list[str]) -> None:
    chosen = [*options, "--method.aggregator=fedekd.functional.CoordinateMedian"]
    with pytest.raises(UserError, match="secure: FedeKD, as it is configured, needs more"):
        serve(FakeGrid(), Settings(tuple(chosen), SITES, secure=True))


class Summand:
    """A site that only sends: some numbers, by way of the mods."""

    def __init__(self, node: int, sent: dict[str, torch.Tensor]) -> None:
        generator = torch.Generator().manual_seed(node)
        self.update = {name: value + torch.randn(value.shape, generator=generator) / 4 for name, value in sent.items()}
        self.context = Context(1, node, {}, RecordDict(), {})
        self.app = make_ffn(self.send, [mods.require_threshold, secaggplus_mod, mods.as_visit])

    def send(self, message: Message, context: Context) -> Message:
        return Message(packed(note_of(message), self.update), reply_to=message)

    def __call__(self, message: Message) -> RecordDict:
        return self.app(message, self.context).content


SETUP, SHARE, COLLECT, UNMASK = STAGES


@pytest.mark.parametrize(
    ("sites", "away"),
    [
        (3, {}),
        (5, {1: SHARE, 2: COLLECT}),
        (5, {1: COLLECT, 2: COLLECT}),
        (7, {1: SETUP, 2: COLLECT}),
        (8, {1: SETUP, 5: SHARE, 3: COLLECT}),
        (8, {1: COLLECT, 2: UNMASK, 3: UNMASK}),
    ],
)
def test_the_mean_is_of_those_who_are_left(sites: int, away: dict[int, str]) -> None:
    sent = {"weight": torch.linspace(-30, 30, 200).reshape(20, 10), "bias": torch.zeros(())}
    grid = FakeGrid()
    summands = {node: Summand(node, sent) for node in range(1, sites + 1)}
    grid.nodes = dict(summands)
    grid.meddle = lambda message, answer: (
        None if away.get(message.metadata.dst_node_id) == stage_of(message) else answer()
    )
    answers, mean = SECURE.visits(grid, {node: {"site": node} for node in summands}, sent, 1.0)
    left = [node for node in summands if away.get(node) in (None, UNMASK)]
    assert {node: json.loads(answer) for node, answer in answers.items()} == {node: {"site": node} for node in left}
    for name, expected in mean_of([summands[node].update for node in left]).items():
        assert mean[name].shape == sent[name].shape
        torch.testing.assert_close(mean[name].double(), expected, rtol=1e-7, atol=SECURE.resolution / 2 + 1e-7)
