"""FlowerEngine gives the results of a single-process run, and handles faults of the sites and the grid."""

from __future__ import annotations

import csv
import math
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("flwr")

from flwr.app import Array, Error, Message, RecordDict

from fedekd.atomic import unseal
from fedekd.errors import UserError
from fedekd.federation import Orchestrator, RoundRequest
from fedekd.federation.checkpoint import unpack
from fedekd.federation.engines.worker import StateStore
from fedekd.flower import engine as flower_engine
from fedekd.flower.apps import Settings, serve
from fedekd.flower.description import SPLITS
from fedekd.flower.engine import wait_for_sites
from fedekd.flower.messages import (
    BASELINE,
    DESCRIBE,
    LAST_ROUND,
    ROUND,
    SCORE,
    STATE,
    VALUES,
    arrays_of,
    from_arrays,
    pack,
    to_arrays,
    values_of,
)
from fedekd.reporting import Display

from .conftest import (
    NODES,
    NUM_SITES,
    FakeGrid,
    Interceptor,
    RecordingObserver,
    Reply,
    Run,
    ServerStoppedError,
    Sites,
    error_reply,
    in_round,
    is_equal,
    reply_late,
    request_lost,
    run_in_process,
    site_error,
    site_offline,
    with_arrays,
    with_json,
    with_values,
)

pytestmark = pytest.mark.flower


def figures(summary: dict[str, Any]) -> str:
    """A summary without duration and path, as text, in which NaN equals NaN."""
    return repr({name: value for name, value in summary.items() if name not in ("seconds", "dataset")})


def assert_equal_runs(sites: Sites, orchestrator: Orchestrator, output: Path, expected: Run) -> None:
    """Metrics, server state and client states are equal."""
    assert (output / "metrics.csv").read_bytes() == (expected.folder / "metrics.csv").read_bytes()
    assert is_equal(orchestrator.method.server_state, expected.orchestrator.method.server_state)
    states = expected.client_states()
    assert sorted(states) == list(range(NUM_SITES))
    for number, state in states.items():
        assert is_equal(sites.newest_state(number), state), number


def test_run_equals_single_process(options: list[str], single_process: Run, tmp_path: Path) -> None:
    sites, observer = Sites(tmp_path, options), RecordingObserver()  # the sites train their baselines
    server = sites.server(tmp_path / "run", observer)
    summary = server.run()
    assert_equal_runs(sites, server, tmp_path / "run", single_process)
    assert figures(summary) == figures(single_process.summary)
    assert not observer.warnings
    assert [row["comm/updates"] for row in observer.rows] == [3, 3]
    evaluation = sites.server(tmp_path / "run").evaluate_checkpoint()
    assert (evaluation["clients"], evaluation["delta"]) == (summary["clients"], summary["delta"])


METHODS = {
    "exits and do-no-harm": ["--method=SafeKD", "--client.exits=2", "--do_no_harm=true"],
    "personal broadcast": ["--method=DepthFL", "--client.exits=2", "--client.depths=[1, 2, 2]"],
    "nothing sent": ["--method=Local"],
    "ensemble with references": ["--method=ProxyEnsemble", "--baseline.tune=true", "--baseline.epochs=2"],
    "two proxies": ["--method.cross_fit=true", "--method.gate=correctness_shuffled"],
    "partial participation": ["--participation=0.5", "--do_no_harm.looks=2"],
    "best round and schedule": [
        *("--select_round=best", "--baseline.control=true", "--trainer.gradient_clip_val=0.1"),
        *("--client.scheduler=StepLR", "--client.scheduler.step_size=1", "--client.scheduler.gamma=1000"),
    ],
}


@pytest.mark.parametrize("what", METHODS)
def test_run_other_methods_equal_single_process(what: str, options: list[str], tmp_path: Path) -> None:
    all_options = [*options, *METHODS[what]]
    expected = run_in_process(all_options, tmp_path / "single")
    sites = Sites(tmp_path, all_options)
    server = sites.server(tmp_path / "run")
    assert figures(server.run()) == figures(expected.summary)
    assert_equal_runs(sites, server, tmp_path / "run", expected)


def test_serve_runs_once_and_waits_only_in_rounds(sites: Sites, single_process: Run, tmp_path: Path) -> None:
    settings = Settings(tuple(sites.options), NUM_SITES, output=str(tmp_path / "run"), timeout=7.5, wait=0.0)
    summary = serve(sites.grid, settings)
    assert figures(summary) == figures(single_process.summary)
    assert (tmp_path / "run/metrics.csv").read_bytes() == (single_process.folder / "metrics.csv").read_bytes()
    # Before and after the rounds the server needs all replies.
    assert [timeout for timeout in sites.grid.timeouts if timeout[0] != DESCRIBE] == [
        (BASELINE, None),
        (ROUND, 7.5),
        (ROUND, 7.5),
        (LAST_ROUND, None),
    ]
    sites.grid.nodes.clear()  # a finished run needs no sites
    assert figures(serve(sites.grid, settings)) == figures(summary)


def test_run_site_with_other_private_model(sites: Sites, tmp_path: Path) -> None:
    sites.start(1, options=["--client.private_model=fedekd.models.ProxyCNN"])
    sites.server(tmp_path / "run", observer := RecordingObserver()).run()
    assert not observer.warnings
    assert [row["comm/updates"] for row in observer.rows] == [3, 3]
    shapes = [sites.newest_state(number)["networks"]["private"]["head.weight"].shape for number in (0, 1)]
    assert shapes[0] != shapes[1]


def all_arrays(messages: Sequence[Message]) -> list[tuple[str, torch.Tensor]]:
    """Every array in the messages, in any record."""
    records = [record for message in messages for record in message.content.array_records.values()]
    return [pair for record in records for pair in from_arrays(record).items()]


def all_tensors(state: Any) -> list[torch.Tensor]:
    """Every tensor in a nested state."""
    if isinstance(state, torch.Tensor):
        return [state]
    parts = state.values() if isinstance(state, dict) else state if isinstance(state, list | tuple) else ()
    return [tensor for part in parts for tensor in all_tensors(part)]


REPLY_VALUES = {
    DESCRIBE: {"site", "config", "sizes", "class_counts", "digest", "name", "class_names", "columns"},
    BASELINE: {"metrics"},
    SCORE: {"metrics"},
    ROUND: {"client", "score", "supervised_rounds", "logs", "tradeoff", "comparison", "metrics", "num_samples"}
    | {"deployed_metrics"},
}
REPLY_VALUES[LAST_ROUND] = REPLY_VALUES[ROUND]


def test_messages_contain_proxy_but_nothing_private(sites: Sites, tmp_path: Path) -> None:
    states: list[Any] = []

    def record_states(message: Message, reply: Reply) -> Message:
        result = reply()
        for number in range(NUM_SITES):
            states.extend(unpack(unseal(path.read_bytes())) for path in sites.versions(number).values())
        return result

    sites.grid.intercept = record_states
    server = sites.server(tmp_path / "run")
    summary = server.run()
    sent = [
        sum(tensor.numel() * tensor.element_size() for _, tensor in all_arrays(messages))
        for messages in (sites.grid.requests, sites.grid.replies)
    ]
    assert [summary["bytes_down"], summary["bytes_up"]] == sent
    assert sent[0] == sent[1] * 3 // 2 > 0

    assert server.evaluate_checkpoint()["mean"] > 0
    messages = [*sites.grid.requests, *sites.grid.replies]
    assert {message.metadata.message_type for message in messages} == set(REPLY_VALUES)

    proxy = {name: (tensor.shape, tensor.dtype) for name, tensor in server.method.server_state.items()}
    arrays = all_arrays(messages)
    assert len(arrays) == len(proxy) * (2 * 2 * NUM_SITES + NUM_SITES)  # both ways in two rounds, one way in the last
    for name, tensor in arrays:
        assert (tensor.shape, tensor.dtype) == proxy[name]
    private = [
        tensor for state in states for part in state for tensor in all_tensors(state[part]) if part != "networks"
    ]
    private += [tensor for state in states for tensor in state["networks"]["private"].values()]
    assert len(private) > 100
    assert set(states[0]["networks"]) == {"private", "proxy"}
    assert not any(tensor.numel() > 1 and torch.equal(tensor, other) for _, tensor in arrays for other in private)

    for message in messages:
        assert set(message.content) <= {VALUES, STATE}
        assert list(message.content.config_records[VALUES]) == ["json"]
        assert len(str(message.content.config_records[VALUES]["json"])) < 3000
    for reply in sites.grid.replies:
        assert set(values_of(reply)) == REPLY_VALUES[reply.metadata.message_type]


def stop_server(message: Message, reply: Reply) -> Message:
    """The server ends after this site has done its work."""
    reply()
    raise ServerStoppedError


STOPS: dict[str, tuple[Interceptor | None, int | None, list[int]]] = {
    "after round 1": (None, 1, [2, 2, 2]),
    "in round 1": (in_round(1, 1, stop_server), None, [2, 2, 1]),
    "in the last round": (in_round(1, 2, stop_server), None, [3, 3, 2]),
}


@pytest.mark.parametrize("when", STOPS)
def test_run_restarted_server_resumes_with_equal_result(
    when: str, sites: Sites, single_process: Run, tmp_path: Path
) -> None:
    interceptor, stop_after, versions = STOPS[when]
    default = sites.grid.intercept
    sites.grid.intercept = interceptor or default
    with pytest.raises(ServerStoppedError):
        sites.server(tmp_path / "run", RecordingObserver(stop_after=stop_after)).run()
    assert [max(sites.versions(number)) for number in range(NUM_SITES)] == versions
    sites.grid.intercept = default
    sites.grid.requests.clear()
    sites.start(0)  # a new process has nothing in memory
    server = sites.server(tmp_path / "run")
    assert figures(server.run()) == figures(single_process.summary)
    assert_equal_runs(sites, server, tmp_path / "run", single_process)
    assert 0 not in [values_of(request).get("round") for request in sites.grid.requests]
    assert {request.metadata.message_type for request in sites.grid.requests} <= {DESCRIBE, ROUND, LAST_ROUND}


@pytest.mark.parametrize("name", ["metrics.csv", "checkpoints/manifest-0003.json"])
def test_serve_damaged_finished_run_is_repaired(
    name: str, sites: Sites, options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], undrawn: None
) -> None:
    settings = Settings(tuple(options), NUM_SITES, output=str(tmp_path / "run"))
    summary = serve(sites.grid, settings)
    metrics = (tmp_path / "run/metrics.csv").read_bytes()
    (tmp_path / "run" / name).unlink()
    assert figures(serve(sites.grid, settings)) == figures(summary)
    assert "; repairing the run" in capsys.readouterr().err
    assert (tmp_path / "run/metrics.csv").read_bytes() == metrics
    assert serve(sites.grid, settings)["mean"] == summary["mean"]
    assert "is finished; nothing to do" in capsys.readouterr().out


@pytest.fixture(scope="module")
def without_site_1(
    options: list[str], single_process: Run, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[int], Path]:
    """Run folder of a federation in which site 1 is missing from one round."""
    folders: dict[int, Path] = {}

    def run(round_idx: int) -> Path:
        if round_idx not in folders:
            folders[round_idx] = tmp_path_factory.mktemp(f"without-{round_idx}")
            sites = Sites(folders[round_idx], options, single_process.folder / "local")
            sites.grid.intercept = in_round(1, round_idx, request_lost)
            sites.server(folders[round_idx] / "run").run()
        return folders[round_idx] / "run"

    return run


def full_disk(message: Message, reply: Reply) -> Message:
    """The site trains, and cannot write its state."""

    def write(*arguments: Any) -> None:
        raise OSError("the disk is full")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StateStore, "write", write)
        return reply()


FAULTS: dict[str, tuple[Interceptor, list[str]]] = {
    "late": (reply_late, []),
    "full disk": (full_disk, [r"site 1 failed: <class 'OSError'>:<'the disk is full'>"]),
    "offline": (site_offline, [r"site 1 failed: .*Node Unavailable"]),
}
MISSING_1 = "no valid reply from site 1; left out of this round"


@pytest.mark.parametrize(("fault", "round_idx"), [("late", 0), ("late", 1), ("full disk", 1), ("offline", 0)])
def test_run_site_fault_equals_missing_site(
    fault: str, round_idx: int, sites: Sites, without_site_1: Callable[[int], Path], tmp_path: Path
) -> None:
    interceptor, reasons = FAULTS[fault]
    sites.grid.intercept = in_round(1, round_idx, interceptor)
    summary = sites.server(tmp_path / "run", observer := RecordingObserver()).run()
    *warnings, last = observer.warnings
    assert last == f"round {round_idx}: {MISSING_1}"
    assert len(warnings) == len(reasons)
    assert all(re.match(*pair) for pair in zip(reasons, warnings, strict=True))
    assert [row["comm/updates"] for row in observer.rows] == ([2, 3] if round_idx == 0 else [3, 2])
    assert [client["client"] for client in summary["clients"]] == [0, 1, 2]
    assert (tmp_path / "run/metrics.csv").read_bytes() == (without_site_1(round_idx) / "metrics.csv").read_bytes()
    assert [max(sites.versions(number)) for number in range(NUM_SITES)] == [3, 2, 3]


def metrics_rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_metrics_missing_site_has_empty_cells(without_site_1: Callable[[int], Path], single_process: Run) -> None:
    first, second = metrics_rows(without_site_1(1))
    expected = metrics_rows(single_process.folder)[0]
    assert first["client_1/accuracy"] == ""
    assert float(second["client_1/accuracy"]) > 0
    site_0 = [name for name in first if name.startswith("client_0/")]
    assert [first[name] for name in site_0] == [expected[name] for name in site_0]


def responding(server: Orchestrator) -> list[int]:
    """Run round 0 and return the sites with a valid result."""
    server.method.init_server(server.spec)
    participants = list(range(NUM_SITES))
    request = RoundRequest(participants, server.method.broadcast(participants, 0), 0, True)
    return sorted(result.client for result in server.engine.run_clients(request))


@pytest.mark.parametrize(("quorum", "is_met"), [(2, True), (3, False)])
def test_run_quorum_counts_received_updates(
    quorum: int, is_met: bool, options: list[str], single_process: Run, tmp_path: Path
) -> None:
    sites = Sites(tmp_path, [*options, "--rounds=1", f"--quorum={quorum}"], single_process.folder / "local")
    sites.grid.intercept = in_round(1, 0, request_lost)
    server = sites.server(observer=(observer := RecordingObserver()))
    server.run()
    assert any("quorum" in warning for warning in observer.warnings) is not is_met
    initial = server.spec.build_model("proxy", "server").state_dict()
    assert is_equal(dict(server.method.server_state), dict(initial)) is not is_met
    assert observer.rows[0]["comm/updates"] == 2


def test_run_restarted_site_with_new_node_id_continues(sites: Sites, single_process: Run, tmp_path: Path) -> None:
    def before(round_idx: int) -> None:
        if round_idx == 1:
            del sites.grid.nodes[NODES[1]]
            sites.start(1, node=77)
            sites.grid.nodes[78] = lambda message: description(7)  # an unknown site

    server = sites.server(tmp_path / "run", observer := RecordingObserver(before))
    server.run()
    assert not observer.warnings
    assert_equal_runs(sites, server, tmp_path / "run", single_process)
    nodes = [m.metadata.dst_node_id for m in sites.grid.requests if m.metadata.message_type == ROUND]
    assert [nodes.count(node) for node in (NODES[1], 77, 78)] == [1, 1, 0]


def test_run_site_offline_for_one_round_takes_part_again(
    sites: Sites, without_site_1: Callable[[int], Path], tmp_path: Path
) -> None:
    def before(round_idx: int) -> None:
        if round_idx == 1:
            del sites.grid.nodes[NODES[1]]
        elif round_idx == 2:
            sites.start(1)

    sites.server(tmp_path / "run", observer := RecordingObserver(before)).run()
    assert observer.warnings[-1] == f"round 1: {MISSING_1}"
    assert (tmp_path / "run/metrics.csv").read_bytes() == (without_site_1(1) / "metrics.csv").read_bytes()


def raise_error(message: Message) -> Any:
    raise OSError("no data here")


@pytest.mark.parametrize(
    "reply",
    [raise_error, lambda message: pack({}), lambda message: pack({"site": "x"})],
    ids=["error", "empty", "text"],
)
def test_run_new_node_without_description_is_ignored(reply: Any, sites: Sites) -> None:
    server = sites.server()
    del sites.grid.nodes[NODES[1]]
    sites.grid.nodes[77] = reply
    assert responding(server) == [0, 2]


def test_run_restarted_site_with_other_settings_is_left_out(sites: Sites) -> None:
    server = sites.server(observer=(observer := RecordingObserver()))
    del sites.grid.nodes[NODES[1]]
    sites.start(1, node=77, options=["--seed=1"])  # another partition and another configuration
    assert responding(server) == [0, 2]
    assert observer.warnings[0] == "site 1 reconnected with other data or settings; left out"


def test_run_missing_site_in_last_round_raises_and_resumes(sites: Sites, single_process: Run, tmp_path: Path) -> None:
    default = sites.grid.intercept
    sites.grid.intercept = in_round(1, 2, site_error)
    message = r"round 2: no valid reply from site 1\. The last round needs every site: start the sites"
    with pytest.raises(UserError, match=message) as caught:
        sites.server(tmp_path / "run", observer := RecordingObserver()).run()
    assert "\n" not in str(caught.value)
    assert len(observer.warnings) == 1
    assert not (tmp_path / "run/summary.json").exists()
    sites.grid.intercept = default
    sites.start(1)
    server = sites.server(tmp_path / "run")
    server.run()
    assert_equal_runs(sites, server, tmp_path / "run", single_process)


def test_run_site_with_deleted_state_is_reported(sites: Sites, tmp_path: Path) -> None:
    def before(round_idx: int) -> None:
        if round_idx == 1:
            shutil.rmtree(tmp_path / "hospital-1/site-001/states")

    with pytest.raises(UserError, match=r"site 1\. The last round needs every site"):
        sites.server(tmp_path / "run", observer := RecordingObserver(before)).run()
    assert observer.warnings[0].startswith("site 1 failed: ")
    assert "site 1: version 1 of the client state is not in" in observer.warnings[0]
    assert observer.warnings[1] == f"round 1: {MISSING_1}"


def baseline_of_site_2(interceptor: Interceptor) -> Interceptor:
    def intercept(message: Message, reply: Reply) -> Message | None:
        matches = message.metadata.message_type == BASELINE and message.metadata.dst_node_id == NODES[2]
        return interceptor(message, reply) if matches else reply()

    return intercept


@pytest.mark.parametrize(
    "interceptor",
    [
        site_error,
        *(with_values(metrics={"accuracy": scores}) for scores in ([], [0.5], ["a", "b"], "ab", None)),
        *(with_values(metrics=metrics) for metrics in ({}, [0.5, 0.5], None)),
    ],
    ids=["error", "none", "too few", "text", "string", "null", "no metrics", "a list", "null metrics"],
)
def test_local_baselines_invalid_reply_raises(interceptor: Interceptor, sites: Sites) -> None:
    sites.grid.intercept = baseline_of_site_2(interceptor)
    with pytest.raises(UserError, match=r"no local baseline from site 2\. Start the sites and repeat the command"):
        sites.server().engine.local_baselines(dict.fromkeys(range(NUM_SITES), 2))


def with_tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Interceptor:
    """Change the tensors of the reply."""

    def replace(record: dict[str, Array]) -> None:
        state = from_arrays(record)
        change(state)
        record.clear()
        record.update(to_arrays(state))

    return with_arrays(replace)


def with_bytes(data: bytes, name: str = "head.bias") -> Interceptor:
    """Replace the bytes of one array."""
    return with_arrays(lambda record: record.update({name: Array("float32", (3,), "numpy.ndarray", data)}))


#: Updates that the update validator rejects, and a part of the warning.
INVALID_UPDATES: dict[str, tuple[Interceptor, str]] = {
    "NaN": (with_tensors(lambda state: state["head.weight"][1].fill_(math.nan)), r"'head\.weight'"),
    "dtype": (with_tensors(lambda state: state.update({"head.bias": state["head.bias"].double()})), "torch.float64"),
    "no tensors": (with_tensors(lambda state: state.clear()), r"'convolutions\.0\.bias'"),
    "unexpected": (with_tensors(lambda state: state.update(private=torch.zeros(1))), "'private'"),
}


@pytest.mark.parametrize("what", INVALID_UPDATES)
def test_run_invalid_update_is_rejected_and_not_in_mean(what: str, one_round: Sites) -> None:
    interceptor, reason = INVALID_UPDATES[what]
    one_round.grid.intercept = in_round(1, 0, interceptor)
    server = one_round.server(observer=(observer := RecordingObserver()))
    summary = server.run()
    [warning] = observer.warnings
    assert re.match(f"round 1: .*client 1.*{reason}", warning)
    assert observer.rows[0]["comm/updates"] == 2
    assert math.isfinite(summary["mean"])
    assert len(summary["clients"]) == 3
    sent = {
        reply.metadata.src_node_id: from_arrays(arrays_of(reply))
        for reply in one_round.grid.replies
        if reply.metadata.message_type == ROUND and reply.metadata.src_node_id != NODES[1]
    }
    for name, tensor in server.method.server_state.items():
        mean = (sent[NODES[0]][name].double() + sent[NODES[2]][name].double()) / 2
        torch.testing.assert_close(tensor, mean.float(), rtol=0, atol=1e-7)


REJECTED = "rejected the reply of site 1: "
#: Replies that the engine rejects, and the warning.
INVALID_REPLIES: dict[str, tuple[Interceptor, str]] = {
    "error": (site_error, r"site 1 failed: <class 'OSError'>:<'the disk is full'>$"),
    "error without reason": (
        lambda message, reply: Message(Error(2, " \n"), reply_to=message),
        "site 1 failed: no reason given$",
    ),
    "offline": (site_offline, r"site 1 failed: .*Node Unavailable"),
    "other client": (with_values(client=0), f"{REJECTED}expected the result of client 1, got client 0$"),
    "no client": (with_values(client="me"), f"{REJECTED}invalid client result: ValueError"),
    "score": (with_values(score="0.9"), f"{REJECTED}invalid client result: ValueError"),
    "null metrics": (with_values(metrics=None), f"{REJECTED}invalid client result: ValueError"),
    "text as a metric": (with_values(metrics={"accuracy": "0.9"}), f"{REJECTED}invalid client result: ValueError"),
    "unknown field": (with_values(surprise=1), f"{REJECTED}invalid client result: TypeError"),
    "invalid JSON": (with_json("[1"), f"{REJECTED}message with invalid JSON values: JSONDecodeError"),
    "no JSON object": (with_json("[1]"), f"{REJECTED}message values: expected a JSON object, got list$"),
    "large": (with_bytes(b"?" * 2**14), rf"{REJECTED}update of 22\d,\d+ bytes, but 208,396 bytes were sent$"),
    "text": (with_bytes(b"no array at all"), f"{REJECTED}array with an unreadable header"),
    "truncated": (with_bytes(to_arrays({"a": torch.zeros(3)})["a"].data[:-2]), f"{REJECTED}array of shape"),
    "no bytes": (with_bytes(b""), f"{REJECTED}array with an unreadable header"),
    "zip": (with_bytes(b"PK\x03\x04 and no more"), f"{REJECTED}array with an unreadable header"),
    "surrogate": (with_json('{"logs": {"\\ud800": 1.0}}'), f"{REJECTED}message with invalid JSON values: Unicode"),
    "log name": (with_values(logs={"a b": 1.0}), f"{REJECTED}invalid client result: ValueError logs: expected names"),
    "many logs": (with_values(logs=dict.fromkeys(map(str, range(300)), 1.0)), f"{REJECTED}invalid client result"),
}


def test_run_site_with_other_number_of_samples_is_not_averaged(one_round: Sites) -> None:
    one_round.grid.intercept = in_round(1, 0, with_values(num_samples=2**53 - 1))
    one_round.server(observer=(observer := RecordingObserver())).run()
    [warning] = observer.warnings
    assert re.match(r"round 1: update of client 1 rejected: num_samples: expected \d+, got 9007199254740991$", warning)


def test_display_error_of_site_has_no_control_characters(one_round: Sites, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(message: Message, reply: Reply) -> Message:
        return error_reply(message, OSError("\x1b[2J\x1b]0;owned\x07 \u202e txt"))

    one_round.grid.intercept = in_round(1, 0, fail)
    with Display(quiet=True) as display:
        one_round.server(observer=display).run()
    printed = capsys.readouterr().err
    assert "site 1 failed" in printed
    assert all(line.isprintable() for line in printed.splitlines())


@pytest.mark.parametrize("what", INVALID_REPLIES)
def test_run_clients_invalid_reply_is_rejected_and_named(
    what: str, sites: Sites, monkeypatch: pytest.MonkeyPatch
) -> None:
    interceptor, message = INVALID_REPLIES[what]
    monkeypatch.setattr(flower_engine, "_HEADER_BYTES", 2**12)
    sites.grid.intercept = in_round(1, 0, interceptor)
    server = sites.server(observer=(observer := RecordingObserver()))
    assert responding(server) == [0, 2]
    warning, last = observer.warnings
    assert re.match(message, warning)
    assert "\n" not in warning
    assert last == f"round 0: {MISSING_1}"


def description(site: int) -> RecordDict:
    """A minimal description."""
    return pack(
        {
            "site": site,
            "config": {"fedekd": "1"},
            "sizes": {**dict.fromkeys(SPLITS, 1), "validation": 3},
            "class_counts": [5],
            "digest": "0" * 64,
        }
    )


def grid_with(*numbers: int) -> FakeGrid:
    """A grid with sites that only reply with their descriptions, at nodes 50, 51, ..."""
    grid = FakeGrid()
    grid.nodes = {50 + index: lambda message, n=number: description(n) for index, number in enumerate(numbers)}
    return grid


@pytest.fixture
def fake_time(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Clock that advances by one second per sleep and then calls `on_sleep`."""
    clock = SimpleNamespace(now=0.0, on_sleep=lambda: None, monotonic=lambda: clock.now)

    def sleep(seconds: float) -> None:
        clock.now += 1.0
        clock.on_sleep()

    clock.sleep = sleep
    monkeypatch.setattr(flower_engine, "time", clock)
    return clock


def test_wait_for_sites_polls_until_all_are_connected(fake_time: SimpleNamespace) -> None:
    grid = grid_with(1)
    arrivals = iter([(91, 0), (92, 2)])

    def arrive() -> None:
        node, number = next(arrivals)
        grid.nodes[node] = lambda message: description(number)

    fake_time.on_sleep = arrive
    nodes, descriptions = wait_for_sites(grid, 3, 10.0)
    assert list(nodes.items()) == [(0, 91), (1, 50), (2, 92)]
    assert {site: values["site"] for site, values in descriptions.items()} == {0: 0, 1: 1, 2: 2}
    assert len(grid.requests) == 3  # one request per site


def test_wait_for_sites_repeats_unanswered_request(fake_time: SimpleNamespace) -> None:
    grid = grid_with(0, 1)
    replies = iter([False, True])
    grid.intercept = lambda message, reply: (
        reply() if message.metadata.dst_node_id == 50 or next(replies) else request_lost(message, reply)
    )
    assert wait_for_sites(grid, 2, 10.0)[0] == {0: 50, 1: 51}


def test_wait_for_sites_restarted_site_counts_once(fake_time: SimpleNamespace) -> None:
    grid = grid_with(0)
    arrivals = iter([(91, 0), (92, 1)])

    def arrive() -> None:
        node, number = next(arrivals)
        grid.nodes.pop(50, None)
        grid.nodes[node] = lambda message: description(number)

    fake_time.on_sleep = arrive
    assert wait_for_sites(grid, 2, 10.0)[0] == {0: 91, 1: 92}


def test_wait_for_sites_timeout_raises() -> None:
    with pytest.raises(UserError, match=r"sites: expected 3 within 0 s, got 2\. Start the missing sites or raise wait"):
        wait_for_sites(grid_with(0, 1), 3, 0.0)


@pytest.mark.parametrize("numbers", [(0, 1, 1), (1, 2, 3), (0, 1, 2, 2)])
def test_wait_for_sites_invalid_numbers_raise(numbers: tuple[int, ...]) -> None:
    message = f"number: expected 0 to 2, one per site, got {', '.join(map(str, numbers))}. Correct number in each"
    with pytest.raises(UserError, match=re.escape(message)):
        wait_for_sites(grid_with(*numbers), 3, 0.0)


def test_wait_for_sites_site_error_names_reason() -> None:
    grid = grid_with(0, 1)

    def fail(message: Message) -> Any:
        raise UserError("data.dataset: no file '/data/images.npz'")

    grid.nodes[60] = fail
    message = r"a site sent no description: .*UserError'>:<'data\.dataset: no file '/data/images\.npz"
    with pytest.raises(UserError, match=message) as caught:
        wait_for_sites(grid, 3, 0.0)
    assert "\n" not in str(caught.value)


def test_run_float16_on_the_wire_equals_single_process(options: list[str], single_process: Run, tmp_path: Path) -> None:
    all_options = [*options, "--wire_dtype=float16"]
    expected = run_in_process(all_options, tmp_path / "single")
    sites, observer = Sites(tmp_path, all_options), RecordingObserver()
    server = sites.server(tmp_path / "run", observer)
    summary = server.run()
    assert figures(summary) == figures(expected.summary)
    assert_equal_runs(sites, server, tmp_path / "run", expected)
    assert not observer.warnings
    assert summary["bytes_up"] == single_process.summary["bytes_up"] / 2
    assert {tensor.dtype for _, tensor in all_arrays([*sites.grid.requests, *sites.grid.replies])} == {torch.float16}
