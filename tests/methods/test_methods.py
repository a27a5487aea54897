"""Contract of every method, and methods that are equal at the limits of their parameters."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from fedekd.errors import UserError
from fedekd.federation import RoundOptions, SilentObserver
from fedekd.functional import CoordinateMedian, TrimmedMean
from fedekd.methods import (
    FML,
    CAFEDistill,
    ClientOptions,
    DepthFL,
    Ditto,
    FedAvg,
    FedDyn,
    FedeKD,
    FedKD,
    FedPer,
    FedProx,
    FedRep,
    FedType,
    Local,
    Method,
    ProxyEnsemble,
    SafeKD,
    ScaleFL,
)
from fedekd.modules.losses import GATES
from tests.federation.runs import BackwardsEngine, StopAfter, StoppedError, assert_equal_weights, repeatable, weights

from .conftest import Federate

METHODS: dict[str, Callable[[], Method]] = {
    "local": Local,
    "fedavg": FedAvg,
    "fedavg-finetuned": lambda: FedAvg(finetune_epochs=1),
    "fedavg-samples": lambda: FedAvg(weights="samples"),
    "fedavg-median": lambda: FedAvg(aggregator=CoordinateMedian()),
    "fedprox": FedProx,
    "feddyn": lambda: FedDyn(alpha=0.1),
    "fedper": FedPer,
    "ditto": Ditto,
    "fml": FML,
    "fedkd": FedKD,
    "fedekd": FedeKD,
    "fedekd-none": lambda: FedeKD(gate="none"),
    "fedekd-shuffled": lambda: FedeKD(gate="shuffled"),
    "fedekd-reversed": lambda: FedeKD(gate="reversed"),
    "fedekd-correctness": lambda: FedeKD(gate="correctness"),
    "fedekd-correctness-shuffled": lambda: FedeKD(gate="correctness_shuffled"),
    "fedekd-cross-fit": lambda: FedeKD(cross_fit=True, gate="correctness", proxy_optimizer_state="carry"),
    "fedekd-feature": lambda: FedeKD(energy="feature"),
    "fedekd-trimmed": lambda: FedeKD(aggregator=TrimmedMean(0.34)),
    "proxy-ensemble": lambda: ProxyEnsemble(proxy_epochs=1, finetune_epochs=1),
    "proxy-ensemble-private": lambda: ProxyEnsemble(serve="private", frozen_head=False, weights="uniform"),
    "fedtype": FedType,
    "fedtype-fedprox": lambda: FedType(mu=0.01),
    "fedtype-released": lambda: FedType(variant="released"),
    "fedekd-entropy": lambda: FedeKD(energy="entropy"),
    "fedekd-margin": lambda: FedeKD(energy="margin"),
    "fedekd-logsumexp": lambda: FedeKD(energy="logsumexp"),
    "safekd": SafeKD,
    "cafedistill": lambda: CAFEDistill(weights="uniform"),
    "cafedistill-personal": lambda: CAFEDistill(heads="personal"),
    "cafedistill-paper": lambda: CAFEDistill("paper"),
    "cafedistill-trunk": lambda: CAFEDistill("paper", conflict="trunk_gradient", schedule="all_on"),
    "fedrep": FedRep,
    "depthfl": DepthFL,
    "depthfl-different-depths": DepthFL,
    "scalefl": ScaleFL,
    "scalefl-different-depths": lambda: ScaleFL(warm_up=0.5),
}
CLASSIFICATION_ONLY = {name for name in METHODS if name.startswith("fedtype")} | {
    *("fedekd-entropy", "fedekd-margin", "fedekd-logsumexp", "safekd"),
    *("cafedistill", "cafedistill-personal", "cafedistill-paper", "cafedistill-trunk"),
    *("depthfl", "depthfl-different-depths", "scalefl", "scalefl-different-depths"),
}
CASES = [
    (name, task)
    for name in METHODS
    for task in ("classification", "regression")
    if task == "classification" or name not in CLASSIFICATION_ONLY
]


def small_client(name: str) -> ClientOptions:
    """Options for ProxyCNN, with two exits if the method needs exits, and one epoch."""
    exits = None if METHODS[name]().exits is None else 2
    depths = [1, 2] if name.endswith("different-depths") else None
    model = {"class_path": "fedekd.models.ProxyCNN"}
    return ClientOptions(local_epochs=1, private_model=model, exits=exits, depths=depths)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "task"), CASES)
def test_method_resumed_run_with_other_client_order_is_identical(
    name: str, task: str, federate: Federate, tmp_path: Path
) -> None:
    # One epoch per phase: test_client.py covers phases of several epochs.
    client = small_client(name)
    whole = federate(METHODS[name](), task, client=client)
    summary = whole.run()
    assert all(torch.isfinite(tensor).all() for tensor in weights(whole).values())
    # Three phases of the local baselines, then in the middle of round 1.
    stop = 9 if name == "local" else 12
    stopped = federate(METHODS[name](), task, client=client, output=tmp_path, observer=StopAfter(phases=stop))
    with pytest.raises(StoppedError):
        stopped.run()
    again = federate(METHODS[name](), task, client=client, output=tmp_path, engine=BackwardsEngine)
    assert repeatable(again.run()) == repeatable(summary)
    assert_equal_weights(weights(whole), weights(again))
    # Every method has the supervised epochs of the local baseline, which Delta is paired with.
    engine: Any = again.engine
    assert [client.supervised_epochs for client in engine.clients.values()] == [2] * 3


def run_weights(federate: Federate, method: Method, **parts: Any) -> dict[str, Any]:
    run = federate(method, **parts)
    run.run()
    return weights(run)


@pytest.mark.parametrize("method", [FML, FedKD])
def test_mutual_method_trains_by_sgd_with_momentum(federate: Federate, method: type[Method]) -> None:
    sgd = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.01, "momentum": 0.9}}
    run = federate(method(), client=ClientOptions(local_epochs=1, optimizer=sgd))
    run.run()
    engine: Any = run.engine
    states = engine.client(0).optimizer_states.values()
    assert [set(state["state"][0]) for state in states] == [{"momentum_buffer"}] * len(states) != []


@pytest.mark.slow
@pytest.mark.parametrize("task", ["classification", "regression"])
def test_fedprox_mu_0_equals_fedavg(federate: Federate, task: str) -> None:
    fedavg = run_weights(federate, FedAvg(), task=task)
    assert_equal_weights(run_weights(federate, FedProx(mu=0), task=task), fedavg)
    other = run_weights(federate, FedProx(mu=1.0), task=task)
    assert any(not torch.equal(other[name], fedavg[name]) for name in fedavg)


@pytest.mark.parametrize(
    "method",
    [
        *(partial(FedeKD, lambda_kd=0, gate=gate) for gate in GATES),
        lambda: FedeKD(lambda_kd=0, gate="correctness", cross_fit=True),
        lambda: FedType(variant="released"),
        lambda: Ditto(lam=0),
    ],
)
def test_method_without_transfer_equals_local(federate: Federate, method: Callable[[], Method]) -> None:
    assert_equal_weights(run_weights(federate, method()), run_weights(federate, Local()))


def test_fedtype_paper_variant_differs_from_local(federate: Federate) -> None:
    ours, local = run_weights(federate, FedType()), run_weights(federate, Local())
    assert any(not torch.equal(ours[name], local[name]) for name in local)


def test_fedavg_clients_hold_the_global_model(federate: Federate) -> None:
    run = federate(FedAvg())
    run.run()
    ours = weights(run)
    for name, tensor in run.method.server_state["model"].items():
        assert all(torch.equal(ours[f"{client}/{name}"], tensor) for client in range(3))


def test_fedavg_samples_aggregates_weighted_mean(federate: Federate) -> None:
    from fedekd.functional import average_state_dicts

    class Watched(FedAvg):
        def aggregate(self, updates: Any, round_idx: int) -> None:
            super().aggregate(updates, round_idx)
            expected = average_state_dicts([u.state for u in updates], [u.num_samples for u in updates])
            assert all(torch.equal(self.server_state["model"][name], value) for name, value in expected.items())
            assert len({u.num_samples for u in updates}) > 1

    federate(Watched(weights="samples")).run()


def test_fedper_shares_base_and_keeps_heads(federate: Federate) -> None:
    run = federate(FedPer())
    summary = run.run()
    ours = weights(run)
    assert not any(name.startswith("head.") for name in run.method.server_state["model"])
    for name in run.method.server_state["model"]:
        assert torch.equal(ours[f"0/{name}"], ours[f"1/{name}"])
    assert not torch.equal(ours["0/head.weight"], ours["1/head.weight"])
    base = sum(t.numel() * t.element_size() for t in run.method.server_state["model"].values())
    assert summary["bytes_up"] == 2 * 3 * base


@pytest.mark.parametrize("method", [FedAvg, FedProx, FedDyn, FedPer, FedRep])
def test_finetuning_trains_once_after_last_round(method: Callable[..., Method], federate: Federate) -> None:
    plain, tuned = federate(method()), federate(method(finetune_epochs=2))
    slow = federate(method(finetune_epochs=2, finetune_lr_factor=1e-9))
    for run in (plain, tuned, slow):
        run.run()
    for name, tensor in plain.method.server_state["model"].items():
        assert torch.equal(tuned.method.server_state["model"][name], tensor)
    engine: Any = tuned.engine
    assert engine.clients[0].supervised_epochs == 2 * 2  # those that the local baseline has, too
    assert (weights(tuned)["0/head.weight"] - weights(plain)["0/head.weight"]).abs().max() > 1e-4
    torch.testing.assert_close(weights(slow), weights(plain), rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", [FedAvg, FedProx, FedDyn, FedPer, FedRep, Ditto])
def test_averaging_method_different_architectures_raise_user_error(
    method: Callable[[], Method], federate: Federate
) -> None:
    models = [{"class_path": f"fedekd.models.{name}"} for name in ("PrivateCNN", "ProxyCNN", "ProxyCNN")]
    with pytest.raises(UserError, match=rf"client\.private_model: .*method {method.__name__} averages"):
        federate(method(), client=ClientOptions(private_model=models)).run()


def test_fedekd_accepts_different_architectures(federate: Federate) -> None:
    models = [{"class_path": f"fedekd.models.{name}"} for name in ("PrivateCNN", "ProxyCNN", "PrivateCNN")]
    run = federate(FedeKD(), client=ClientOptions(private_model=models, local_epochs=1))
    run.run()
    engine: Any = run.engine
    assert [type(engine.clients[n].networks["private"]).__name__ for n in range(3)] == [
        *("PrivateCNN", "ProxyCNN", "PrivateCNN"),
    ]
    with pytest.raises(UserError, match=r"client\.private_model: expected one model, or 3 .* got 2"):
        federate(FedeKD(), client=ClientOptions(private_model=models[:2]))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: FedDyn(alpha=0), "method.alpha: .* got 0"),
        (lambda: FedProx(mu=-1), "method.mu: .* got -1"),
        (lambda: FedType(alpha=1), "method.alpha: .* got 1"),
        (lambda: FedType(mu=-1), "method.mu"),
        (lambda: Ditto(lam=-0.1), "method.lam"),
        (lambda: FML(private_weight=2), "method.private_weight"),
        (lambda: FedAvg(finetune_epochs=-1), "method.finetune_epochs"),
        (lambda: FedRep(finetune_lr_factor=math.inf), "method.finetune_lr_factor: .* got inf"),
        (lambda: TrimmedMean(0.5), "aggregator.fraction"),
    ],
)
def test_method_invalid_argument_raises_user_error(make: Callable[[], Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        make()


def test_fedtype_invalid_data_raises_user_error(federate: Federate, npz: Path) -> None:
    from fedekd.data import FederatedDataModule

    with pytest.raises(UserError, match="task: expected classification for method FedType"):
        federate(FedType(), task="regression").run()
    data = FederatedDataModule(str(npz), num_clients=3, alpha=5.0, fractions=(0.8, 0.0, 0.2))
    line = (
        "data.fractions: expected at least 1 validation sample of every client for method FedType, got 0. client 0 has"
    )
    with pytest.raises(UserError, match=line):  # before local baselines are trained
        federate(FedType(), data=data)


def test_fedper_unknown_module_raises_user_error(federate: Federate) -> None:
    with pytest.raises(UserError, match=r"method\.personal: .* got 'neck'"):
        federate(FedPer(personal=["neck"])).run()


# FedDyn


def mean_of_g(run: Any) -> dict[str, torch.Tensor]:
    clients = run.engine.clients
    zeros = {name: torch.zeros_like(value) for name, value in run.method.server_state["h"].items()}
    states = [clients[n].method_state.get("g", zeros) if n in clients else zeros for n in range(3)]
    return {name: sum(state[name] for state in states) / 3 for name in zeros}


@pytest.mark.slow
@pytest.mark.parametrize("participation", [1.0, 0.34])
def test_feddyn_h_is_mean_of_client_gradients(federate: Federate, participation: float) -> None:
    checked = []

    class Watch(SilentObserver):
        run: Any = None

        def round_finished(self, row: Any) -> None:
            expected = mean_of_g(self.run)
            for name, value in self.run.method.server_state["h"].items():
                torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-12)
            checked.append(max(float(value.abs().max()) for value in expected.values()))

    watch = Watch()
    rounds = RoundOptions(rounds=5, participation=participation)
    watch.run = federate(FedDyn(alpha=0.1), precision="64-true", rounds=rounds, observer=watch)
    watch.run.run()
    assert len(checked) == 5
    assert checked[-1] > 1e-4
