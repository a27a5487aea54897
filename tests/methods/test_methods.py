"""What every method promises, and which of them are equal at the ends of their parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fedekd.errors import UserError
from fedekd.federation import ClientResult, RoundOptions, RoundRequest, SequentialEngine, SilentObserver
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
    SafeKD,
    ScaleFL,
)

from .conftest import Federate, weights

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
    "fedekd-feature": lambda: FedeKD(energy="feature"),
    "fedekd-trimmed": lambda: FedeKD(aggregator=TrimmedMean(0.34)),
    "fedtype": FedType,
    "fedtype-fedprox": lambda: FedType(mu=0.01),
    "fedtype-released": lambda: FedType(variant="released"),
    "fedekd-entropy": lambda: FedeKD(energy="entropy"),
    "fedekd-margin": lambda: FedeKD(energy="margin"),
    "fedekd-logsumexp": lambda: FedeKD(energy="logsumexp"),
    "safekd": SafeKD,
    "cafedistill": CAFEDistill,
    "cafedistill-trunk": lambda: CAFEDistill(conflict="trunk_gradient", schedule="all_on"),
    "fedrep": FedRep,
    "depthfl": DepthFL,
    "depthfl-of-unlike-depths": DepthFL,
    "scalefl": ScaleFL,
    "scalefl-of-unlike-depths": lambda: ScaleFL(warm_up=0.5),
}
CLASSIFICATION_ONLY = {name for name in METHODS if name.startswith("fedtype")} | {
    *("fedekd-entropy", "fedekd-margin", "fedekd-logsumexp", "safekd", "cafedistill", "cafedistill-trunk"),
    *("depthfl", "depthfl-of-unlike-depths", "scalefl", "scalefl-of-unlike-depths"),
}
CASES = [
    (name, task)
    for name in METHODS
    for task in ("classification", "regression")
    if task == "classification" or name not in CLASSIFICATION_ONLY
]


def small_client(name: str) -> ClientOptions:
    """ProxyCNN, which can have two exits, for one epoch."""
    exits = None if METHODS[name]().exits is None else 2
    depths = [1, 2] if name.endswith("unlike-depths") else None
    model = {"class_path": "fedekd.models.ProxyCNN"}
    return ClientOptions(local_epochs=1, private_model=model, exits=exits, depths=depths)


class StoppedError(Exception):
    """Ends a run at a chosen moment."""


class StopAfter(SilentObserver):
    def __init__(self, phases: int) -> None:
        self.left = phases

    def phase_finished(self, client: int, phase: str, steps: int) -> None:
        self.left -= 1
        if self.left == 0:
            raise StoppedError


class BackwardsEngine(SequentialEngine):
    def run_clients(self, request: RoundRequest) -> Iterator[ClientResult]:
        yield from super().run_clients(request.only(list(reversed(request.participants))))


def repeatable(summary: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in summary.items() if key not in ("seconds", "versions")}


def assert_equal_weights(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert ours.keys() == theirs.keys()
    assert ours
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize(("name", "task"), CASES)
def test_every_method_trains_resumes_and_does_not_mind_the_order(
    name: str, task: str, federate: Federate, tmp_path: Path
) -> None:
    # One epoch a phase: that epochs in turn are epochs in one go is tested on the client itself.
    client = small_client(name)
    whole = federate(METHODS[name](), task, client=client)
    summary = whole.run()
    assert all(torch.isfinite(tensor).all() for tensor in weights(whole).values())
    # Local's three references come first; then three phases in, in the middle of round 1.
    stop = 9 if name == "local" else 12
    stopped = federate(METHODS[name](), task, client=client, output=tmp_path, observer=StopAfter(stop))
    with pytest.raises(StoppedError):
        stopped.run()
    again = federate(METHODS[name](), task, client=client, output=tmp_path, engine=BackwardsEngine)
    assert repeatable(again.run()) == repeatable(summary)
    assert_equal_weights(weights(whole), weights(again))


def run_weights(federate: Federate, method: Method, **parts: Any) -> dict[str, Any]:
    run = federate(method, **parts)
    run.run()
    return weights(run)


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_fedprox_without_its_term_is_fedavg(federate: Federate, task: str) -> None:
    fedavg = run_weights(federate, FedAvg(), task=task)
    assert_equal_weights(run_weights(federate, FedProx(mu=0), task=task), fedavg)
    other = run_weights(federate, FedProx(mu=1.0), task=task)
    assert any(not torch.equal(other[name], fedavg[name]) for name in fedavg)


@pytest.mark.parametrize(
    "method",
    [
        lambda: FedeKD(lambda_kd=0, gate="none"),
        lambda: FedeKD(lambda_kd=0),
        lambda: FedType(variant="released"),
        lambda: Ditto(lam=0),
    ],
)
def test_methods_that_learn_nothing_from_others_are_local(federate: Federate, method: Callable[[], Method]) -> None:
    assert_equal_weights(run_weights(federate, method()), run_weights(federate, Local()))


def test_fedtype_of_the_paper_is_not_local(federate: Federate) -> None:
    ours, local = run_weights(federate, FedType()), run_weights(federate, Local())
    assert any(not torch.equal(ours[name], local[name]) for name in local)


def test_one_global_model_is_scored_on_every_client(federate: Federate) -> None:
    run = federate(FedAvg())
    run.run()
    ours = weights(run)
    for name, tensor in run.method.server_state["model"].items():
        assert all(torch.equal(ours[f"{client}/{name}"], tensor) for client in range(3))


def test_fedavg_by_samples_is_the_weighted_mean(federate: Federate) -> None:
    from fedekd.functional import average_state_dicts

    class Watched(FedAvg):
        def aggregate(self, updates: Any, round_idx: int) -> None:
            super().aggregate(updates, round_idx)
            expected = average_state_dicts([u.state for u in updates], [u.num_samples for u in updates])
            assert all(torch.equal(self.server_state["model"][name], value) for name, value in expected.items())
            assert len({u.num_samples for u in updates}) > 1

    federate(Watched(weights="samples")).run()


def test_heads_stay_and_bases_are_shared_in_fedper(federate: Federate) -> None:
    run = federate(FedPer())
    summary = run.run()
    ours = weights(run)
    assert not any(name.startswith("head.") for name in run.method.server_state["model"])
    for name in run.method.server_state["model"]:
        assert torch.equal(ours[f"0/{name}"], ours[f"1/{name}"])
    assert not torch.equal(ours["0/head.weight"], ours["1/head.weight"])
    base = sum(t.numel() * t.element_size() for t in run.method.server_state["model"].values())
    assert summary["bytes_up"] == 2 * 3 * base


def test_finetuning_comes_once_at_the_end(federate: Federate) -> None:
    plain, tuned = federate(FedAvg()), federate(FedAvg(finetune_epochs=2))
    plain.run()
    tuned.run()
    for name, tensor in plain.method.server_state["model"].items():
        assert torch.equal(tuned.method.server_state["model"][name], tensor)
    engine: Any = tuned.engine
    assert engine.clients[0].supervised_epochs == 2 * 2 + 2
    assert not torch.equal(weights(tuned)["0/head.weight"], weights(plain)["0/head.weight"])


@pytest.mark.parametrize("method", [FedAvg, FedProx, FedDyn, FedPer, FedRep, Ditto])
def test_clients_of_different_architectures_are_refused_where_they_are_averaged(
    method: Callable[[], Method], federate: Federate
) -> None:
    models = [{"class_path": f"fedekd.models.{name}"} for name in ("PrivateCNN", "ProxyCNN", "ProxyCNN")]
    with pytest.raises(UserError, match=rf"{method.__name__}.*client\.private_model"):
        federate(method(), client=ClientOptions(private_model=models)).run()


def test_fedekd_takes_clients_of_different_architectures(federate: Federate) -> None:
    models = [{"class_path": f"fedekd.models.{name}"} for name in ("PrivateCNN", "ProxyCNN", "PrivateCNN")]
    run = federate(FedeKD(), client=ClientOptions(private_model=models, local_epochs=1))
    run.run()
    engine: Any = run.engine
    assert [type(engine.clients[n].networks["private"]).__name__ for n in range(3)] == [
        *("PrivateCNN", "ProxyCNN", "PrivateCNN"),
    ]
    with pytest.raises(UserError, match="lists 2 models"):
        federate(FedeKD(), client=ClientOptions(private_model=models[:2]))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: FedDyn(alpha=0), "method.alpha is 0"),
        (lambda: FedProx(mu=-1), "method.mu is -1"),
        (lambda: FedType(alpha=1), "method.alpha is 1"),
        (lambda: FedType(mu=-1), "method.mu"),
        (lambda: Ditto(lam=-0.1), "method.lam"),
        (lambda: FML(private_weight=2), "method.private_weight"),
        (lambda: FedAvg(finetune_epochs=-1), "method.finetune_epochs"),
        (lambda: TrimmedMean(0.5), "aggregator.fraction"),
    ],
)
def test_a_value_out_of_range_is_named(make: Callable[[], Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        make()


def test_fedtype_says_what_it_cannot_do(federate: Federate, npz: Path) -> None:
    from fedekd.data import FederatedDataModule

    with pytest.raises(UserError, match="FedType is for classification"):
        federate(FedType(), task="regression").run()
    data = FederatedDataModule(str(npz), num_clients=3, alpha=5.0, fractions=(0.8, 0.0, 0.2))
    with pytest.raises(UserError, match="client 0 has none"):
        federate(FedType(), data=data).run()


def test_fedper_says_which_part_is_missing(federate: Federate) -> None:
    with pytest.raises(UserError, match="no part 'neck'"):
        federate(FedPer(personal=["neck"])).run()


# FedDyn


def mean_of_g(run: Any) -> dict[str, torch.Tensor]:
    clients = run.engine.clients
    zeros = {name: torch.zeros_like(value) for name, value in run.method.server_state["h"].items()}
    memories = [clients[n].memory.get("g", zeros) if n in clients else zeros for n in range(3)]
    return {name: sum(memory[name] for memory in memories) / 3 for name in zeros}


@pytest.mark.parametrize("participation", [1.0, 0.34])
def test_feddyn_server_state_is_the_mean_of_the_clients(federate: Federate, participation: float) -> None:
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
