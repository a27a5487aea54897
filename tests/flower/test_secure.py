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

from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from flwr.client.mod import secaggplus_mod
from flwr.client.mod.utils import make_ffn
from flwr.clientapp.mod import LocalDpMod
from flwr.common import FitIns, bytes_to_ndarray, ndarray_to_bytes, ndarrays_to_parameters
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS, Key, Stage
from flwr.compat.common.recorddict_compat import fitins_to_recorddict

from fedekd.configuration.options import parts_of
from fedekd.errors import UserError
from fedekd.federation import Orchestrator
from fedekd.federation.checkpoint import CheckpointStore
from fedekd.flower import apps, mods
from fedekd.flower.apps import Settings, make_client_app, serve
from fedekd.flower.messages import HELLO, VISIT, note_of, packed
from fedekd.flower.rehearsal import main as rehearse
from fedekd.flower.rehearsal import same_figures, same_proxy
from fedekd.flower.rounded_engine import RoundedEngine
from fedekd.flower.secure import STEPS, SecureAggregation, needed_to_unmask
from fedekd.methods import Broadcast

from .conftest import (
    NODES,
    SITES,
    Answer,
    FakeGrid,
    Hospitals,
    StoppedError,
    Watch,
    broken,
    carried,
    late,
    lost,
    same,
)

pytestmark = pytest.mark.flower

SECURE = SecureAggregation(largest_change=2.0)
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
            tuple(hospitals.options), hospitals.sites, folder=str(hospitals.folder / f"hospital-{number}"), **settings
        )
        self.number = number
        self.app = make_client_app(chosen, mods=own)
        self.context = Context(1, NODES[number], {"number": number}, RecordDict(), {})

    def __call__(self, message: Message) -> RecordDict:
        Node.at_work = self.number
        return self.app(message, self.context).content


def behind_apps(hospitals: Hospitals, *own: Any) -> Hospitals:
    """The same sites, each behind its app."""
    for number in range(hospitals.sites):
        hospitals.grid.nodes[NODES[number]] = Node(hospitals, number, *own)
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
    changes = SecureAggregation.changes

    def noting(self: SecureAggregation, update: Any, sent: Any) -> Any:
        found[Node.at_work] = dict(update)
        return changes(self, update, sent)

    monkeypatch.setattr(SecureAggregation, "changes", noting)
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
    first = {name: tensor.clone() for name, tensor in server.spec.build_model("proxy", "server").state_dict().items()}
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
        CheckpointStore(folder / "checkpoints").load()[0].server for folder in (tmp_path / "one", tmp_path / "two")
    ]  # type: ignore[union-attr]
    assert same(*proxies)
    for name, tensor in undisturbed[0].method.server_state.items():
        torch.testing.assert_close(proxies[0][name], tensor, rtol=0, atol=1e-3)
    kinds = {message.metadata.message_type for message in nodes.grid.sent}
    assert VISIT not in kinds


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("how", [lost, broken], ids=["lost", "broken"])
def test_of_three_sites_none_can_be_spared(stage: str, how: Any, once: Hospitals) -> None:
    once.grid.meddle = at(1, stage, how)
    first, mean, watch = first_mean(once)
    assert same(mean, first)
    assert watch.rows[0]["comm/updates"] == 0
    words = "site 1 could not answer: <class 'OSError'>:<'the disk is full'>"
    assert watch.warnings[0] == ("site 1 has not answered within 60 s" if how is lost else words)
    assert "round 0: no usable answer from the sites 0, 1, 2; they are missing from this round" in watch.warnings


@pytest.mark.parametrize("how", [broken, late])
def test_and_the_next_round_is_theirs_again(how: Any, nodes: Hospitals) -> None:
    nodes.grid.meddle = at(1, Stage.COLLECT_MASKED_VECTORS, how)
    nodes.server(observer=(watch := Watch()), secure=SECURE).run()
    assert [row["comm/updates"] for row in watch.rows] == [0, 3]


def test_a_site_that_is_away_is_named(nodes: Hospitals) -> None:
    away = nodes.grid.nodes[NODES[2]]

    def before(round_idx: int) -> None:
        if round_idx == 0:
            del nodes.grid.nodes[NODES[2]]
        else:
            nodes.grid.nodes[NODES[2]] = away

    watch = Watch(before)
    nodes.server(observer=watch, secure=SECURE).run()
    assert [row["comm/updates"] for row in watch.rows] == [0, 3]
    assert watch.warnings[0].startswith("site 2 could not answer")


def noted(note: Any) -> Any:
    """A site says something else beside its masked update."""

    def meddle(message: Message, answer: Answer) -> Message:
        reply = answer()
        reply.content["fitres.metrics"] = ConfigRecord({} if note is None else {"note": note})
        return reply

    return meddle


@pytest.mark.parametrize("note", [None, 5, "[]", "{", "[" * 100_000], ids=lambda note: str(note)[:14])
def test_a_note_that_cannot_be_read_is_kept_from_the_sum(note: Any, once: Hospitals) -> None:
    once.grid.meddle = at(1, Stage.COLLECT_MASKED_VECTORS, noted(note))
    first, mean, watch = first_mean(once)
    assert same(mean, first)
    assert watch.warnings[0].startswith(
        "refused the answer of site 1: what it says in the stage collect_masked_vectors"
    )


def test_a_note_that_is_no_visit_is_told(nodes: Hospitals) -> None:
    nodes.grid.meddle = at(1, Stage.COLLECT_MASKED_VECTORS, noted('{"client": 2}'))
    nodes.server(observer=(watch := Watch()), secure=SECURE).run()
    assert [row["comm/updates"] for row in watch.rows] == [2, 3]
    assert watch.warnings[0].startswith("refused the answer of site 1, but its update is in the sum: ")


@pytest.mark.parametrize(
    ("change", "words"),
    [(torch.nan, "changes by nan,"), (torch.inf, "changes by inf,"), (2.5, "changes by 2.5,"), (-2.0, "changes by 2,")],
)
def test_an_update_that_cannot_be_carried_does_not_leave_its_site(change: float, words: str) -> None:
    sent = {"a": torch.zeros(3), "b": torch.zeros(2, 2)}
    update = {**sent, "b": torch.tensor([[0.0, change], [0.0, 0.0]])}
    with pytest.raises(UserError, match=rf"'b' {words} and secure_range is 2"):
        SECURE.changes(update, sent)
    with pytest.raises(UserError, match="other names: c"):
        SECURE.changes({**sent, "c": torch.zeros(1)}, sent)


def test_what_flower_would_round_at_random_is_whole() -> None:
    sent = {"a": torch.randn(1000)}
    [change] = SECURE.changes({"a": sent["a"] + torch.randn(1000).clamp(-1.9, 1.9)}, sent)
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


@pytest.mark.parametrize("sites", [0, 1, 2, 1024])
def test_too_few_hide_nothing_and_too_many_cannot_be_summed(sites: int) -> None:
    words = f"secure aggregation is of 3 to 1023 sites in a round, and there are {sites}"
    numbers = range(sites)
    with pytest.raises(UserError, match=words):
        SECURE.visits(FakeGrid(), dict.fromkeys(numbers, 5), {number: {} for number in numbers}, {}, None, print)
    if sites:
        with pytest.raises(UserError, match=words):
            Settings((), sites, secure=True)


@pytest.mark.parametrize("largest", [0.0, -2.0, 3.0, float("nan"), float("inf")])
def test_the_range_is_a_power_of_two(largest: float) -> None:
    with pytest.raises(UserError, match=f"secure_range is {largest}, and must be a power of two"):
        Settings((), 3, secure_range=largest)


def test_settings_are_read(options: list[str]) -> None:
    told = {"options": "--rounds 2", "sites": 3, "secure": True, "secure_range": 4}
    assert (Settings.of(told).secure, Settings.of(told).secure_range) == (True, 4.0)
    with pytest.raises(UserError, match="secure is 'yes', and must be true or false"):
        Settings.of({**told, "secure": "yes"})


REFUSED = {
    "--method.aggregator=fedekd.functional.CoordinateMedian": "secure: FedeKD, as it is configured, needs more",
    "--dropout=0.1": "dropout is 0.1, and nothing can be taken out of a secure sum",
    "--participation=0.67": "3 to 1023 sites in a round, and there are 2",
    "--method=CAFEDistill": "secure: CAFEDistill",
}


@pytest.mark.parametrize("option", REFUSED)
def test_what_cannot_be_hidden_is_refused_before_a_site_does_anything(option: str, hospitals: Hospitals) -> None:
    for number in range(SITES):
        hospitals.open(number, options=[option])
    chosen = Settings((*hospitals.options, option), SITES, secure=True, wait=0.0)
    with pytest.raises(UserError, match=REFUSED[option]):
        serve(hospitals.grid, chosen)
    assert {message.metadata.message_type for message in hospitals.grid.sent} <= {HELLO}


class Summand:
    """A site that only sends: some numbers, by way of the mods."""

    def __init__(self, node: int, sent: dict[str, torch.Tensor]) -> None:
        generator = torch.Generator().manual_seed(node)
        self.update = {name: value + torch.randn(value.shape, generator=generator) / 4 for name, value in sent.items()}
        self.context = Context(1, node, {}, RecordDict(), {})
        self.app = make_ffn(self.send, [mods.require_protocol, secaggplus_mod, mods.to_client_result])

    def send(self, message: Message, context: Context) -> Message:
        return Message(packed(note_of(message), self.update), reply_to=message)

    def __call__(self, message: Message) -> RecordDict:
        return self.app(message, self.context).content


SETUP, SHARE, COLLECT, UNMASK = STAGES
SENT = {"weight": torch.linspace(-30, 30, 200).reshape(20, 10), "bias": torch.zeros(())}


class Sum:
    """So many sites, numbered from 1, and one sum of what they send.

    Args:
        sites: How many.
        meddle: With what goes between them and the server.
    """

    def __init__(self, sites: int, meddle: Any = None) -> None:
        self.summands = {100 + site: Summand(100 + site, SENT) for site in range(1, sites + 1)}
        self.grid, self.warnings = FakeGrid(), list[str]()
        self.grid.nodes = dict(self.summands)
        if meddle is not None:
            self.grid.meddle = meddle
        nodes = {site: 100 + site for site in range(1, sites + 1)}
        notes = {site: {"site": site} for site in nodes}
        self.answers, self.mean = SECURE.visits(self.grid, nodes, notes, SENT, 1.0, self.warnings.append)

    def assert_of(self, left: list[int]) -> None:
        """The mean is of these sites, and so are the notes."""
        assert {site: json.loads(answer) for site, answer in self.answers.items()} == {
            site: {"site": site} for site in left
        }
        for name, expected in mean_of([self.summands[100 + site].update for site in left]).items():
            assert self.mean[name].shape == SENT[name].shape
            torch.testing.assert_close(self.mean[name].double(), expected, rtol=1e-7, atol=SECURE.resolution / 2 + 1e-7)


@pytest.mark.parametrize(
    ("sites", "away"),
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
def test_the_mean_is_of_those_who_are_left(sites: int, away: dict[int, str]) -> None:
    found = Sum(
        sites,
        lambda message, answer: None if away.get(message.metadata.dst_node_id - 100) == stage_of(message) else answer(),
    )
    found.assert_of([site for site in range(1, sites + 1) if away.get(site) in (None, UNMASK)])
    assert sorted(found.warnings) == [f"site {site} has not answered within 1 s" for site in sorted(away)]


@pytest.mark.parametrize("sites", [4, 5, 6, 9])
def test_of_fewer_than_two_thirds_there_is_no_mean(sites: int) -> None:
    lost = sites - needed_to_unmask(sites) + 1
    found = Sum(
        sites,
        lambda message, answer: (
            None if message.metadata.dst_node_id <= 100 + lost and stage_of(message) == COLLECT else answer()
        ),
    )
    assert (found.answers, found.mean) == ({}, {})


def saying(stage: str, values: Any) -> Any:
    """Site 2 says something else in a stage; the values are made of its own."""

    def meddle(message: Message, answer: Answer) -> Message:
        meant = message.metadata.dst_node_id == 102 and stage_of(message) == stage
        reply = answer()
        if meant:
            own = dict(reply.content.config_records[RECORD_KEY_CONFIGS])
            reply.content[RECORD_KEY_CONFIGS] = ConfigRecord(values(own))
        return reply

    return meddle


def other_parts(change: Any) -> Any:
    """Other masked vectors, made of its own."""
    return lambda own: {
        **own,
        Key.MASKED_PARAMETERS: [
            ndarray_to_bytes(part) for part in change([bytes_to_ndarray(p) for p in own[Key.MASKED_PARAMETERS]])
        ],
    }


JUNK = {
    "no keys": (SETUP, lambda own: {"nothing": 1}),
    "a key that is none": (SETUP, lambda own: {**own, Key.PUBLIC_KEY_1: b"key"}),
    "a key of another kind": (SETUP, lambda own: {**own, Key.PUBLIC_KEY_2: 5}),
    "shares for others": (SHARE, lambda own: {**own, Key.DESTINATION_LIST: [1, 2, 3, 4]}),
    "too few shares": (SHARE, lambda own: {**own, Key.CIPHERTEXT_LIST: own[Key.CIPHERTEXT_LIST][1:]}),
    "no vectors": (COLLECT, lambda own: {"nothing": 1}),
    "vectors that are none": (COLLECT, lambda own: {Key.MASKED_PARAMETERS: [b"\x00", b"x", b"y"]}),
    "one vector": (COLLECT, other_parts(lambda parts: parts[:1])),
    "short vectors": (COLLECT, other_parts(lambda parts: [parts[0], parts[1][:1], parts[2]])),
    "columns": (COLLECT, other_parts(lambda parts: [parts[0], parts[1][:, None], parts[2]])),
    "floats": (COLLECT, other_parts(lambda parts: [part.astype(float) for part in parts])),
}


@pytest.mark.parametrize("what", JUNK)
def test_who_sends_junk_is_named_and_left_out(what: str) -> None:
    stage, values = JUNK[what]
    found = Sum(5, saying(stage, values))
    found.assert_of([1, 3, 4, 5])
    [warning] = found.warnings
    assert warning.startswith(f"refused the answer of site 2: what it says in the stage {stage} ")
    assert "\n" not in warning


@pytest.mark.parametrize(
    "values",
    [
        lambda own: {Key.NODE_ID_LIST: [5], Key.SHARE_LIST: [b"x"]},
        lambda own: {**own, Key.SHARE_LIST: own[Key.SHARE_LIST][1:]},
        lambda own: {**own, Key.SHARE_LIST: [5] * len(own[Key.SHARE_LIST])},
    ],
    ids=["others", "too few", "numbers"],
)
def test_of_who_sends_junk_at_the_end_the_update_is_there(values: Any) -> None:
    found = Sum(5, saying(UNMASK, values))
    found.assert_of([1, 2, 3, 4, 5])
    assert len(found.warnings) == 1


def test_a_sum_that_is_none_is_no_mean() -> None:
    spoilt = other_parts(lambda parts: [parts[0], (parts[1] + 2**31) % 2**32, parts[2]])
    with pytest.raises(ValueError, match="a site has spoilt it"):
        Sum(5, saying(COLLECT, spoilt))


def test_shares_that_cannot_be_opened_are_told_by_those_who_should(once: Hospitals) -> None:
    found = Sum(9, saying(SHARE, lambda own: {**own, Key.CIPHERTEXT_LIST: [b"x", *own[Key.CIPHERTEXT_LIST][1:]]}))
    assert len(found.answers) == 8
    [warning] = found.warnings
    assert "could not answer" in warning


ATTACKS: dict[str, tuple[str, dict[str, Any]]] = {
    "one of three unmasks": (SETUP, {Key.THRESHOLD: 1}),
    "two of three unmask": (SETUP, {Key.THRESHOLD: 2}),
    "half of the sites unmask": (SETUP, {Key.SAMPLE_NUMBER: 6, Key.SHARE_NUMBER: 6}),
    "more shares than sites": (SETUP, {Key.SHARE_NUMBER: 10}),
    "masks of no size": (SETUP, {Key.MOD_RANGE: 2}),
    "few steps": (SETUP, {Key.TARGET_RANGE: 1}),
    "an update weighed down": (SETUP, {Key.MAX_WEIGHT: 1e9}),
    "a range that is none": (SETUP, {Key.CLIPPING_RANGE: 1e-9}),
    "a threshold of another kind": (SETUP, {Key.THRESHOLD: 3.0}),
    "both secrets of two": (UNMASK, {Key.DEAD_NODE_ID_LIST: [101, 102]}),
    "one site thrice": (UNMASK, {Key.ACTIVE_NODE_ID_LIST: [101, 101, 101], Key.DEAD_NODE_ID_LIST: [102]}),
}


@pytest.mark.parametrize("what", ATTACKS)
def test_a_site_takes_no_part_in_a_sum_that_would_not_hide_it(what: str) -> None:
    stage, said = ATTACKS[what]
    refusals = []

    def attack(message: Message, answer: Answer) -> Message | None:
        if message.metadata.dst_node_id == 102 and stage_of(message) == stage:
            message.content[RECORD_KEY_CONFIGS].update(said)
            reply = answer()
            assert reply.has_error()
            refusals.append(reply.error.reason)
            return reply
        return answer()

    Sum(3, attack)
    [refusal] = refusals
    assert "UserError" in refusal
    assert "\n" not in refusal


def test_no_other_way_leads_around_the_masks(nodes: Hospitals) -> None:
    site: Any = nodes.grid.nodes[NODES[0]]
    fit = FitIns(ndarrays_to_parameters([]), {"note": "{}", "names": "[]", "largest_change": 8.0})
    message = Message(fitins_to_recorddict(fit, keep_input=True), NODES[0], "train.default")
    with pytest.raises(UserError, match=r"'train\.default' is no part of secure aggregation"):
        site(carried(message))


def test_why_a_visit_fails_is_told(once: Hospitals) -> None:
    def refuse(message: Message, context: Context, call_next: Any) -> Message:
        return Message(Error(1, "a mod of this site\nhas other ideas"), reply_to=message)

    once.grid.nodes[NODES[1]] = Node(once, 1, refuse)
    _, _, watch = first_mean(once)
    assert "has other ideas" in watch.warnings[0]


PARTIAL = ["--data.num_clients=5", "--participation=0.6"]
LOOKS = ["--do_no_harm.looks=2", "--rounds=3"]


@pytest.mark.parametrize("more", [[], PARTIAL, [*PARTIAL, *LOOKS]], ids=["all", "three of five", "with looks"])
def test_one_process_can_come_to_the_same(
    more: list[str], options: list[str], tmp_path: Path, undisturbed: Any
) -> None:
    chosen, sites = [*options, *more], 5 if more else SITES
    nodes = behind_apps(Hospitals(tmp_path, chosen, None if more else undisturbed[2] / "local", sites))
    nodes.server(tmp_path / "sites", secure=SecureAggregation()).run()
    parts = {**parts_of(chosen), "engine": RoundedEngine}
    Orchestrator(**parts, output=tmp_path / "here", baseline_dir=tmp_path / "local").run()
    assert same_figures(tmp_path / "sites", tmp_path / "here")
    assert same_proxy(tmp_path / "sites", tmp_path / "here")


def test_a_rehearsal_of_too_few_begins_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "sites"
    assert rehearse([f"--folder={folder}", "--secure=true", "--sites=2"]) == 2
    told = capsys.readouterr().err
    assert told == "error: --sites 2: secure aggregation is of 3 to 1023 sites in a round, and there are 2\n"
    assert not folder.exists()
