"""A federation of sites: the numbers of one in this process, whatever the grid between them does."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("flwr")

from flwr.app import Array, Message

from fedekd.data import ClientSplits
from fedekd.errors import UserError
from fedekd.federation import Orchestrator
from fedekd.federation.client_store import ClientStore
from fedekd.federation.storage import unpack
from fedekd.flower import engine as flower_engine
from fedekd.flower.apps import Settings, serve
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


def test_the_same_numbers_as_in_this_process(hospitals: Hospitals, undisturbed: Undisturbed, tmp_path: Path) -> None:
    watch = Watch()
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
    assert run.rescore()["mean"] > 0
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
        hospitals.server(tmp_path / "run", Watch(stop_after)).run()
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
    again = hospitals.server(tmp_path / "run").rescore()
    assert again["clients"] == undisturbed[1]["clients"]
    assert again["delta"] == undisturbed[1]["delta"]


def offline(hospitals: Hospitals) -> Meddler:
    """Just before a round's messages are sent the site goes; after that round it is back."""

    class Absent(FakeGrid):
        """Its node 1 is there in any round but round 1."""

    usual = hospitals.grid.send_and_receive
    node, site = NODES[1], hospitals.grid.nodes[NODES[1]]

    def send_and_receive(messages: Sequence[Message], *, timeout: float | None = None) -> list[Message]:
        asked = [note_of(message).get("round") for message in messages]
        if 1 in asked:
            del hospitals.grid.nodes[node]
        replies = usual(messages, timeout=timeout)
        hospitals.grid.nodes[node] = site
        return replies

    hospitals.grid.send_and_receive = send_and_receive  # type: ignore[method-assign]
    return hospitals.grid.meddle
