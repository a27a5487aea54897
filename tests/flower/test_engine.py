"""A federation of sites: the numbers of one in this process, whatever the grid between them does."""

from __future__ import annotations

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

from fedekd.errors import UserError
from fedekd.federation import Orchestrator, RoundRequest
from fedekd.federation.engines.client_store import ClientStore
from fedekd.federation.storage import unpack
from fedekd.flower import engine as flower_engine
from fedekd.flower.apps import Settings, serve
from fedekd.flower.description import SPLITS
from fedekd.flower.engine import wait_for_sites
from fedekd.flower.messages import (
    ABSORB,
    HELLO,
    REFERENCE,
    SCORE,
    STATE,
    VISIT,
    from_arrays,
    note_of,
    packed,
    state_of,
    to_arrays,
)

from .conftest import (
    NODES,
    SITES,
    Answer,
    FakeGrid,
    Hospitals,
    Meddler,
    StoppedError,
    Watch,
    altered,
    at,
    broken,
    dead,
    in_process,
    late,
    lost,
    noted,
    same,
    states,
    told,
)

pytestmark = pytest.mark.flower

Undisturbed = tuple[Orchestrator, dict[str, Any], Path]

#: What a summary may say otherwise: how long it took, and where the data lie.
_APART = ("seconds", "dataset")


def figures(summary: dict[str, Any]) -> str:
    """A summary's figures, NaN as NaN."""
    return repr({name: value for name, value in summary.items() if name not in _APART})


def newest(hospitals: Hospitals, number: int) -> Any:
    """The newest state on a site's disk."""
    return unpack(max(hospitals.versions(number).items())[1].read_bytes())


def assert_as_undisturbed(
    hospitals: Hospitals, run: Orchestrator, output: Path, other: Orchestrator, folder: Path
) -> None:
    """The same figures, the same server, the same clients."""
    assert (output / "metrics.csv").read_bytes() == (folder / "metrics.csv").read_bytes()
    assert same(run.method.server_state, other.method.server_state)
    clients = states(folder)
    assert sorted(clients) == list(range(SITES))
    for number, state in clients.items():
        assert same(newest(hospitals, number), state), number


def test_the_same_numbers_as_in_this_process(options: list[str], undisturbed: Undisturbed, tmp_path: Path) -> None:
    hospitals, watch = Hospitals(tmp_path, options), Watch()
    run = hospitals.server(tmp_path / "run", watch)
    summary = run.run()
    assert_as_undisturbed(hospitals, run, tmp_path / "run", undisturbed[0], undisturbed[2])
    assert figures(summary) == figures(undisturbed[1])
    assert not watch.warnings
    assert [row["comm/updates"] for row in watch.rows] == [3, 3]


METHODS = {
    "exits, and a local model kept": ["--method=SafeKD", "--client.exits=2", "--do_no_harm=true"],
    "a part for each client": ["--method=DepthFL", "--client.exits=2", "--client.depths=[1, 2, 2]"],
    "nothing travels": ["--method=Local"],
    "half of the sites in a round": ["--participation=0.5", "--do_no_harm.looks=2"],
}


@pytest.mark.parametrize("what", METHODS)
def test_so_it_is_with_any_method(what: str, options: list[str], tmp_path: Path) -> None:
    chosen = [*options, *METHODS[what]]
    other, expected = in_process(chosen, tmp_path / "one")
    hospitals = Hospitals(tmp_path, chosen)
    run = hospitals.server(tmp_path / "run")
    assert figures(run.run()) == figures(expected)
    assert_as_undisturbed(hospitals, run, tmp_path / "run", other, tmp_path / "one")


def test_as_flowers_runtime_starts_it(hospitals: Hospitals, undisturbed: Undisturbed, tmp_path: Path) -> None:
    settings = Settings(tuple(hospitals.options), SITES, output=str(tmp_path / "run"), timeout=7.5, wait=0.0)
    summary = serve(hospitals.grid, settings)
    assert figures(summary) == figures(undisturbed[1])
    assert (tmp_path / "run/metrics.csv").read_bytes() == (undisturbed[2] / "metrics.csv").read_bytes()
    # Without what is asked for before and after the rounds nothing could go on.
    assert [wait for wait in hospitals.grid.waited if wait[0] != HELLO] == [
        (REFERENCE, None),
        (VISIT, 7.5),
        (VISIT, 7.5),
        (ABSORB, None),
    ]
    hospitals.grid.nodes.clear()  # what is finished needs nobody
    assert figures(serve(hospitals.grid, settings)) == figures(summary)


def test_a_private_model_of_its_own(hospitals: Hospitals, tmp_path: Path) -> None:
    hospitals.open(1, options=["--client.private_model=fedekd.models.ProxyCNN"])
    watch = Watch()
    hospitals.server(tmp_path / "run", watch).run()
    assert not watch.warnings
    assert [row["comm/updates"] for row in watch.rows] == [3, 3]
    shapes = [newest(hospitals, number)["networks"]["private"]["head.weight"].shape for number in (0, 1)]
    assert shapes[0] != shapes[1]


def arrays(messages: Sequence[Message]) -> list[tuple[str, torch.Tensor]]:
    """Every array in messages, whatever record it is in."""
    records = [record for message in messages for record in message.content.array_records.values()]
    return [pair for record in records for pair in from_arrays(record).items()]


def tensors(state: Any) -> list[torch.Tensor]:
    """Every tensor in a nested state."""
    if isinstance(state, torch.Tensor):
        return [state]
    parts = state.values() if isinstance(state, dict) else state if isinstance(state, list | tuple) else ()
    return [tensor for part in parts for tensor in tensors(part)]


NOTES = {
    HELLO: {"number", "recipe", "sizes", "class_counts", "digest"},
    REFERENCE: {"scores"},
    SCORE: {"score"},
    VISIT: {"client", "score", "supervised_rounds", "logs", "tradeoff", "comparison", "num_samples"},
}
NOTES[ABSORB] = NOTES[VISIT]


def test_nothing_private_is_in_any_message(hospitals: Hospitals, tmp_path: Path) -> None:
    kept: list[Any] = []

    def watched(message: Message, answer: Answer) -> Message:
        reply = answer()
        for number in range(SITES):
            kept.extend(unpack(path.read_bytes()) for path in hospitals.versions(number).values())
        return reply

    hospitals.grid.meddle = watched
    run = hospitals.server(tmp_path / "run")
    run.run()
    assert run.evaluate_checkpoint()["mean"] > 0
    messages = [*hospitals.grid.sent, *hospitals.grid.answers]
    assert {message.metadata.message_type for message in messages} == set(NOTES)

    proxy = {name: (tensor.shape, tensor.dtype) for name, tensor in run.method.server_state.items()}
    found = arrays(messages)
    assert len(found) == len(proxy) * (2 * 2 * SITES + SITES)  # there and back in two rounds, and there once more
    for name, tensor in found:
        assert (tensor.shape, tensor.dtype) == proxy[name]
    private = [tensor for state in kept for part in state for tensor in tensors(state[part]) if part != "networks"]
    private += [tensor for state in kept for tensor in state["networks"]["private"].values()]
    assert len(private) > 100
    assert set(kept[0]["networks"]) == {"private", "proxy"}
    assert not any(tensor.numel() > 1 and torch.equal(tensor, own) for _, tensor in found for own in private)

    for message in messages:
        assert set(message.content) <= {"note", STATE}
        assert list(message.content.config_records["note"]) == ["json"]
        assert len(str(message.content.config_records["note"]["json"])) < 3000
    for answer in hospitals.grid.answers:
        assert set(note_of(answer)) == NOTES[answer.metadata.message_type]


def test_bytes_are_those_of_the_tensors(hospitals: Hospitals, tmp_path: Path) -> None:
    summary = hospitals.server(tmp_path / "run").run()
    down, up = (
        sum(tensor.numel() * tensor.element_size() for _, tensor in arrays(messages))
        for messages in (hospitals.grid.sent, hospitals.grid.answers)
    )
    assert (summary["bytes_down"], summary["bytes_up"]) == (down, up)
    assert down == up * 3 // 2 > 0


def stop(message: Message, answer: Answer) -> Message:
    """The server is gone after this site has done its work."""
    answer()
    raise StoppedError


STOPS: dict[str, tuple[Meddler | None, int | None, list[int]]] = {
    "after round 1": (None, 1, [2, 2, 2]),
    "within round 1": (at(1, 1, stop), None, [2, 2, 1]),
    "within the last round": (at(1, 2, stop), None, [3, 3, 2]),
}


@pytest.mark.parametrize("when", STOPS)
def test_a_new_server_goes_on_from_the_last_whole_round(
    when: str, hospitals: Hospitals, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    meddle, stop_after, written = STOPS[when]
    usual = hospitals.grid.meddle
    hospitals.grid.meddle = meddle or usual
    with pytest.raises(StoppedError):
        hospitals.server(tmp_path / "run", Watch(stop_after=stop_after)).run()
    assert [max(hospitals.versions(number)) for number in range(SITES)] == written
    hospitals.grid.meddle = usual
    hospitals.grid.sent.clear()
    hospitals.open(0)  # a process of its own keeps nothing in memory
    run = hospitals.server(tmp_path / "run")
    assert figures(run.run()) == figures(undisturbed[1])
    assert_as_undisturbed(hospitals, run, tmp_path / "run", undisturbed[0], undisturbed[2])
    rounds = [note_of(message).get("round") for message in hospitals.grid.sent]
    assert 0 not in rounds
    assert {message.metadata.message_type for message in hospitals.grid.sent} <= {HELLO, VISIT, ABSORB}


def test_rescored_is_as_scored(hospitals: Hospitals, undisturbed: Undisturbed, tmp_path: Path) -> None:
    hospitals.server(tmp_path / "run").run()
    again = hospitals.server(tmp_path / "run").evaluate_checkpoint()
    assert again["clients"] == undisturbed[1]["clients"]
    assert again["delta"] == undisturbed[1]["delta"]


@pytest.fixture(scope="module")
def without(
    options: list[str], undisturbed: Undisturbed, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[int], Path]:
    """The run folder of a federation that site 1 was missing from in one round, by the round."""
    folders: dict[int, Path] = {}

    def make(round_idx: int) -> Path:
        if round_idx not in folders:
            folders[round_idx] = tmp_path_factory.mktemp(f"without-{round_idx}")
            hospitals = Hospitals(folders[round_idx], options, undisturbed[2] / "local")
            hospitals.grid.meddle = at(1, round_idx, lost)
            hospitals.server(folders[round_idx] / "run").run()
        return folders[round_idx] / "run"

    return make


def full_disk(message: Message, answer: Answer) -> Message:
    """The site has trained, and cannot write down what has become of it."""

    def write(*arguments: Any) -> None:
        raise OSError("the disk is full")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ClientStore, "write", write)
        return answer()


NO_DISK = r"site 1 could not answer: <class 'OSError'>:<'the disk is full'>"
MISSING: dict[str, tuple[Meddler, list[str]]] = {
    "late": (late, []),
    "broken": (broken, [NO_DISK]),
    "full disk": (full_disk, [NO_DISK]),
    "dead": (dead, [r"site .* could not answer: .*Node Unavailable"]),
    "unreadable": (noted("{"), [r"refused the answer of site 1: a message without a readable note: JSONDecodeError"]),
}


@pytest.mark.parametrize(
    ("how", "round_idx"),
    [
        ("late", 0),
        ("late", 1),
        ("broken", 1),
        ("full disk", 1),
        ("dead", 0),
        ("unreadable", 1),
    ],
)
def test_a_site_that_is_missing_from_a_round_is_as_it_was(
    how: str, round_idx: int, hospitals: Hospitals, without: Callable[[int], Path], tmp_path: Path
) -> None:
    meddler, words = MISSING[how]
    hospitals.grid.meddle = at(1, round_idx, meddler)
    watch = Watch()
    summary = hospitals.server(tmp_path / "run", watch).run()
    *reasons, last = watch.warnings
    assert last == f"round {round_idx}: no usable answer from the sites 1; they are missing from this round"
    assert len(reasons) == len(words)
    assert all(re.match(*pair) for pair in zip(words, reasons, strict=True))
    assert [row["comm/updates"] for row in watch.rows] == ([2, 3] if round_idx == 0 else [3, 2])
    assert [client["client"] for client in summary["clients"]] == [0, 1, 2]
    assert (tmp_path / "run/metrics.csv").read_bytes() == (without(round_idx) / "metrics.csv").read_bytes()
    assert [max(hospitals.versions(number)) for number in range(SITES)] == [3, 2, 3]


def test_who_is_missing_from_round_1_has_no_row_in_it(without: Callable[[int], Path], undisturbed: Undisturbed) -> None:
    first, second = (without(1) / "metrics.csv").read_text().splitlines()[1:]
    header = (without(1) / "metrics.csv").read_text().splitlines()[0].split(",")
    rows = [dict(zip(header, row.split(","), strict=True)) for row in (first, second)]
    assert rows[0]["client_1/accuracy"] == ""
    assert float(rows[1]["client_1/accuracy"]) > 0
    other = (undisturbed[2] / "metrics.csv").read_text().splitlines()
    whole = dict(zip(other[0].split(","), other[1].split(","), strict=True))
    assert {name: rows[0][name] for name in header if name.startswith("client_0/")} == {
        name: value for name, value in whole.items() if name.startswith("client_0/")
    }


def visited(run: Orchestrator) -> list[int]:
    """The sites whose answers to a first visit come through."""
    run.method.init_server(run.spec)
    everyone = list(range(SITES))
    return sorted(
        visit.client
        for visit in run.engine.run_clients(RoundRequest(everyone, run.method.broadcast(everyone, 0), 0, True))
    )


def test_a_dead_site_is_named(hospitals: Hospitals) -> None:
    hospitals.grid.meddle = at(1, 0, dead)
    assert visited(hospitals.server(observer=(watch := Watch()))) == [0, 2]
    assert watch.warnings[0].startswith("site 1 could not answer")


@pytest.mark.parametrize(("quorum", "kept"), [(2, False), (3, True)])
def test_the_quorum_counts_what_has_arrived(
    quorum: int, kept: bool, options: list[str], undisturbed: Undisturbed, tmp_path: Path
) -> None:
    hospitals = Hospitals(tmp_path, [*options, "--rounds=1", f"--quorum={quorum}"], undisturbed[2] / "local")
    hospitals.grid.meddle = at(1, 0, lost)
    watch = Watch()
    run = hospitals.server(observer=watch)
    run.run()
    words = "round 1: 2 updates are fewer than the quorum of 3; the server keeps its state"
    assert (words in watch.warnings) is kept
    initial = run.spec.build_model("proxy", "server").state_dict()
    assert same(dict(run.method.server_state), dict(initial)) is kept
    assert watch.rows[0]["comm/updates"] == 2


def test_a_site_that_comes_back_as_another_node_is_found(
    hospitals: Hospitals, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    def before(round_idx: int) -> None:
        if round_idx == 1:
            del hospitals.grid.nodes[NODES[1]]
            hospitals.open(1, node=77)
            hospitals.grid.nodes[78] = lambda message: introduction(7)  # and so comes somebody unknown

    watch = Watch(before)
    run = hospitals.server(tmp_path / "run", watch)
    run.run()
    assert not watch.warnings
    assert_as_undisturbed(hospitals, run, tmp_path / "run", undisturbed[0], undisturbed[2])
    asked = [message.metadata.dst_node_id for message in hospitals.grid.sent if message.metadata.message_type == VISIT]
    assert [asked.count(node) for node in (NODES[1], 77, 78)] == [1, 1, 0]


def test_a_site_that_is_gone_for_a_round_is_asked_again(
    hospitals: Hospitals, without: Callable[[int], Path], tmp_path: Path
) -> None:
    def before(round_idx: int) -> None:
        if round_idx == 1:
            del hospitals.grid.nodes[NODES[1]]
        elif round_idx == 2:
            hospitals.open(1)

    watch = Watch(before)
    hospitals.server(tmp_path / "run", watch).run()
    assert watch.warnings[-1] == "round 1: no usable answer from the sites 1; they are missing from this round"
    assert (tmp_path / "run/metrics.csv").read_bytes() == (without(1) / "metrics.csv").read_bytes()


def test_a_broken_newcomer_ends_no_run(hospitals: Hospitals) -> None:
    def newcomer(message: Message) -> Any:
        raise OSError("no data here")

    run = hospitals.server()
    del hospitals.grid.nodes[NODES[1]]
    hospitals.grid.nodes[77] = newcomer
    assert visited(run) == [0, 2]


@pytest.mark.parametrize(
    "said",
    [
        {},
        {"number": "x"},
    ],
    ids=str,
)
def test_nor_does_one_that_says_nothing_of_use(said: dict[str, Any], hospitals: Hospitals) -> None:
    run = hospitals.server()
    del hospitals.grid.nodes[NODES[1]]
    hospitals.grid.nodes[77] = lambda message: packed(said)
    assert visited(run) == [0, 2]


def test_an_error_without_a_reason_is_told(hospitals: Hospitals) -> None:
    hospitals.grid.meddle = at(1, 0, lambda message, answer: Message(Error(2, " \n"), reply_to=message))
    assert visited(hospitals.server(observer=(watch := Watch()))) == [0, 2]
    assert watch.warnings[0].startswith("site 1 could not answer")


def test_who_comes_back_must_still_agree(hospitals: Hospitals) -> None:
    run = hospitals.server()
    del hospitals.grid.nodes[NODES[1]]
    hospitals.open(1, node=77, options=["--seed=1"])  # other data, and another recipe
    assert visited(run) == [0, 2]


def test_nobody_can_be_missing_in_the_end(hospitals: Hospitals, undisturbed: Undisturbed, tmp_path: Path) -> None:
    usual = hospitals.grid.meddle
    hospitals.grid.meddle = at(1, 2, broken)
    watch = Watch()
    words = "round 2: no usable answer from the sites 1, and the federation cannot end without them; start it again"
    with pytest.raises(UserError, match=words) as caught:
        hospitals.server(tmp_path / "run", watch).run()
    assert "\n" not in str(caught.value)
    assert len(watch.warnings) == 1
    assert not (tmp_path / "run/summary.json").exists()
    hospitals.grid.meddle = usual
    hospitals.open(1, node=NODES[1])
    run = hospitals.server(tmp_path / "run")
    run.run()
    assert_as_undisturbed(hospitals, run, tmp_path / "run", undisturbed[0], undisturbed[2])


def test_a_site_that_has_lost_its_networks_says_so(hospitals: Hospitals, tmp_path: Path) -> None:
    def before(round_idx: int) -> None:
        if round_idx == 1:
            shutil.rmtree(tmp_path / "hospital-1/site-001/states")

    watch = Watch(before)
    with pytest.raises(UserError, match="sites 1, and the federation cannot end without them"):
        hospitals.server(tmp_path / "run", watch).run()
    assert "site 1 could not answer" in watch.warnings[0]
    assert "site 1 has no version 1 of its networks in" in watch.warnings[0]
    assert watch.warnings[1] == "round 1: no usable answer from the sites 1; they are missing from this round"


def test_without_local_there_is_no_federation(hospitals: Hospitals) -> None:
    def meddle(message: Message, answer: Answer) -> Message:
        reference = message.metadata.message_type == REFERENCE and message.metadata.dst_node_id == NODES[2]
        return broken(message, answer) if reference else answer()

    hospitals.grid.meddle = meddle
    with pytest.raises(UserError, match="site 2 has no answer to what Local comes to there; start it again to go on"):
        hospitals.server().run()


@pytest.mark.parametrize("said", [[], [0.5], ["a", "b"], "ab", None], ids=str)
def test_scores_of_local_must_be_as_many_as_rounds(said: Any, hospitals: Hospitals) -> None:
    hospitals.grid.meddle = lambda message, answer: (
        told(scores=said)(message, answer)
        if message.metadata.message_type == REFERENCE and message.metadata.dst_node_id == NODES[2]
        else answer()
    )
    with pytest.raises(UserError, match="site 2"):
        hospitals.server().engine.local_baselines(dict.fromkeys(range(SITES), 2))


def with_tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Meddler:
    """The site sends other tensors."""

    def replaced(record: dict[str, Array]) -> None:
        state = from_arrays(record)
        change(state)
        record.clear()
        record.update(to_arrays(state))

    return altered(replaced)


def with_bytes(data: bytes, name: str = "head.bias") -> Meddler:
    """In place of one array the site sends these bytes."""

    def replaced(record: dict[str, Array]) -> None:
        record[name] = Array("float32", (3,), "numpy.ndarray", data)

    return altered(replaced)


GUARD, ENGINE = "round 1: refused the update of client 1: ", "refused the answer of site 1: "
CORRUPTED: dict[str, tuple[Meddler, str]] = {
    "NaN": (
        with_tensors(lambda state: state["head.weight"][1].fill_(math.nan)),
        rf"{GUARD}'head\.weight' holds values that are not finite",
    ),
    "infinite": (with_tensors(lambda state: state["head.bias"].fill_(-math.inf)), rf"{GUARD}'head\.bias' holds"),
    "shape": (
        with_tensors(lambda state: state.update({"head.bias": torch.zeros(5)})),
        rf"{GUARD}'head\.bias' has shape \(5,\) instead of \(3,\)",
    ),
    "kind": (
        with_tensors(lambda state: state.update({"head.bias": state["head.bias"].double()})),
        rf"{GUARD}'head\.bias' is torch\.float64 instead of torch\.float32",
    ),
    "missing": (with_tensors(lambda state: state.pop("head.bias")), rf"{GUARD}it lacks 'head\.bias'"),
    "none": (with_tensors(lambda state: state.clear()), rf"{GUARD}it lacks 'convolutions\.0\.bias'"),
    "extra": (
        with_tensors(lambda state: state.update(private=torch.zeros(1))),
        rf"{GUARD}it holds 'private', which the client was not sent",
    ),
    "another client": (told(client=0), rf"{ENGINE}it speaks for client 0"),
    "nobody": (told(client="me"), rf"{ENGINE}an answer that is no visit: ValueError"),
    "no visit": (told(surprise=1), rf"{ENGINE}an answer that is no visit: TypeError"),
    "note": (noted("[1"), rf"{ENGINE}a message without a readable note: JSONDecodeError"),
    "no note": (noted("[1]"), rf"{ENGINE}a message whose note is no JSON object"),
    "large": (
        with_bytes(b"?" * 2**14),
        rf"{ENGINE}its update has 22\d,\d+ bytes, and it was sent 208,396$",
    ),
    "text": (with_bytes(b"no array at all"), ENGINE),
    "cut": (with_bytes(to_arrays({"a": torch.zeros(3)})["a"].data[:-2]), rf"{ENGINE}an array of shape"),
    "nothing": (with_bytes(b""), ENGINE),
    "zip": (with_bytes(b"PK\x03\x04 and no more"), ENGINE),
}


@pytest.mark.parametrize("what", CORRUPTED)
def test_a_spoilt_update_is_refused_and_named(
    what: str, options: list[str], undisturbed: Undisturbed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    meddler, words = CORRUPTED[what]
    monkeypatch.setattr(flower_engine, "_SLACK", 2**12)
    hospitals = Hospitals(tmp_path, [*options, "--rounds=1"], undisturbed[2] / "local")
    hospitals.grid.meddle = at(1, 0, meddler)
    watch = Watch()
    run = hospitals.server(observer=watch)
    summary = run.run()
    assert re.match(words, watch.warnings[0])
    assert all("\n" not in warning for warning in watch.warnings)
    by_engine = words.startswith(ENGINE)
    assert watch.warnings[1:] == ["round 0: no usable answer from the sites 1; they are missing from this round"] * (
        by_engine
    )
    assert watch.rows[0]["comm/updates"] == 2
    assert math.isfinite(summary["mean"])
    assert len(summary["clients"]) == 3
    # What the others have sent is what counts: nothing of the third is in it.
    sent = {
        answer.metadata.src_node_id: from_arrays(state_of(answer))
        for answer in hospitals.grid.answers
        if answer.metadata.message_type == VISIT and answer.metadata.src_node_id != NODES[1]
    }
    for name, tensor in run.method.server_state.items():
        mean = (sent[NODES[0]][name].double() + sent[NODES[2]][name].double()) / 2
        torch.testing.assert_close(tensor, mean.float(), rtol=0, atol=1e-7)


def test_a_score_that_is_none_is_refused(options: list[str], undisturbed: Undisturbed, tmp_path: Path) -> None:
    hospitals = Hospitals(tmp_path, [*options, "--rounds=1"], undisturbed[2] / "local")
    hospitals.grid.meddle = at(1, 1, told(score="0.9"))
    with pytest.raises(UserError, match="sites 1, and the federation cannot end"):
        hospitals.server(observer=(watch := Watch())).run()
    assert watch.warnings[0].startswith(ENGINE)


def introduction(number: int) -> RecordDict:
    """What a site says of itself, as short as it can be."""
    return packed(
        {
            "number": number,
            "recipe": {"fedekd": "1"},
            "sizes": dict.fromkeys(SPLITS, 1),
            "class_counts": [3],
            "digest": "0" * 64,
        }
    )


def here(*numbers: int) -> FakeGrid:
    """A grid with sites that do nothing but introduce themselves."""
    grid = FakeGrid()
    grid.nodes = {50 + place: lambda message, n=number: introduction(n) for place, number in enumerate(numbers)}
    return grid


def test_sites_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    grid, slept = here(1), []
    comes = iter([(91, 0), (92, 2)])

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        node, number = next(comes)
        grid.nodes[node] = lambda message: introduction(number)

    monkeypatch.setattr(flower_engine, "time", SimpleNamespace(monotonic=lambda: float(len(slept)), sleep=sleep))
    found = wait_for_sites(grid, 3, 10.0, Watch())
    assert {node: description["number"] for node, description in found.items()} == {50: 1, 91: 0, 92: 2}
    assert len(grid.sent) == 3  # nobody is asked twice


def test_sites_that_do_not_come_are_told() -> None:
    with pytest.raises(UserError, match=r"2 of 3 sites have come within 0 s \(sites, wait\)"):
        wait_for_sites(here(0, 1), 3, 0.0, Watch())


def test_a_site_that_does_not_answer_at_once_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    grid = here(0, 1)
    answers = iter([None, "heard"])
    grid.meddle = lambda message, answer: (
        answer() if message.metadata.dst_node_id == 50 or next(answers) else lost(message, answer)
    )
    monkeypatch.setattr(flower_engine, "time", SimpleNamespace(monotonic=lambda: 0.0, sleep=lambda seconds: None))
    assert set(wait_for_sites(grid, 2, 10.0, Watch())) == {50, 51}


@pytest.mark.parametrize(
    ("numbers", "words"),
    [((0, 1, 1), "the numbers 0, 1, 1, and must be 0..2"), ((1, 2, 3), "the numbers 1, 2, 3, and must be 0..2")],
)
def test_numbers_must_be_one_each(numbers: tuple[int, ...], words: str) -> None:
    with pytest.raises(UserError, match=words):
        wait_for_sites(here(*numbers), 3, 0.0, Watch())


def test_a_site_that_cannot_introduce_itself_says_why(options: list[str], tmp_path: Path) -> None:
    grid = here(0, 1)

    def unusable(message: Message) -> Any:
        raise UserError("data.dataset: no file '/data/images.npz'")

    grid.nodes[60] = unusable
    words = r"a site could not introduce itself: .*UserError'>:<'data\.dataset: no file '/data/images\.npz"
    with pytest.raises(UserError, match=words) as caught:
        wait_for_sites(grid, 3, 0.0, Watch())
    assert "\n" not in str(caught.value)


def test_a_site_that_starts_again_while_others_are_waited_for_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    grid = here(0)
    comes = iter([(91, 0), (92, 1)])

    def sleep(seconds: float) -> None:
        node, number = next(comes)
        grid.nodes.pop(50, None)
        grid.nodes[node] = lambda message: introduction(number)

    monkeypatch.setattr(flower_engine, "time", SimpleNamespace(monotonic=lambda: 0.0, sleep=sleep))
    found = wait_for_sites(grid, 2, 10.0, Watch())
    assert {node: description["number"] for node, description in found.items()} == {91: 0, 92: 1}
