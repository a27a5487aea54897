"""`client.freeze` in federated runs: frozen tensors keep their bytes, and are not exchanged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedekd.data import FederatedDataModule
from fedekd.errors import UserError
from fedekd.federation import Orchestrator, RoundOptions
from fedekd.federation.baseline_key import baseline_key
from fedekd.methods import (
    FML,
    CAFEDistill,
    ClientOptions,
    DepthFL,
    Ditto,
    FedAvg,
    FedDyn,
    FedeKD,
    FedPer,
    FedRep,
    Local,
    Method,
    ProxyEnsemble,
    SafeKD,
    ScaleFL,
)
from fedekd.methods.base import Broadcast
from fedekd.models.freezing import frozen_names
from fedekd.modules import ObjectiveModule, TrainerFactory
from fedekd.privacy import GaussianMechanism
from tests.federation.runs import StopAfter, StoppedError, assert_equal_weights, weights

from .conftest import Federate, make_spec

RESNET = {"class_path": "fedekd.models.CIFARResNet", "init_args": {"base_width": 2, "norm": "batch"}}
DECAY = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01, "weight_decay": 0.5}}
PLAIN, EXITS = ["stem.*", "groups.0.*"], ["stages.0.*"]
ROUNDS = RoundOptions(rounds=3)


def options(**values: Any) -> ClientOptions:
    defaults: dict[str, Any] = {"local_epochs": 1, "private_model": RESNET, "optimizer": DECAY, "freeze": PLAIN}
    return ClientOptions(**{**defaults, **values})


def assert_frozen(run: Orchestrator) -> None:
    """Compare the frozen tensors of all networks with the initial ones; all others must have changed."""
    initial = run.spec.build_model("private", "server")
    frozen, state = frozen_names(initial), initial.state_dict()
    assert any(name.endswith("running_mean") for name in frozen)
    assert any(name.endswith("running_mean") for name in set(state) - frozen)
    engine: Any = run.engine
    for client in engine.clients.values():
        for role, network in client.networks.items():
            names = {name for name in network.state_dict() if name.removeprefix("module.") in state}
            if role in ("proxy", "tuned") or not names:
                continue
            for name in names:
                before, after = state[name.removeprefix("module.")], network.state_dict()[name]
                is_frozen = name.removeprefix("module.") in frozen
                assert torch.equal(_bytes(before), _bytes(after)) == is_frozen, (role, name)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


METHODS: dict[str, tuple[Callable[[], Method], dict[str, Any]]] = {
    "Local": (Local, {}),
    "FedeKD": (FedeKD, {}),
    "ProxyEnsemble": (lambda: ProxyEnsemble(serve="private"), {}),
    "FML": (FML, {}),
    "FedAvg": (lambda: FedAvg(finetune_epochs=1), {}),
    "FedDyn": (FedDyn, {}),
    "Ditto": (Ditto, {}),
    "FedPer": (FedPer, {}),
    "FedRep": (FedRep, {}),
    "SafeKD": (SafeKD, {"exits": 2, "freeze": EXITS}),
    "CAFEDistill": (CAFEDistill, {"exits": 2, "freeze": EXITS}),
    "CAFEDistill paper": (lambda: CAFEDistill("paper", conflict="trunk_gradient"), {"exits": 2, "freeze": EXITS}),
    "CAFEDistill frozen head": (CAFEDistill, {"exits": 2, "freeze": [*EXITS, "heads.1.bias"]}),
    "CAFEDistill paper frozen head": (lambda: CAFEDistill("paper"), {"exits": 2, "freeze": [*EXITS, "heads.1.*"]}),
    "DepthFL": (DepthFL, {"exits": 3, "depths": [2, 3], "freeze": EXITS}),
}


@pytest.mark.parametrize("name", METHODS)
def test_frozen_tensors_keep_their_bytes_in_every_method(name: str, federate: Federate) -> None:
    method, values = METHODS[name]
    run = federate(method(), client=options(**values), rounds=ROUNDS)
    run.run()
    assert_frozen(run)


@pytest.mark.parametrize("parts", [{"rounds": replace(ROUNDS, wire_dtype="float16")}, {"precision": "64-true"}])
def test_frozen_tensors_keep_their_bytes_whatever_travels(parts: dict[str, Any], federate: Federate) -> None:
    run = federate(FedAvg("samples"), client=options(), **{"rounds": ROUNDS, **parts})
    run.run()
    assert_frozen(run)
    state: Any = run.method.server_state
    assert not set(state["model"]) & frozen_names(run.spec.build_model("private", "server"))


def test_frozen_batch_norm_permits_privacy(federate: Federate) -> None:
    """The counters of BatchNorm are not exchanged, and the backbone gets no noise."""
    noise = GaussianMechanism(noise_multiplier=0.01, clipping_norm=1.0)
    with pytest.raises(UserError, match="privacy: expected a message of floating-point tensors"):
        federate(FedAvg(), client=options(freeze=None), privacy=noise).run()
    run = federate(FedAvg(), client=options(freeze="backbone"), privacy=noise)
    run.run()
    initial = run.spec.build_model("private", "server").state_dict()
    for key, tensor in weights(run).items():
        name = key.partition("/")[2]
        assert torch.equal(tensor, initial[name]) == (not name.startswith("head.")), name


def test_fml_keeps_the_optimizer_state_of_trained_private_parameters_only(federate: Federate) -> None:
    run = federate(FML(), client=options())
    run.run()
    client = run.engine.client(0)  # type: ignore[attr-defined]
    trained = sum(parameter.requires_grad for parameter in client.networks["private"].parameters())
    assert list(client.optimizer_states["private"]["state"]) == [*range(trained)]


def test_frozen_batch_norm_trains_on_batches_of_one_sample(federate: Federate) -> None:
    small = {"data": FederatedDataModule("digits", num_clients=2, batch_size=1, max_samples=60, min_samples=10)}
    frozen = ["stem.*", "groups.*"]
    with pytest.raises(UserError, match="expected no BatchNorm, which cannot train on batches of one sample"):
        federate(Local(), client=options(freeze=None), rounds=RoundOptions(rounds=1), **small).run()
    federate(Local(), client=options(freeze=frozen), rounds=RoundOptions(rounds=1), **small).run()


@pytest.mark.parametrize("loop", ["lean", "lightning"])
def test_optimizer_has_no_frozen_parameters_in_any_loop(
    loop: Any, federate: Federate, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[int] = []
    original = ObjectiveModule.configure_optimizers

    def configure(module: ObjectiveModule) -> torch.optim.Optimizer:
        optimizer = original(module)
        given.append(sum(len(group["params"]) for group in optimizer.param_groups))
        return optimizer

    monkeypatch.setattr(ObjectiveModule, "configure_optimizers", configure)
    trainer = TrainerFactory(accelerator="cpu", precision="32-true", threads=1, loop=loop)
    run = federate(Local(), client=options(), trainer=trainer, rounds=ROUNDS)
    run.run()
    assert_frozen(run)
    network = run.spec.build_model("private", 0)
    assert set(given) == {sum(parameter.requires_grad for parameter in network.parameters())}


def test_local_baseline_and_control_train_the_same_frozen_network(federate: Federate) -> None:
    """With full batches, Local and its baseline agree; and the key of the baseline depends on the option."""
    run = federate(Local(), client=options(), rounds=ROUNDS)
    summary = run.run()
    assert all(client["delta"] == 0 for client in summary["clients"])
    keys = {baseline_key(federate(Local(), client=options(freeze=freeze)).engine.client(0)) for freeze in (None, PLAIN)}  # type: ignore[attr-defined]
    assert len(keys) == 2


@pytest.mark.parametrize("method", [FedeKD, FML, FedAvg, FedRep])
def test_resume_with_freeze_gives_the_same_bytes(method: type[Method], federate: Federate, tmp_path: Path) -> None:
    def run(name: str, **parts: Any) -> Orchestrator:
        return federate(method(), client=options(), rounds=ROUNDS, output=tmp_path / name, **parts)

    whole = run("whole")
    whole.run()
    with pytest.raises(StoppedError):
        run("cut", observer=StopAfter(phases=17)).run()
    again = run("cut")
    again.run()
    assert_frozen(again)
    assert_equal_weights(weights(whole), weights(again))


def test_fedrep_does_not_unfreeze_what_the_option_froze(federate: Federate) -> None:
    run = federate(FedRep(), client=options(freeze=["stem.*", "head.bias"]))
    run.run()
    network = run.engine.client(0).networks["private"]  # type: ignore[attr-defined]
    names = {name for name, parameter in network.named_parameters() if not parameter.requires_grad}
    assert names == {name for name, _ in network.named_parameters() if name.startswith("stem.") or name == "head.bias"}


@pytest.mark.parametrize(
    ("method", "values", "words"),
    [
        (
            Local,
            {"freeze": ["stem.*", "layer1.*"]},
            r"patterns that match a parameter of CIFARResNet, got 'layer1\.\*'",
        ),
        (Local, {"freeze": ["*"]}, "patterns that leave a parameter to train"),
        (Local, {"freeze": []}, "a list of at least one pattern, backbone or null"),
        (Local, {"freeze": "stem.*"}, "a list of at least one pattern, backbone or null"),
        (FedPer, {"freeze": "backbone"}, "to leave a shared part to train besides head, for method FedPer"),
        (FedRep, {"freeze": ["head.*"]}, "to leave parameters of head and representation to train, for method FedRep"),
        (FedRep, {"freeze": "backbone"}, "to leave a shared part to train besides head, for method FedRep"),
        (
            ScaleFL,
            {
                "private_models": [RESNET, {**RESNET, "init_args": {"base_width": 4, "norm": "batch"}}][::-1],
                "exits": 2,
                "freeze": EXITS,
            },
            "null for networks of different width, whose frozen parts differ",
        ),
    ],
)
def test_freeze_without_a_part_to_train_raises_one_line_user_error(
    method: type[Method], values: dict[str, Any], words: str, federate: Federate
) -> None:
    with pytest.raises(UserError, match=f"^client.freeze: expected {words}") as error:
        federate(method(), client=options(**values)).run()
    assert "\n" not in str(error.value)


def test_freeze_initial_weights_are_equal_at_all_clients() -> None:
    frozen, plain = make_spec(client=options()), make_spec(client=options(freeze=None))
    for spec, is_equal in ((frozen, True), (plain, False)):
        states = [spec.build_model("private", number).state_dict() for number in (0, 1, "server")]
        assert all(torch.equal(states[0][name], state[name]) for state in states for name in state) == is_equal


def test_options_off_leave_hash_and_messages_unchanged(federate: Federate) -> None:
    spec = make_spec(client=options(freeze=None))
    assert not {"freeze", "private_weights", "private_weights_sha256"} & set(spec.hash_dict()["client"])
    run = federate(FedAvg(), client=options(freeze=None))
    run.method.init_server(run.spec)
    message: Broadcast = run.method.broadcast([0], 0)
    assert list(message.shared) == list(run.spec.build_model("private", "server").state_dict())
