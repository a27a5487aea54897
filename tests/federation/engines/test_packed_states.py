"""States of clients outside of memory: the file, and runs with any budget."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from fedekd.errors import UserError
from fedekd.federation import RoundOptions, Sequential
from fedekd.federation.checkpoint import CheckpointStore, Packed, pack, unpack
from fedekd.federation.engines.packed_states import PackedStates, client_bytes, tensor_bytes
from fedekd.methods import CAFEDistill, ClientOptions, FedAvg, FedeKD, Method
from fedekd.models import PrivateCNN

from ..conftest import Federate
from ..runs import StopBeforeRound, StoppedError, weights

#: Bytes of about one client of `federate` with FedeKD: of three, one or two are packed.
ONE_CLIENT = 2_300_000


def test_packed_states_return_the_last_content_in_a_bounded_file() -> None:
    states, rng, last = PackedStates(), random.Random(0), dict[int, bytes]()
    for size in range(100, 1100):
        number = rng.randrange(5)
        last[number] = rng.randbytes(rng.randint(1, size))
        states[number] = last[number]
        assert {key: states[key] for key in last} == last
    assert 7 not in states
    assert states._end < 8 * 1.25 * 5 * 1100  # places of all sizes that a state has outgrown


def test_pack_of_a_packed_state_returns_its_bytes() -> None:
    content = pack({"weight": torch.ones(2)})
    assert pack(Packed(content)) is content
    assert pack(unpack(content)) == content


def test_tensor_bytes_counts_nested_tensors() -> None:
    state = {"a": [torch.zeros(3), {"b": torch.zeros(2, dtype=torch.float64)}], "n": 4, "s": "text"}
    assert tensor_bytes(state) == 12 + 16


def test_client_bytes_count_frozen_tensors_that_the_state_omits(federate: Federate, tmp_path: Path) -> None:
    torch.save(PrivateCNN(1, 8, 3).state_dict(), tmp_path / "w.pt")
    cnn = {"class_path": "fedekd.models.PrivateCNN"}
    options = ClientOptions(private_model=cnn, private_weights=str(tmp_path / "w.pt"), freeze="backbone")
    engine = federate(FedAvg(), client=options).engine
    client = engine.client(0)
    network = sum(tensor.nbytes for tensor in client.networks["private"].state_dict().values())
    assert client_bytes(client) == network
    assert tensor_bytes(client.state_dict()) < 0.1 * network


@pytest.mark.parametrize("method", [FedeKD(), CAFEDistill()])
def test_run_with_any_budget_gives_equal_bytes_also_after_a_resume(
    method: Method, federate: Federate, tmp_path: Path
) -> None:
    exits = 2 if isinstance(method, CAFEDistill) else None
    client = ClientOptions(local_epochs=1, private_model={"class_path": "fedekd.models.PrivateCNN"}, exits=exits)
    results, in_memory = [], []
    for megabytes in (1000.0, ONE_CLIENT / 1e6, 0.0):
        output = tmp_path / str(megabytes)
        parts: dict[str, Any] = {
            **{"client": client, "output": output, "baseline_dir": tmp_path / "local"},
            **{"rounds": RoundOptions(rounds=2, participation=0.7), "engine": Sequential(megabytes)},
        }
        with pytest.raises(StoppedError):
            federate(method, observer=StopBeforeRound(2), **parts).run()
        again = federate(method, **parts)
        summary = again.run()
        in_memory.append(len(weights(again)))
        rows = (output / "metrics.csv").read_text()
        results.append(CheckpointStore(output / "checkpoints").digests() | {"rows": rows})
        assert federate(method, **parts).evaluate_checkpoint()["clients"] == summary["clients"]
    assert results[0] == results[1] == results[2]
    assert in_memory[0] > in_memory[1] >= in_memory[2] == 0


def test_run_without_folder_and_memory_loads_its_clients(federate: Federate) -> None:
    loaded = []
    for megabytes in (1000.0, 0.0):
        run = federate(engine=Sequential(megabytes))
        run.run()
        loaded.append([pack(client.state_dict()) for client in run.load_clients()])
    assert loaded[0] == loaded[1]


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_sequential_invalid_cache_raises_user_error(value: float) -> None:
    with pytest.raises(UserError, match=r"^engine\.cache: expected a finite number of at least 0, or null, got"):
        Sequential(value)
