"""Option wire_dtype: messages in float16, for methods that see their own dtypes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedekd.errors import UserError
from fedekd.federation import MultiProcess, RoundOptions
from fedekd.federation.wire import from_wire, to_wire, update_to_wire, updates_from_wire
from fedekd.methods import Broadcast, ClientUpdate, FedDyn, FedeKD, ProxyEnsemble, SafeKD
from fedekd.methods.base import state_dict_bytes

from .conftest import Federate, Recorder
from .runs import StopBeforeRound, StoppedError, contents, weights

HALF = RoundOptions(rounds=2, wire_dtype="float16")

STATE = {
    "weight": torch.tensor([1.0, 1 / 3, -65504.0, 1e-9]),
    "wide": torch.tensor([0.1], dtype=torch.float64),
    "brain": torch.tensor([1e30], dtype=torch.bfloat16),
    "half": torch.tensor([0.1], dtype=torch.float16),
    "count": torch.tensor(2**40),
    "mask": torch.tensor([True]),
}


def test_to_wire_float32_is_the_same_object() -> None:
    broadcast = Broadcast(STATE)
    assert to_wire(broadcast, "float32") == (broadcast, {})
    assert to_wire(broadcast, "float32")[0] is broadcast
    update = ClientUpdate(0, STATE, 3)
    assert update_to_wire(update, {}) is update
    assert from_wire(STATE, {}) is STATE


def test_to_wire_converts_wide_floating_tensors_only() -> None:
    wire, dtypes = to_wire(Broadcast(STATE, {1: {"own": torch.ones(2), "weight": torch.zeros(4)}}), "float16")
    assert {name: tensor.dtype for name, tensor in wire.to(1).items()} == {
        name: tensor.dtype if tensor.itemsize < 3 or not tensor.is_floating_point() else torch.float16
        for name, tensor in {**STATE, "own": torch.ones(2)}.items()
    }
    assert dtypes == {"weight": torch.float32, "wide": torch.float64, "own": torch.float32}
    assert wire.personal[1]["own"].tolist() == [1.0, 1.0]
    back = from_wire(wire.shared, dtypes)
    for name, tensor in STATE.items():
        assert back[name].dtype == tensor.dtype
        assert torch.equal(back[name], tensor.half().to(tensor.dtype) if name in dtypes else tensor)
    assert STATE["weight"].dtype == torch.float32


@given(st.floats(-65519.0, 65519.0, width=32))
def test_wire_rounds_as_numpy_with_a_bounded_error(value: float) -> None:
    wire, dtypes = to_wire(Broadcast({"x": torch.tensor([value])}), "float16")
    received = from_wire(wire.shared, dtypes)["x"]
    assert received.numpy() == np.float32(value).astype(np.float16).astype(np.float32)
    if abs(value) >= 2**-14:
        assert abs(float(received) - value) <= 2**-11 * abs(value)


def test_values_beyond_the_range_raise_or_become_infinite() -> None:
    with pytest.raises(UserError, match=r"^wire_dtype: expected float32 for values above 65504, got float16 and 1e\+0"):
        to_wire(Broadcast({"a": torch.ones(2), "x": torch.tensor([1.0, -1e5])}), "float16")
    to_wire(Broadcast({"x": torch.tensor([torch.inf, torch.nan])}), "float16")  # reported elsewhere
    update = update_to_wire(ClientUpdate(0, {"x": torch.tensor([1e5])}, 1), {"x": torch.float32})
    assert update.state["x"].isinf().all()


def test_update_of_another_dtype_is_not_converted() -> None:
    update = ClientUpdate(2, {"x": torch.ones(1, dtype=torch.float64), "y": torch.ones(1), "n": torch.tensor(1)}, 7)
    sent = update_to_wire(update, {"x": torch.float32, "y": torch.float32})
    assert [tensor.dtype for tensor in sent.state.values()] == [torch.float64, torch.float16, torch.int64]
    assert (sent.client, sent.num_samples) == (2, 7)
    [back] = updates_from_wire([ClientUpdate(2, {"y": sent.state["y"]}, 7)], {"y": torch.float64})
    assert back.state["y"].dtype == torch.float64


def test_option_of_an_unknown_dtype_raises_user_error() -> None:
    with pytest.raises(UserError, match=r"^wire_dtype: expected one of float32, float16, got 'float61'\. Did you mean"):
        RoundOptions(wire_dtype="float61")


class Checked(FedeKD):
    """Fails unless clients and server see their own dtypes, and clients the rounded values."""

    def receive(self, client: Any, received: Any, round_idx: int) -> dict[str, float]:
        assert {tensor.dtype for tensor in received.values()} == {torch.float32}
        assert all(torch.equal(tensor, tensor.half().float()) for tensor in received.values())
        return super().receive(client, received, round_idx)

    def aggregate(self, updates: Any, round_idx: int) -> None:
        for update in updates:
            assert {tensor.dtype for tensor in update.state.values()} == {torch.float32}
            assert all(torch.equal(tensor, tensor.half().float()) for tensor in update.state.values())
        super().aggregate(updates, round_idx)


def test_run_float16_transfers_half_of_the_bytes(federate: Federate) -> None:
    recorder = Recorder()
    plain, half = federate(Checked.__bases__[0]()), federate(Checked(), rounds=HALF, observer=recorder)
    one, two = plain.run(), half.run()
    assert recorder.warnings == []
    assert (two["bytes_up"], two["bytes_down"]) == (one["bytes_up"] / 2, one["bytes_down"] / 2)
    for before, after in zip(plain.progress.history, half.progress.history, strict=True):
        assert after["comm/bytes_up"] == before["comm/bytes_up"] / 2
        assert after["comm/bytes_down"] == before["comm/bytes_down"] / 2
        assert after["comm/updates"] == 3
    assert {tensor.dtype for tensor in half.method.server_state.values()} == {torch.float32}
    assert not all(torch.equal(tensor, tensor.half().float()) for tensor in half.method.server_state.values())


class Counts(FedeKD):
    """Sends an integer with the proxy."""

    def broadcast(self, participants: Any, round_idx: int) -> Broadcast:
        return Broadcast({**self.server_state, "count": torch.tensor([2**40 + 1])})

    def receive(self, client: Any, received: Any, round_idx: int) -> dict[str, float]:
        assert received["count"].tolist() == [2**40 + 1]
        return super().receive(client, {name: received[name] for name in received if name != "count"}, round_idx)

    def prepare_update(self, client: Any, round_idx: int) -> ClientUpdate:
        update = super().prepare_update(client, round_idx)
        return ClientUpdate(update.client, {**update.state, "count": torch.tensor([2**40 + 1])}, update.num_samples)

    def aggregate(self, updates: Any, round_idx: int) -> None:
        assert all(update.state["count"].tolist() == [2**40 + 1] for update in updates)
        super().aggregate(updates, round_idx)
        del self.server_state["count"]


def test_run_integers_are_unchanged_and_keep_their_bytes(federate: Federate) -> None:
    run = federate(Counts(), rounds=HALF)
    summary = run.run()
    assert [row["comm/updates"] for row in run.progress.history] == [3, 3]
    assert summary["bytes_up"] == 2 * 3 * (state_dict_bytes(run.method.server_state) / 2 + 8)


@pytest.mark.parametrize("method", [FedDyn, SafeKD, ProxyEnsemble], ids=lambda method: method.__name__)
def test_run_float16_other_methods_lose_no_update(federate: Federate, method: Any) -> None:
    recorder = Recorder()
    run = federate(method(), rounds=HALF, observer=recorder)
    run.run()
    assert [row["comm/updates"] for row in run.progress.history] == [3, 3]
    assert not [text for text in recorder.warnings if "rejected" in text]


def test_run_explicit_float32_equals_the_default(federate: Federate, tmp_path: Path) -> None:
    federate(output=tmp_path / "one").run()
    federate(output=tmp_path / "two", rounds=RoundOptions(rounds=2, wire_dtype="float32")).run()
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


@pytest.mark.slow
def test_multiprocess_float16_gives_the_bytes_of_the_sequential_engine(federate: Federate, tmp_path: Path) -> None:
    federate(output=tmp_path / "one", rounds=HALF).run()
    federate(output=tmp_path / "two", rounds=HALF, engine=MultiProcess(2)).run()
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


@pytest.mark.parametrize("round_idx", [1, 2])
def test_resume_float16_gives_equal_results(federate: Federate, tmp_path: Path, round_idx: int) -> None:
    federate(output=tmp_path / "whole", rounds=HALF).run()
    with pytest.raises(StoppedError):
        federate(output=tmp_path / "part", rounds=HALF, observer=StopBeforeRound(round_idx)).run()
    with pytest.raises(UserError, match=r"rounds\.wire_dtype: expected the saved value 'float16', got 'float32'"):
        federate(output=tmp_path / "part").run()
    federate(output=tmp_path / "part", rounds=HALF).run()
    assert contents(tmp_path / "whole") == contents(tmp_path / "part")


class SendsLarge(FedeKD):
    """Client 1 sends 1e5 in the first round, which float16 cannot hold."""

    def prepare_update(self, client: Any, round_idx: int) -> ClientUpdate:
        update = super().prepare_update(client, round_idx)
        if client.number == 1 and round_idx == 0:
            state = {name: torch.full_like(tensor, 1e5) for name, tensor in update.state.items()}
            return ClientUpdate(1, state, update.num_samples)
        return update


def test_run_update_beyond_the_range_is_rejected_with_the_reason(federate: Federate) -> None:
    recorder = Recorder()
    run = federate(SendsLarge(), rounds=HALF, observer=recorder)
    run.run()
    [line] = recorder.warnings
    assert line.startswith("round 1: update of client 1 rejected: ")
    assert line.endswith("expected finite values of at most 65504 (torch.float16), got NaN or infinity")
    assert [row["comm/updates"] for row in run.progress.history] == [2, 3]


class GrowsOnServer(FedeKD):
    """The first aggregate has values that float16 cannot hold."""

    def aggregate(self, updates: Any, round_idx: int) -> None:
        super().aggregate(updates, round_idx)
        if round_idx == 0:
            self.server_state = {name: 1e7 * tensor for name, tensor in self.server_state.items()}


class StartsLarge(FedeKD):
    """The first message has values that float16 cannot hold."""

    def init_server(self, spec: Any) -> None:
        super().init_server(spec)
        self.server_state = {name: torch.full_like(tensor, 1e6) for name, tensor in self.server_state.items()}


def test_run_aggregate_beyond_the_range_keeps_the_server_state(federate: Federate) -> None:
    recorder = Recorder()
    run = federate(GrowsOnServer(), rounds=HALF, observer=recorder)
    run.run()
    line = recorder.warnings[0]
    assert line.startswith("round 1: wire_dtype: expected float32 for values above 65504, got float16 and ")
    assert line.endswith("; the server keeps its state")
    with pytest.raises(
        UserError, match=r"^wire_dtype: expected float32 for values above 65504, got float16 and 1e\+06"
    ):
        federate(StartsLarge(), rounds=HALF).run()


def test_untrained_proxy_is_no_teacher_although_rounded(federate: Federate) -> None:
    """Below the quorum the clients get the initial proxy again: they train as the local baseline does."""
    options = {"rounds": 1, "quorum": 3, "update_loss_rate": 0.9}
    plain = federate(FedeKD(), rounds=RoundOptions(**options))
    half = federate(FedeKD(), rounds=RoundOptions(**options, wire_dtype="float16"))
    plain.run()
    half.run()
    one, two = weights(plain), weights(half)
    assert all(torch.equal(one[name], two[name]) for name in one)
    trained = federate(FedeKD(), rounds=RoundOptions(rounds=1, wire_dtype="float16"))
    trained.run()
    assert not all(torch.equal(one[name], tensor) for name, tensor in weights(trained).items())
