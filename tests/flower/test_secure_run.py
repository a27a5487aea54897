"""Runs with secure aggregation: the server receives the mean of the updates and no single one."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("flwr")

from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from flwr.clientapp.mod import LocalDpMod
from flwr.common import FitIns, bytes_to_ndarray, ndarrays_to_parameters
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS, Key, Stage
from flwr.compat.common.recorddict_compat import fitins_to_recorddict

from examples.flower_deployment.compare_runs import has_equal_metrics, has_equal_server_state, last_server_state
from examples.flower_deployment.rounded_engine import RoundedEngine
from fedekd.configuration.options import parts_of
from fedekd.errors import UserError
from fedekd.federation import Orchestrator
from fedekd.flower import apps
from fedekd.flower.apps import Settings, make_client_app, serve
from fedekd.flower.messages import DESCRIBE, ROUND, pack
from fedekd.flower.secure.aggregation import SecureAggregation

from .conftest import (
    NODES,
    NUM_SITES,
    RecordingObserver,
    Reply,
    Run,
    ServerStoppedError,
    Sites,
    is_equal,
    over_wire,
    reply_late,
    request_lost,
    site_error,
)

pytestmark = pytest.mark.flower

SECURE = SecureAggregation(max_change=2.0)
COLLECT = Stage.COLLECT_MASKED_VECTORS

State = dict[str, torch.Tensor]
Updates = dict[int, State]


@pytest.fixture(autouse=True)
def unlimited_site_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """All sites are in this process; build each once."""
    monkeypatch.setattr(apps, "_site", lru_cache(maxsize=None)(apps._site.__wrapped__))


class Node:
    """A site behind its ClientApp, with a context that lasts, as in Flower's runtime."""

    active = -1

    def __init__(self, sites: Sites, number: int, *mods: Any, **settings: Any) -> None:
        folder = str(sites.folder / f"hospital-{number}")
        self.number = number
        self.app = make_client_app(Settings(tuple(sites.options), sites.count, folder=folder, **settings), mods=mods)
        self.context = Context(1, NODES[number], {"number": number}, RecordDict(), {})

    def __call__(self, message: Message) -> RecordDict:
        Node.active = self.number
        return self.app(message, self.context).content


def behind_apps(sites: Sites, *mods: Any) -> Sites:
    """Put each site behind its ClientApp."""
    for number in range(sites.count):
        sites.grid.nodes[NODES[number]] = Node(sites, number, *mods)
    return sites


@pytest.fixture
def nodes(sites: Sites) -> Sites:
    """Three sites behind their apps, two rounds."""
    return behind_apps(sites)


@pytest.fixture
def one_secure_round(one_round: Sites) -> Sites:
    """Three sites behind their apps, one round: the server ends with the mean of the first proxies."""
    return behind_apps(one_round)


def stage_of(message: Message) -> str | None:
    return message.content.config_records.get(RECORD_KEY_CONFIGS, {}).get(Key.STAGE)


@pytest.fixture
def updates(monkeypatch: pytest.MonkeyPatch) -> Updates:
    """The last update of each site before masking."""
    recorded: Updates = {}
    quantize = SecureAggregation.quantize

    def record(self: SecureAggregation, update: Any, received: Any) -> Any:
        recorded[Node.active] = dict(update)
        return quantize(self, update, received)

    monkeypatch.setattr(SecureAggregation, "quantize", record)
    return recorded


def in_stage(site: int, stage: str, interceptor: Callable[[Message, Reply], Message | None]) -> Any:
    """Intercept the first message of one stage to one site."""
    remaining = [interceptor]

    def intercept(message: Message, reply: Reply) -> Message | None:
        matches = message.metadata.dst_node_id == NODES[site] and stage_of(message) == stage
        return remaining.pop()(message, reply) if matches and remaining else reply()

    return intercept


def run_once(sites: Sites) -> tuple[State, State, RecordingObserver]:
    """Run one round; return the initial proxy, the final proxy and the observer."""
    server = sites.server(observer=(observer := RecordingObserver()), secure=SECURE)
    proxy = server.spec.build_model("proxy", "server").state_dict()
    initial = {name: tensor.clone() for name, tensor in proxy.items()}
    server.run()
    return initial, dict(server.method.server_state), observer


def flat(state: State) -> torch.Tensor:
    return torch.cat([tensor.double().flatten() for tensor in state.values()])


def test_run_server_gets_mean_and_no_single_update(one_secure_round: Sites, updates: Updates) -> None:
    initial, mean, observer = run_once(one_secure_round)
    assert not observer.warnings
    assert sorted(updates) == [0, 1, 2]
    expected = torch.stack([flat(update) for update in updates.values()]).mean(0)
    assert float((flat(mean) - expected).abs().max()) <= SECURE.resolution / 2 + 1e-7  # 1e-7: float32 near 1
    assert float((flat(mean) - flat(initial)).abs().max()) > 1000 * SECURE.resolution

    changes = [(flat(update) - flat(initial)).numpy() for update in updates.values()]
    masked = []
    for reply in one_secure_round.grid.replies:
        assert all(not dict(record) for record in reply.content.array_records.values())
        parts = reply.content.config_records.get(RECORD_KEY_CONFIGS, {}).get(Key.MASKED_PARAMETERS)
        if parts is not None:
            masked.append(np.concatenate([bytes_to_ndarray(part).flatten() for part in parts[1:]]).astype(float))
    assert len(masked) == NUM_SITES
    # Each masked vector, and each sum of two, is uniform and uncorrelated with every update.
    pairs = [(masked[i] + masked[j]) % 2**32 for i, j in ((0, 1), (0, 2), (1, 2))]
    for vector in [*masked, *pairs]:
        assert len(vector) == len(changes[0])
        assert np.quantile(vector / 2**32, [0.1, 0.5, 0.9]) == pytest.approx([0.1, 0.5, 0.9], abs=0.02)
        for change in changes:
            assert abs(np.corrcoef(vector, change)[0, 1]) < 5 / len(vector) ** 0.5


def test_run_repeats_bitwise_and_is_close_to_plain_run(
    nodes: Sites, single_process: Run, options: list[str], tmp_path: Path
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    nodes.server(one, secure=SECURE).run()
    other = behind_apps(Sites(tmp_path / "other", options, single_process.folder / "local"))
    with pytest.raises(ServerStoppedError):
        other.server(two, RecordingObserver(stop_after=1), secure=SECURE).run()
    other.server(two, secure=SECURE).run()
    assert has_equal_metrics(one, two)
    assert has_equal_server_state(one, two)
    proxy = last_server_state(one)
    for name, tensor in single_process.orchestrator.method.server_state.items():
        torch.testing.assert_close(proxy[name], tensor, rtol=0, atol=1e-3)
    assert ROUND not in {request.metadata.message_type for request in nodes.grid.requests}


PARTIAL = ["--data.num_clients=5", "--participation=0.6"]
LOOKS = ["--do_no_harm.looks=2", "--rounds=3"]


@pytest.mark.parametrize("more", [[], PARTIAL, [*PARTIAL, *LOOKS]], ids=["all", "three of five", "do-no-harm"])
def test_run_equals_rounded_engine(more: list[str], options: list[str], tmp_path: Path, single_process: Run) -> None:
    all_options = [*options, *more]
    baselines = None if more else single_process.folder / "local"
    nodes = behind_apps(Sites(tmp_path, all_options, baselines, 5 if more else NUM_SITES))
    nodes.server(tmp_path / "sites", secure=SecureAggregation()).run()
    parts = {**parts_of(all_options), "engine": RoundedEngine}
    Orchestrator(**parts, output=tmp_path / "single", baseline_dir=tmp_path / "local").run()
    assert has_equal_metrics(tmp_path / "sites", tmp_path / "single")
    assert has_equal_server_state(tmp_path / "sites", tmp_path / "single")


@pytest.mark.parametrize("fault", [request_lost, site_error])
def test_run_lost_site_of_three_keeps_server_state(fault: Any, one_secure_round: Sites) -> None:
    one_secure_round.grid.intercept = in_stage(1, Stage.SHARE_KEYS, fault)
    initial, final, observer = run_once(one_secure_round)
    assert is_equal(final, initial)
    assert observer.rows[0]["comm/updates"] == 0
    error = "site 1 failed: <class 'OSError'>:<'the disk is full'>"
    assert observer.warnings[0] == ("site 1 did not reply within 60 s" if fault is request_lost else error)
    assert "round 0: no valid reply from site 0, 1, 2; left out of this round" in observer.warnings


@pytest.mark.parametrize("fault", [site_error, reply_late])
def test_run_next_round_after_fault_is_complete(fault: Any, nodes: Sites) -> None:
    nodes.grid.intercept = in_stage(1, COLLECT, fault)
    nodes.server(observer=(observer := RecordingObserver()), secure=SECURE).run()
    assert [row["comm/updates"] for row in observer.rows] == [0, 3]


def test_run_offline_site_is_named(nodes: Sites) -> None:
    offline = nodes.grid.nodes[NODES[2]]

    def before(round_idx: int) -> None:
        if round_idx == 0:
            del nodes.grid.nodes[NODES[2]]
        else:
            nodes.grid.nodes[NODES[2]] = offline

    nodes.server(observer=(observer := RecordingObserver(before)), secure=SECURE).run()
    assert [row["comm/updates"] for row in observer.rows] == [0, 3]
    assert observer.warnings[0].startswith("site 2 failed")


def test_run_invalid_result_is_reported_after_sum(nodes: Sites) -> None:
    def send_invalid(message: Message, reply: Reply) -> Message:
        changed = reply()
        changed.content["fitres.metrics"] = ConfigRecord({"values": '{"client": 2}'})
        return changed

    nodes.grid.intercept = in_stage(1, COLLECT, send_invalid)
    nodes.server(observer=(observer := RecordingObserver()), secure=SECURE).run()
    assert [row["comm/updates"] for row in observer.rows] == [2, 3]
    assert observer.warnings[0].startswith("rejected the reply of site 1, but its update is in the mean: ")


def test_run_site_error_reason_is_reported(one_secure_round: Sites) -> None:
    def refuse(message: Message, context: Context, call_next: Any) -> Message:
        return Message(Error(1, "first line\nrefused by a mod of this site"), reply_to=message)

    one_secure_round.grid.nodes[NODES[1]] = Node(one_secure_round, 1, refuse)
    assert "refused by a mod of this site" in run_once(one_secure_round)[2].warnings[0]


def test_run_mods_apply_before_masking(one_secure_round: Sites) -> None:
    clip = LocalDpMod(clipping_norm=0.01, sensitivity=0.0, epsilon=1.0, delta=1e-5)
    initial, mean, observer = run_once(behind_apps(one_secure_round, clip))
    assert not observer.warnings
    assert 0.001 < float((flat(mean) - flat(initial)).norm()) <= 0.0101


@pytest.mark.parametrize("configured_by", ["run", "node"])
def test_client_app_secure_site_refuses_unmasked_round(configured_by: str, sites: Sites) -> None:
    node = Node(sites, 0, secure=configured_by == "run")
    node.context.node_config.update({"secure": True} if configured_by == "node" else {})
    message = Message(pack({"round": 0, "version": 0, "comparison": None}, {}), NODES[0], ROUND)
    with pytest.raises(UserError, match="secure: this site sends updates by secure aggregation only"):
        node(over_wire(message))


def test_client_app_message_outside_protocol_is_refused(nodes: Sites) -> None:
    fit = FitIns(ndarrays_to_parameters([]), {"values": "{}", "names": "[]", "max_change": 8.0})
    message = Message(fitins_to_recorddict(fit, keep_input=True), NODES[0], "train.default")
    with pytest.raises(UserError, match=r"'train\.default' is not part of secure aggregation"):
        nodes.grid.nodes[NODES[0]](over_wire(message))  # type: ignore[operator]


UNSUPPORTED = {
    "--method.aggregator=fedekd.functional.CoordinateMedian": "secure: expected a method that .* got FedeKD as config",
    "--method=CAFEDistill": "secure: expected a method that needs only the uniform mean .* got CAFEDistill",
    "--wire_dtype=float16": r"wire_dtype: expected float32 with secure=true, got float16\. A masked update",
    "--update_loss_rate=0.1": r"update_loss_rate: expected 0 with secure=true, got 0\.1",
    "--participation=0.67": "secure: expected 3 to 1023 sites per round, got 2",
}


@pytest.mark.parametrize("option", UNSUPPORTED)
def test_serve_unsupported_option_raises_before_training(option: str, sites: Sites) -> None:
    for number in range(NUM_SITES):
        sites.start(number, options=[option])
    settings = Settings((*sites.options, option), NUM_SITES, secure=True, wait=0.0)
    with pytest.raises(UserError, match=UNSUPPORTED[option]):
        serve(sites.grid, settings)
    assert {request.metadata.message_type for request in sites.grid.requests} <= {DESCRIBE}
