"""`client.lora` in federated runs: what is trained, exchanged and stored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fedekd.benchmark import Block, cells
from fedekd.errors import UserError
from fedekd.federation import MultiProcess, Orchestrator, RoundOptions
from fedekd.federation.baseline_key import baseline_key
from fedekd.flower.description import shared_config
from fedekd.methods import (
    ClientOptions,
    FedAvg,
    FedeKD,
    Local,
    Method,
    ScaleFL,
)
from fedekd.models.freezing import frozen_names
from fedekd.models.lora import LoraOptions
from fedekd.privacy import GaussianMechanism
from tests.federation.runs import StopAfter, StoppedError, assert_equal_weights, weights

from .conftest import Federate, make_spec
from .test_freeze import DECAY, RESNET, ROUNDS, assert_frozen
from .test_freeze import METHODS as FROZEN
from .test_frozen_base import networks_in
from .test_private_weights import proxy, saved

pytest.importorskip("peft")
pytestmark = pytest.mark.lora

#: One norm is trained, so that there are statistics that change.
LORA = LoraOptions(r=2, lora_dropout=0.1, modules_to_save=["0.norm1"])
SMALL = {"class_path": "fedekd.models.ProxyCNN"}


def options(**values: Any) -> ClientOptions:
    defaults: dict[str, Any] = {"local_epochs": 1, "private_model": RESNET, "optimizer": DECAY, "lora": LORA}
    return ClientOptions(**{**defaults, **values})


#: The methods of `test_freeze`, with adapters in place of frozen parts.
METHODS = {name: row for name, row in FROZEN.items() if not name.endswith("frozen head")}


@pytest.mark.parametrize("name", METHODS)
def test_lora_changes_adapters_and_heads_only_in_every_method(name: str, federate: Federate) -> None:
    method, values = METHODS[name]
    adapted = {key: value for key, value in values.items() if key != "freeze"}
    run = federate(method(), client=options(**adapted), rounds=ROUNDS)
    run.run()
    assert_frozen(run)


def test_lora_initial_adapters_are_equal_and_follow_the_seed() -> None:
    spec, other = make_spec(client=options()), make_spec(client=options(), seed=1)
    first, *rest = (spec.build_model("private", number).state_dict() for number in (0, 1, "server"))
    assert all(torch.equal(tensor, state[name]) for state in rest for name, tensor in first.items())
    a, b = (part.build_model("private", 0).state_dict()["stem.0.lora_A.default.weight"] for part in (spec, other))
    assert not torch.equal(a, b)


def test_lora_messages_have_adapters_and_head(federate: Federate) -> None:
    """Also in half precision, and with the noise of `privacy`, which adapters without BatchNorm permit."""
    run = federate(
        FedAvg("samples"),
        client=options(lora={"r": 2}),
        rounds=RoundOptions(rounds=2, wire_dtype="float16"),
        privacy=GaussianMechanism(noise_multiplier=0.01, clipping_norm=1.0),
    )
    run.run()
    state: Any = run.method.server_state
    network = run.spec.build_model("private", "server")
    assert set(state["model"]) == {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert all(".lora_" in name or name.startswith("head.") for name in state["model"])
    initial = network.state_dict()
    for key, tensor in weights(run).items():
        name = key.partition("/")[2]
        assert torch.equal(tensor, initial[name]) == (name in frozen_names(network)), name


def test_lora_local_baseline_trains_the_same_adapters(federate: Federate) -> None:
    summary = federate(Local(), client=options(), rounds=ROUNDS).run()
    assert all(client["delta"] == 0 for client in summary["clients"])
    keys = {
        baseline_key(federate(Local(), client=options(lora=lora)).engine.client(0))  # type: ignore[attr-defined]
        for lora in (None, {"r": 2}, {"r": 3}, LoraOptions(r=2))
    }
    assert len(keys) == 3


@pytest.mark.parametrize("method", [FedeKD, FedAvg])
def test_lora_resume_gives_the_same_bytes_from_small_checkpoints(
    method: type[Method], federate: Federate, tmp_path: Path
) -> None:
    client = options(
        private_model=SMALL, lora={"r": 2, "lora_dropout": 0.2}, private_weights=saved(tmp_path / "w.pt", proxy())
    )

    def run(name: str, **parts: Any) -> Orchestrator:
        return federate(method(), client=client, rounds=ROUNDS, output=tmp_path / name, **parts)

    whole = run("whole")
    whole.run()
    with pytest.raises(StoppedError):
        run("cut", observer=StopAfter(phases=17)).run()
    again = run("cut")
    again.run()
    assert_equal_weights(weights(whole), weights(again))
    network = whole.spec.build_model("private", 0)
    assert set(networks_in(tmp_path / "whole")["private"]) == set(network.state_dict()) - frozen_names(network)


@pytest.mark.slow
def test_lora_in_processes_equals_sequential(federate: Federate, tmp_path: Path) -> None:
    client = options(private_model=SMALL, lora={"r": 2}, private_weights=saved(tmp_path / "w.pt", proxy()))
    runs = [
        federate(FedAvg(), client=client, engine=engine, output=tmp_path / name)
        for name, engine in (("one", None), ("two", MultiProcess(2)))
    ]
    summaries = [run.run() for run in runs]
    assert summaries[0]["clients"] == summaries[1]["clients"]
    one, two = (networks_in(tmp_path / name)["private"] for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (
            {"freeze": "backbone"},
            "client.freeze: expected null with client.lora, which freezes the rest, got 'backbone'",
        ),
        ({"lora": {"rank": 2}}, r"client.lora: expected a mapping of r, lora_alpha, .*, or null, got"),
        (
            {"lora": {"target_modules": ["layer1"]}},
            "client.lora.target_modules: expected names of layers of CIFARResNet",
        ),
    ],
)
def test_lora_invalid_options_of_a_run_raise_one_line_user_error(
    values: dict[str, Any], words: str, federate: Federate
) -> None:
    with pytest.raises(UserError, match=f"^{words}") as error:
        federate(Local(), client=options(**values))
    assert "\n" not in str(error.value)


def test_lora_of_networks_of_different_width_raises_user_error(federate: Federate) -> None:
    models = [{**RESNET, "init_args": {"base_width": width, "norm": "batch"}} for width in (4, 2)]
    with pytest.raises(UserError, match=r"client\.lora: expected null for networks of different width"):
        federate(ScaleFL(), client=options(private_models=models, exits=2)).run()


def test_lora_is_part_of_keys_and_of_the_federation_only_if_set() -> None:
    plain, adapted = (make_spec(client=options(lora=lora)) for lora in (None, {"r": 2}))
    assert "lora" not in plain.hash_dict()["client"]
    assert adapted.hash_dict()["client"]["lora"]["r"] == 2
    assert not {"lora", "frozen"} & set(shared_config(FedAvg(), plain))
    assert {"lora", "frozen"} <= set(shared_config(FedAvg(), adapted))

    def key(**values: Any) -> str:
        chosen = {"data.dataset": "digits", **values}
        [cell] = cells([Block(["digits"], [5.0], [0], {"L": {"class_path": "Local"}}, chosen, config="digits.yaml")])
        return cell.key

    assert len({key(), key(**{"client.lora.r": 2}), key(**{"client.lora": {"r": 4}})}) == 3
    assert key() == key(**{"client.lora": None})
