"""Flower's mods apply to the updates of a site and to nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("flwr")

from flwr.app import Context, Message, RecordDict
from flwr.clientapp.mod import LocalDpMod

from fedekd.federation import UpdateValidator
from fedekd.flower.apps import Settings, make_client_app
from fedekd.flower.messages import (
    BASELINE,
    DESCRIBE,
    LAST_ROUND,
    ROUND,
    SCORE,
    arrays_of,
    from_arrays,
    pack,
    values_of,
)

from .conftest import NUM_SITES, is_equal, over_wire

pytestmark = [pytest.mark.flower, pytest.mark.usefixtures("empty_site_cache")]

State = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def seed_numpy() -> None:
    """Seed NumPy's global generator, from which LocalDpMod draws its noise."""
    np.random.seed(0)


class Node:
    """Site 0 behind its ClientApp."""

    def __init__(self, options: list[str], folder: Path, *mods: Any) -> None:
        self.app = make_client_app(Settings(tuple(options), NUM_SITES, folder=str(folder)), mods=list(mods))
        self.context = Context(1, 5, {"number": 0}, RecordDict(), {})

    def __call__(self, message_type: str, values: dict[str, Any], state: State | None = None) -> Message:
        return over_wire(self.app(over_wire(Message(pack(values, state), 5, message_type)), self.context))

    def run_round(self, message_type: str, state: State, round_idx: int = 0, version: int = 0) -> Message:
        return self(message_type, {"round": round_idx, "version": version, "comparison": None}, state)


def flat(state: State) -> torch.Tensor:
    return torch.cat([tensor.double().flatten() for tensor in state.values()])


def change_of(reply: Message, proxy: State) -> torch.Tensor:
    return flat(from_arrays(arrays_of(reply))) - flat(proxy)


def test_local_dp_clipping_bounds_update_norm(options: list[str], proxy: State, tmp_path: Path) -> None:
    change = change_of(Node(options, tmp_path / "plain").run_round(ROUND, proxy), proxy)
    norm = float(change.norm())
    assert norm > 0.01
    for bound, expected in ((norm / 3, change / 3), (norm * 3, change)):
        clip = LocalDpMod(clipping_norm=bound, sensitivity=0.0, epsilon=1.0, delta=1e-5)
        reply = Node(options, tmp_path / f"{bound}", clip).run_round(ROUND, proxy)
        clipped = from_arrays(arrays_of(reply))
        assert list(clipped) == list(proxy)
        torch.testing.assert_close(change_of(reply, proxy), expected, rtol=1e-4, atol=1e-7)
        assert UpdateValidator(max_norm=1.001 * min(bound, norm)).check(clipped, proxy) is None


def test_local_dp_noise_has_expected_deviation(options: list[str], proxy: State, tmp_path: Path) -> None:
    plain = Node(options, tmp_path / "a").run_round(ROUND, proxy)
    bound, deviation = 0.02, 0.01 * np.sqrt(2 * np.log(1.25 / 1e-5)) / 10.0
    mod = LocalDpMod(clipping_norm=bound, sensitivity=0.01, epsilon=10.0, delta=1e-5)
    reply = Node(options, tmp_path / "b", mod).run_round(ROUND, proxy)
    change = change_of(plain, proxy)
    noise = change_of(reply, proxy) - change * min(1.0, bound / float(change.norm()))
    assert len(noise) > 50_000
    assert float(noise.std()) == pytest.approx(deviation, rel=0.02)
    assert abs(float(noise.mean())) < 5 * deviation / len(noise) ** 0.5
    assert UpdateValidator().check(from_arrays(arrays_of(reply)), proxy) is None
    # The JSON values and the state on disk have no noise.
    assert repr(values_of(reply)) == repr(values_of(plain))
    states = [path.read_bytes() for path in sorted(tmp_path.glob("[ab]/site-000/states/*/client-00000-000001.pt"))]
    assert states[0] == states[1]


def test_mods_apply_to_updates_only(options: list[str], proxy: State, tmp_path: Path) -> None:
    calls = []

    def record(message: Message, context: Context, call_next: Any) -> Message:
        calls.append(message.metadata.message_type)
        return call_next(message, context)

    mod = LocalDpMod(clipping_norm=1e-9, sensitivity=1.0, epsilon=0.01, delta=1e-5)
    replies = []
    for node in (Node(options, tmp_path / "a"), Node(options, tmp_path / "b", record, mod)):
        node.run_round(ROUND, proxy)
        last = node.run_round(LAST_ROUND, proxy, round_idx=2, version=1)
        assert not dict(arrays_of(last))
        others = [node(DESCRIBE, {}), node(BASELINE, {"rounds": 1}), node(SCORE, {"version": 2})]
        replies.append([values_of(reply) for reply in (last, *others)])
    assert is_equal(*replies)
    assert 0 < replies[0][0]["score"] == replies[0][3]["metrics"]["accuracy"]
    assert calls == [ROUND]


def test_mods_run_in_given_order(options: list[str], proxy: State, tmp_path: Path) -> None:
    order = []

    def mod(name: str) -> Any:
        def call(message: Message, context: Context, call_next: Any) -> Message:
            order.append(name)
            reply = call_next(message, context)
            order.append(f"{name} after")
            return reply

        return call

    Node(options, tmp_path, mod("first"), mod("second")).run_round(ROUND, proxy)
    assert order == ["first", "second", "second after", "first after"]


def test_mods_compute_in_the_dtypes_of_the_models(options: list[str], proxy: State, tmp_path: Path) -> None:
    """Messages travel in float16; the noise is added before the rounding."""
    dtypes = []

    def record(message: Message, context: Context, call_next: Any) -> Message:
        dtypes.append({tensor.dtype for tensor in from_arrays(arrays_of(message)).values()})
        reply = call_next(message, context)
        dtypes.append({tensor.dtype for tensor in from_arrays(arrays_of(reply)).values()})
        return reply

    half = {name: tensor.half() for name, tensor in proxy.items()}
    rounded = {name: tensor.float() for name, tensor in half.items()}
    mod = LocalDpMod(clipping_norm=0.02, sensitivity=0.01, epsilon=10.0, delta=1e-5)
    expected = Node(options, tmp_path / "a", mod).run_round(ROUND, rounded)
    np.random.seed(0)
    values = {"round": 0, "version": 0, "comparison": None, "dtypes": dict.fromkeys(proxy, "float32")}
    reply = Node(options, tmp_path / "b", record, mod, record)(ROUND, values, half)
    assert dtypes == [{torch.float32}] * 4
    sent = from_arrays(arrays_of(reply))
    assert is_equal(sent, {name: tensor.half() for name, tensor in from_arrays(arrays_of(expected)).items()})
    assert repr(values_of(reply)) == repr(values_of(expected))
