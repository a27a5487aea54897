"""States of clients omit frozen tensors of pretrained weights, and lose nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedekd.errors import UserError
from fedekd.federation import MultiProcess, Orchestrator, RoundOptions
from fedekd.federation.checkpoint import CheckpointStore
from fedekd.methods import Ditto, FedAvg, FedeKD, Method
from tests.federation.runs import StopAfter, StoppedError, assert_equal_weights, weights

from .conftest import Federate
from .test_private_weights import options, proxy, saved

ROUNDS = RoundOptions(rounds=3)
HEAD = {"head.weight", "head.bias"}


def state_in(folder: Path, number: int = 0) -> dict[str, Any]:
    """Return the state of a client in the newest checkpoint of a run."""
    checkpoint, _ = CheckpointStore(folder / "checkpoints").load()
    assert checkpoint is not None
    state: dict[str, Any] = checkpoint.clients[number]
    return state


def networks_in(folder: Path, number: int = 0) -> dict[str, Any]:
    """Return its networks."""
    networks: dict[str, Any] = state_in(folder, number)["networks"]
    return networks


@pytest.mark.parametrize("method", [FedeKD, Ditto])
def test_checkpoint_with_pretrained_weights_has_trained_tensors_only(
    method: type[Method], federate: Federate, tmp_path: Path
) -> None:
    """Also in the best round so far; a resumed run gives the same bytes."""
    client = options(private_weights=saved(tmp_path / "w.pt", proxy()), freeze="backbone")

    def run(name: str, **parts: Any) -> Orchestrator:
        rounds = replace(ROUNDS, select_round="best")
        return federate(method(), client=client, rounds=rounds, output=tmp_path / name, **parts)

    whole = run("whole")
    whole.run()
    stored = networks_in(tmp_path / "whole")
    assert set(stored["private"]) == HEAD
    assert set(stored.get("global", HEAD)) == HEAD
    with pytest.raises(StoppedError):
        run("cut", observer=StopAfter(phases=17)).run()
    state = state_in(tmp_path / "cut")
    assert state["selected"] is None or set(state["selected"]["served"]["networks"]["private"]) == HEAD
    again = run("cut")
    again.run()
    assert_equal_weights(weights(whole), weights(again))
    [loaded, *_] = run("whole").load_clients()
    assert torch.equal(loaded.networks["private"].convolutions[0].weight, proxy().convolutions[0].weight)  # type: ignore[index, union-attr]


def test_checkpoint_keeps_frozen_tensors_that_depend_on_the_seed(federate: Federate, tmp_path: Path) -> None:
    """Without pretrained weights all of them, and a new frozen bias with them."""
    path = saved(tmp_path / "w.pt", proxy(num_classes=5))
    frozen = ["convolutions.*", "head.bias"]
    for name, weights_file, expected in (("random", None, None), ("file", path, {"head.weight", "head.bias"})):
        run = federate(FedAvg(), client=options(private_weights=weights_file, freeze=frozen), output=tmp_path / name)
        run.run()
        names = set(run.spec.build_model("private", 0).state_dict())
        stored = set(networks_in(tmp_path / name)["private"])
        assert stored == (names if expected is None else {key for key in names if not key.startswith("convolutions.")})


def test_client_state_in_full_still_loads_and_another_base_is_rejected(federate: Federate, tmp_path: Path) -> None:
    def client(file: str) -> Any:
        engine: Any = federate(FedAvg(), client=options(private_weights=file, freeze="backbone")).engine
        return engine.client(0)

    file = saved(tmp_path / "w.pt", proxy())
    first, second, other = client(file), client(file), client(saved(tmp_path / "other.pt", proxy(seed=1)))
    with torch.no_grad():
        first.networks["private"].head.bias += 1.0
    state = first.state_dict()
    full = {**state, "networks": {"private": first.networks["private"].state_dict()}}
    full.pop("base_sha256")  # as with a changed frozen tensor
    for stored in (state, full):
        second.load_state_dict(stored)
        assert torch.equal(second.networks["private"].head.bias, first.networks["private"].head.bias)
    other.load_state_dict(full)
    assert torch.equal(other.networks["private"].state_dict()["convolutions.0.weight"], proxy().convolutions[0].weight)
    other = client(str(tmp_path / "other.pt"))
    with pytest.raises(UserError, match=r"client.private_weights: expected the pretrained weights of the") as error:
        other.load_state_dict(state)
    assert "\n" not in str(error.value)


def test_client_state_with_a_changed_frozen_tensor_is_stored_in_full(federate: Federate, tmp_path: Path) -> None:
    run = federate(FedAvg(), client=options(private_weights=saved(tmp_path / "w.pt", proxy()), freeze="backbone"))
    client = run.engine.client(0)  # type: ignore[attr-defined]
    with torch.no_grad():
        client.networks["private"].convolutions[0].weight += 1.0
    state = client.state_dict()
    assert state["networks"]["private"].keys() == client.networks["private"].state_dict().keys()
    assert "base_sha256" not in state


@pytest.mark.slow
def test_states_of_processes_without_base_equal_sequential(federate: Federate, tmp_path: Path) -> None:
    client = options(private_weights=saved(tmp_path / "w.pt", proxy()), freeze=["convolutions.0.*"])
    runs = [
        federate(FedeKD(), client=client, engine=engine, output=tmp_path / name)
        for name, engine in (("one", None), ("two", MultiProcess(2)))
    ]
    summaries = [run.run() for run in runs]
    assert summaries[0]["clients"] == summaries[1]["clients"]
    for number in range(3):
        one, two = (networks_in(tmp_path / name, number) for name in ("one", "two"))
        assert one.keys() == two.keys()
        assert "convolutions.0.weight" not in one["private"]
        assert all(torch.equal(tensor, two["private"][name]) for name, tensor in one["private"].items())
