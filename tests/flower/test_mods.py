"""Flower's mods work on the updates that leave a site, and on nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("flwr")

from flwr.app import Context, Message, RecordDict
from flwr.clientapp.mod import LocalDpMod

from fedekd.federation import UpdateValidator
from fedekd.flower import apps
from fedekd.flower.apps import Settings, make_client_app
from fedekd.flower.messages import ABSORB, HELLO, REFERENCE, SCORE, VISIT, from_arrays, note_of, packed, state_of

from .conftest import SITES, built, carried, same

pytestmark = pytest.mark.flower

State = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def new_sites() -> Iterator[None]:
    """No site of another test is at hand, and noise is the same each time."""
    apps._site.cache_clear()
    np.random.seed(0)
    yield
    apps._site.cache_clear()


@pytest.fixture
def sent(options: list[str]) -> State:
    """A proxy, as the server sends it."""
    _, _, spec = built(options)
    return dict(spec.build_model("proxy", "server").state_dict())


class Node:
    """Site 0 as Flower's runtime runs it, with a folder of its own."""

    def __init__(self, options: list[str], folder: Path, *mods: Any) -> None:
        self.app = make_client_app(Settings(tuple(options), SITES, folder=str(folder)), mods=list(mods))
        self.context = Context(1, 5, {"number": 0}, RecordDict(), {})

    def __call__(self, what: str, note: dict[str, Any], state: State | None = None) -> Message:
        return carried(self.app(carried(Message(packed(note, state), 5, what)), self.context))

    def visit(self, what: str, state: State, round_idx: int = 0, version: int = 0) -> Message:
        return self(what, {"round": round_idx, "version": version, "look": None}, state)


def flat(state: State) -> torch.Tensor:
    return torch.cat([tensor.double().flatten() for tensor in state.values()])


def test_an_update_is_clipped_to_its_norm(options: list[str], sent: State, tmp_path: Path) -> None:
    plain = from_arrays(state_of(Node(options, tmp_path / "a").visit(VISIT, sent)))
    moved = flat(plain) - flat(sent)
    norm = float(moved.norm())
    assert norm > 0.01
    for bound, expected in ((norm / 3, moved / 3), (norm * 3, moved)):
        clip = LocalDpMod(clipping_norm=bound, sensitivity=0.0, epsilon=1.0, delta=1e-5)
        reply = Node(options, tmp_path / f"{bound}", clip).visit(VISIT, sent)
        clipped = from_arrays(state_of(reply))
        assert list(clipped) == list(sent)
        torch.testing.assert_close(flat(clipped) - flat(sent), expected, rtol=1e-4, atol=1e-7)
        assert UpdateValidator(max_norm=1.001 * min(bound, norm)).objection(clipped, sent) is None


def test_noise_is_added_and_the_guard_accepts_it(options: list[str], sent: State, tmp_path: Path) -> None:
    plain = Node(options, tmp_path / "a").visit(VISIT, sent)
    bound, deviation = 0.02, 0.01 * np.sqrt(2 * np.log(1.25 / 1e-5)) / 10.0
    private = LocalDpMod(clipping_norm=bound, sensitivity=0.01, epsilon=10.0, delta=1e-5)
    reply = Node(options, tmp_path / "b", private).visit(VISIT, sent)
    noised = from_arrays(state_of(reply))
    moved = flat(from_arrays(state_of(plain))) - flat(sent)
    noise = flat(noised) - flat(sent) - moved * min(1.0, bound / float(moved.norm()))
    assert len(noise) > 50_000
    assert float(noise.std()) == pytest.approx(deviation, rel=0.02)
    assert abs(float(noise.mean())) < 5 * deviation / len(noise) ** 0.5
    assert UpdateValidator().objection(noised, sent) is None
    # What is said beside the tensors is as it was, and so is what stays on the disk.
    assert repr(note_of(reply)) == repr(note_of(plain))
    kept = [path.read_bytes() for path in sorted(tmp_path.glob("[ab]/site-000/states/*/client-00000-000001.pt"))]
    assert kept[0] == kept[1]


def test_the_last_visit_and_all_questions_pass_untouched(options: list[str], sent: State, tmp_path: Path) -> None:
    calls = []

    def counting(message: Message, context: Context, call_next: Any) -> Message:
        calls.append(message.metadata.message_type)
        return call_next(message, context)

    private = LocalDpMod(clipping_norm=1e-9, sensitivity=1.0, epsilon=0.01, delta=1e-5)
    plain, noised = Node(options, tmp_path / "a"), Node(options, tmp_path / "b", counting, private)
    told = []
    for node in (plain, noised):
        node.visit(VISIT, sent)
        absorbed = node.visit(ABSORB, sent, round_idx=2, version=1)
        assert not dict(state_of(absorbed))
        told.append(
            [
                note_of(absorbed),
                note_of(node(HELLO, {})),
                note_of(node(REFERENCE, {"rounds": 1})),
                note_of(node(SCORE, {"version": 2})),
            ]
        )
    assert same(*told)
    assert 0 < told[0][0]["score"] == told[0][3]["score"]
    assert calls == [VISIT]


def test_mods_run_in_the_order_given(options: list[str], sent: State, tmp_path: Path) -> None:
    order = []

    def mod(name: str) -> Any:
        def call(message: Message, context: Context, call_next: Any) -> Message:
            order.append(name)
            reply = call_next(message, context)
            order.append(f"{name} after")
            return reply

        return call

    Node(options, tmp_path, mod("first"), mod("second")).visit(VISIT, sent)
    assert order == ["first", "second", "second after", "first after"]
