"""Do-no-harm in federations: which model a client deploys, what is reported, and that nothing else changes."""

from __future__ import annotations

import csv
import inspect
import json
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fedekd.methods
from fedekd.data import FederatedDataModule, scale
from fedekd.do_no_harm import DoNoHarm
from fedekd.errors import UserError
from fedekd.federation import MultiProcess, Orchestrator, RoundOptions, SequentialEngine, local_baseline
from fedekd.federation.baseline_key import baseline_key
from fedekd.federation.local_baseline import train_local_baseline
from fedekd.federation.source_code import SourceUnavailableError
from fedekd.functional import betting_p_value, betting_stake
from fedekd.functional.metric_tests import auroc_gain
from fedekd.methods import ClientOptions, ClientUpdate, FedAvg, FedeKD, FedType, Local, Method
from fedekd.modules import ProxyDistillModule, SupervisedModule
from fedekd.reporting import metrics_csv

from .conftest import Federate, Recorder
from .runs import BackwardsEngine, StopAfter, StoppedError, assert_equal_weights, contents, repeatable, weights

HALF, NEVER = DoNoHarm(confidence=0.5), DoNoHarm(confidence=0.999999999)


class Uneven(Method):
    """Client 0 trains as Local, client 1 ends with a zero head, client 2 trains four times as long."""

    def receive(self, client: Any, received: Any, round_idx: int) -> dict[str, float]:
        if round_idx == 0:
            return {}
        network, epochs = client.networks["private"], client.spec.client.local_epochs
        module = SupervisedModule(network, client.spec.task, client.spec.optimizer)
        times = 4 if client.number == 2 else 1
        client.train_supervised(module, epochs=times * epochs, carry_optimizer=True)
        client.supervised_epochs -= (times - 1) * epochs  # its baseline is trained as long as the others'
        if client.number == 1 and round_idx == client.spec.rounds:
            torch.nn.init.zeros_(network.head.weight)
        return {}


def client_options(**values: Any) -> ClientOptions:
    adam = {"class_path": "torch.optim.Adam", "init_args": {"lr": 3e-4}}
    return ClientOptions(
        **{"local_epochs": 1, "private_model": {"class_path": "fedekd.models.ProxyCNN"}} | values, optimizer=adam
    )


@pytest.fixture
def harmless(federate: Federate, write_blobs: Callable[..., Path], tmp_path: Path) -> Federate:
    """Builds an orchestrator with do_no_harm, by default of Uneven; keyword arguments replace its parts."""
    npz = write_blobs(tmp_path / "more.npz", num_samples=360)

    def make(method: Method | None = None, task: Any = None, **parts: Any) -> Orchestrator:
        data = FederatedDataModule(
            str(npz), num_clients=3, alpha=50, batch_size=8, fractions=(0.4, 0.4, 0.2), task=task
        )
        defaults = {"data": data, "client": client_options(), "do_no_harm": HALF}
        return federate(method or Uneven(), **{**defaults, **parts})

    return make


def of_clients(found: dict[str, Any], *numbers: int) -> dict[str, Any]:
    return {name: tensor for name, tensor in found.items() if int(name[0]) in numbers}


def deployed_local(run: Orchestrator) -> dict[str, Any]:
    """Weights of the deployed local models, by client and name."""
    engine: Any = run.engine
    networks = {n: client.networks["local"] for n, client in engine.clients.items() if "local" in client.networks}
    return {f"{n}/{name}": tensor for n, each in sorted(networks.items()) for name, tensor in each.state_dict().items()}


@pytest.mark.slow
@pytest.mark.parametrize("held", [None, 0, 4])
def test_deployed_local_model_equals_local_after_as_many_rounds(
    harmless: Federate, tmp_path: Path, held: int | None
) -> None:
    """Whether the baseline is trained for this run, or cached with 0 or 4 rounds."""
    folder = None if held is None else tmp_path / "local"
    if held:
        harmless(FedeKD(), rounds=RoundOptions(rounds=held), baseline_dir=folder, do_no_harm=None).run()
    local_run, without = harmless(Local(), do_no_harm=None), harmless(do_no_harm=None)
    run = harmless(baseline_dir=folder, output=tmp_path / "run")
    for each in (local_run, without):
        each.run()
    summary = run.run()
    assert [client["deployed"] for client in summary["clients"]] == ["local", "local", "federated"]
    assert_equal_weights(deployed_local(run), of_clients(weights(local_run), 0, 1))
    assert_equal_weights(weights(run), weights(without))  # the federated models stay
    opened = harmless(output=tmp_path / "run")
    clients = opened.load_clients()
    assert [client.deployed_role for client in clients] == ["local", "local", "private"]
    assert [client.deployed_model is client.networks[client.deployed_role] for client in clients] == [True] * 3
    assert_equal_weights(weights(opened), weights(without))
    assert_equal_weights(deployed_local(opened), deployed_local(run))
    assert repeatable(harmless(output=tmp_path / "run").evaluate_checkpoint()) == repeatable(summary)


def right(client: Any, network: Any, split: str) -> list[bool]:
    """Correctness of a network per image."""
    images, found = client.samples, []
    for index in getattr(client.splits, split):
        with torch.no_grad():
            output = network.eval()(scale(images.inputs[index][None]))
        found.append(bool(output.argmax() == images.targets[index]))
    return found


@pytest.mark.parametrize("keep", ["certified", "better"])
def test_summary_comparison_equals_a_loop_over_images(harmless: Federate, tmp_path: Path, keep: Any) -> None:
    rule = DoNoHarm(0.5, rule=keep, test="sign")
    run, local_run = harmless(do_no_harm=rule, output=tmp_path), harmless(Local(), do_no_harm=None)
    summary = run.run()
    local_run.run()
    engines: Any = run.engine, local_run.engine
    before, after = [], []
    for number, client_summary in enumerate(summary["clients"]):
        ours, theirs = (engine.clients[number] for engine in engines)
        splits = ("tuning", "holdout") if keep == "certified" else ("tuning",)
        federated, local = (
            [is_right for split in splits for is_right in right(each, each.networks["private"], split)]
            for each in (ours, theirs)
        )
        worse = sum(a and not b for a, b in zip(local, federated, strict=True))
        better = sum(b and not a for a, b in zip(local, federated, strict=True))
        assert (client_summary["samples"], client_summary["worse"], client_summary["better"]) == (
            len(local),
            worse,
            better,
        )
        assert client_summary["gain"] == pytest.approx((better - worse) / len(local))
        of = worse + better
        p = Fraction(sum(math.comb(of, k) for k in range(worse + 1)), 2**of)
        assert client_summary["p_value"] == (None if keep == "better" else pytest.approx(float(p)))
        takes = better > worse if keep == "better" else p <= Fraction(1, 2)
        assert client_summary["deployed"] == ("federated" if takes else "local")
        scores = [float(np.mean(right(each, each.networks["private"], "test"))) for each in (ours, theirs)]
        assert (client_summary["score"], client_summary["local"]) == pytest.approx(scores)
        assert ours.score(role=ours.deployed_role) == scores[0 if takes else 1]
        before.append(scores[0] - scores[1])
        after.append(scores[0] - scores[1] if takes else 0.0)
    kept, delta = summary["deployed"], {"avg": np.mean(after), "worst": min(after), "p10": np.percentile(after, 10)}
    assert kept["delta"] == pytest.approx(delta)
    assert summary["delta"]["worst"] == pytest.approx(min(before))
    assert summary["delta"]["worst"] < kept["delta"]["worst"] == 0
    own = [client["local"] + change for client, change in zip(summary["clients"], after, strict=True)]
    assert (kept["mean"], kept["worst"]) == pytest.approx((np.mean(own), min(own)))
    assert kept["federated"] == pytest.approx(1 / 3)
    assert kept["rule"] == {"confidence": 0.5, "margin": 0.0, "rule": keep, "looks": 1, "clip": 1.0} | {
        "test": "sign",
        "splits": "held_out",
        "candidates": [],
        "metric": "accuracy",
        "unit": "group",
    }
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    last = list(csv.DictReader((tmp_path / "metrics.csv").open()))[-1]
    flat = {"federated": kept["federated"], "accuracy/mean": kept["mean"], "accuracy/worst": kept["worst"]}
    flat |= {f"delta/{name}": value for name, value in kept["delta"].items()}
    assert {name: float(last[f"deployed/{name}"]) for name in flat} == flat
    for number, client_summary in enumerate(summary["clients"]):
        found = {
            name: float(last[f"client_{number}/deployed/{name}"])
            for name in ("federated", "worse", "better", "samples")
        }
        assert found == {
            "federated": float(client_summary["deployed"] == "federated"),
            **{name: client_summary[name] for name in list(found)[1:]},
        }


@pytest.mark.parametrize(
    ("parts", "splits"),
    [
        ({}, ("tuning", "holdout")),
        ({"rounds": RoundOptions(rounds=1, select_round="best")}, ("holdout",)),
        ({"method": FedeKD(gate="correctness")}, ("holdout",)),
        ({"do_no_harm": DoNoHarm(splits="holdout")}, ("holdout",)),
    ],
)
def test_comparison_leaves_out_a_tuning_split_that_is_used(
    harmless: Federate, parts: dict[str, Any], splits: tuple[str, ...]
) -> None:
    run = harmless(**{"rounds": RoundOptions(rounds=1), **parts})
    summary = run.run()
    for client, held in zip(summary["clients"], run.data.clients, strict=True):
        assert client["samples"] == sum(len(getattr(held, split)) for split in splits)
        assert ("deciding_samples" in client) == (client["samples"] > 0)


def test_clients_with_too_few_samples_for_a_decision_are_a_warning(
    harmless: Federate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedekd.federation.checks.fewest_samples", lambda rule, task: 44)
    recorder = Recorder()
    harmless(do_no_harm=DoNoHarm(0.9), observer=recorder)
    [warning] = [line for line in recorder.warnings if "do_no_harm" in line]
    assert "with at least 44 samples of the tuning and holdout split" in warning
    assert "fewer and deploy their local model: 0 (" in warning
    assert "\n" not in warning


def test_comparison_of_regression_uses_squared_errors(harmless: Federate) -> None:
    rule = DoNoHarm(0.1, clip=0.5)
    run, local_run = harmless(task="regression", do_no_harm=rule), harmless(Local(), task="regression", do_no_harm=None)
    summary = run.run()
    local_run.run()
    engines: Any = run.engine, local_run.engine
    for number, client_summary in enumerate(summary["clients"]):
        gains = {}
        for split in ("tuning", "holdout"):
            errors = []
            for engine in engines:
                client = engine.clients[number]
                output = client.predict("private", split).output.double().squeeze(1)
                errors.append((output - client.samples.targets[getattr(client.splits, split)].double()) ** 2)
            gains[split] = ((errors[1] - errors[0]).clamp(-0.5, 0.5) / 0.5).numpy()
        stake = betting_stake(gains["tuning"], 0.0, len(gains["holdout"]), rule.level)
        assert client_summary["p_value"] == pytest.approx(betting_p_value(gains["holdout"], 0.0, stake))
        assert client_summary["deployed"] == ("federated" if client_summary["p_value"] <= 0.9 else "local")
    assert {client["deployed"] for client in summary["clients"]} == {"federated", "local"}


@pytest.mark.slow
def test_resume_after_any_round_gives_equal_results(harmless: Federate, tmp_path: Path) -> None:
    parts = {"rounds": RoundOptions(rounds=3), "do_no_harm": DoNoHarm(0.1, looks=2), "baseline_dir": tmp_path / "l"}
    whole = harmless(**parts)
    expected = whole.run()
    assert deployed_local(whole)
    for rounds in (1, 2, 3):
        parts["output"] = tmp_path / str(rounds)
        with pytest.raises(StoppedError):
            harmless(**parts, observer=StopAfter(rounds=rounds)).run()
        again = harmless(**parts)
        assert repeatable(again.run()) == repeatable(expected)
        assert metrics_csv(again.progress.history) == metrics_csv(whole.progress.history)
        again = harmless(**parts)
        again.load_clients()
        assert_equal_weights(deployed_local(again), deployed_local(whole))


@pytest.mark.parametrize("engine", [BackwardsEngine, pytest.param(MultiProcess(2), marks=pytest.mark.slow)])
def test_engine_and_order_of_clients_do_not_change_results(harmless: Federate, tmp_path: Path, engine: Any) -> None:
    rule = DoNoHarm(rule="better", looks=2)
    expected = harmless(FedeKD(), do_no_harm=rule, output=tmp_path / "a").run()
    other = harmless(FedeKD(), do_no_harm=rule, output=tmp_path / "b", engine=engine)
    baselines: list[Any] = []
    local_baselines = other.engine.local_baselines
    other.engine.local_baselines = lambda rounds: baselines.append(local_baselines(rounds)) or baselines[-1]  # type: ignore[method-assign]
    assert repeatable(other.run()) == repeatable(expected)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    # Per-sample losses stay on the client.
    assert [(baseline.losses, len(baseline.scores)) for baseline in baselines[0].values()] == [([], 2)] * 3


def test_looks_are_logged_in_their_rounds_and_share_the_level(harmless: Federate) -> None:
    run = harmless(rounds=RoundOptions(rounds=4), do_no_harm=DoNoHarm(0.5, looks=2))
    summary = run.run()
    has_comparison = ["deployed/federated" in row for row in run.progress.history]
    assert has_comparison == [False, True, True, True]
    assert [client["level"] for client in summary["clients"]] == [0.25] * 3
    worse = [row["client_1/deployed/worse"] for row in run.progress.history[1:]]
    assert (
        worse[0] == worse[1] == 0 < worse[2]
    )  # client 1 gets worse only at the end; the last comparison stays between looks
    assert "local" in run.engine.client(1).networks  # type: ignore[attr-defined]


@pytest.mark.parametrize("method", [FedeKD, FedAvg])
def test_client_that_never_took_part_compares_after_the_last_round(harmless: Federate, method: Any) -> None:
    """All clients receive the last aggregate; their baseline has at least one round, as for Delta."""
    run = harmless(method(), rounds=RoundOptions(rounds=2, participation=0.4), do_no_harm=NEVER)
    summary = run.run()
    assert [client["deployed"] for client in summary["clients"]] == ["local"] * 3
    assert summary["deployed"]["delta"] == {"avg": 0, "worst": 0, "p10": 0}
    for number, client_summary in enumerate(summary["clients"]):
        assert run.engine.client(number).score(role="local") == client_summary["local"]  # type: ignore[attr-defined]


METHODS = {
    name: each
    for name in fedekd.methods.__all__
    if inspect.isclass(each := getattr(fedekd.methods, name)) and issubclass(each, Method)
    if not (inspect.isabstract(each) or each.is_local_baseline or "validation" in each.training_splits)
} | {"FedAvg, fine-tuned": lambda: FedAvg(finetune_epochs=1)}


@pytest.fixture(scope="module")
def local_results() -> dict[tuple[Any, int], Any]:
    """Scores and weights of Local by exits and number of rounds, shared by all methods."""
    return {}


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_every_method_deploys_the_model_that_delta_is_computed_with(
    harmless: Federate, local_results: dict[tuple[Any, int], Any], name: str
) -> None:
    method = METHODS[name]()
    client = client_options(exits=None if method.exits is None else 2)
    run = harmless(method, client=client, do_no_harm=NEVER, rounds=RoundOptions(rounds=1))
    summary = run.run()
    case = client.exits, len(run.progress.local[0])
    if case not in local_results:
        local_run = harmless(Local(), client=client, do_no_harm=None, rounds=RoundOptions(rounds=case[1]))
        local_results[case] = [each["score"] for each in local_run.run()["clients"]], weights(local_run)
    scores, expected = local_results[case]
    assert [each["local"] for each in summary["clients"]] == scores
    assert_equal_weights(deployed_local(run), expected)


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"method": Local()}, "do_no_harm: expected a federated method to compare with the local baseline, got Local"),
        ({"method": FedType()}, "on the validation split, which method FedType trains on"),
        (
            {"method": FedeKD(gate="correctness"), "do_no_harm": DoNoHarm(rule="better")},
            r"do_no_harm\.rule: expected .*, got 'better', whose tuning split method FedeKD uses\. Choose certified",
        ),
        ({"do_no_harm": DoNoHarm(looks=3)}, r"do_no_harm\.looks: expected at most 2 \(rounds\), got 3"),
        ({"fractions": (0.8, 0.0, 0.2)}, "client 0 has no sample in the tuning or holdout split, .* Raise"),
        (
            {"fractions": (0.8, 0.0, 0.2), "do_no_harm": DoNoHarm(rule="better")},
            "client 0 has no sample in the tuning split",
        ),
    ],
)
def test_orchestrator_without_two_models_or_samples_raises_user_error(
    harmless: Federate, npz: Path, parts: dict[str, Any], words: str
) -> None:
    parts = dict(parts)
    if "fractions" in parts:
        parts["data"] = FederatedDataModule(str(npz), num_clients=3, alpha=50, fractions=parts.pop("fractions"))
    with pytest.raises(UserError, match=words) as error:
        harmless(**parts)
    assert "\n" not in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize("other", [None, DoNoHarm(0.8)])
def test_resume_with_another_rule_raises_user_error(harmless: Federate, tmp_path: Path, other: Any) -> None:
    with pytest.raises(StoppedError):
        harmless(output=tmp_path, observer=StopAfter(rounds=1)).run()
    with pytest.raises(UserError, match=r"do_no_harm.*: expected the saved value .*, got"):
        harmless(do_no_harm=other, output=tmp_path).run()


def test_resume_finished_run_with_a_new_rule_raises_user_error(harmless: Federate, tmp_path: Path) -> None:
    """It has no comparisons: its summary would claim that all clients deploy the federated model."""
    harmless(do_no_harm=None, output=tmp_path).run()
    with pytest.raises(UserError, match="do_no_harm: expected the saved value None, got"):
        harmless(output=tmp_path).run()


@pytest.mark.slow
@pytest.mark.parametrize("task", ["classification", "regression"])
def test_diverged_federated_model_is_not_deployed(harmless: Federate, tmp_path: Path, task: Any) -> None:
    class Diverging(Uneven):
        def receive(self, client: Any, received: Any, round_idx: int) -> dict[str, float]:
            found = super().receive(client, received, round_idx)
            torch.nn.init.constant_(client.networks["private"].head.weight, math.nan)
            return found

    summary = harmless(Diverging(), task=task, output=tmp_path, do_no_harm=DoNoHarm(0.001, margin=0.4)).run()
    assert [client["deployed"] for client in summary["clients"]] == ["local"] * 3
    assert summary["deployed"]["mean"] == pytest.approx(summary["local_mean"])


def no_key(client: Any) -> str:
    raise SourceUnavailableError("module __main__ has no file")


@pytest.mark.parametrize("key", [baseline_key, no_key])
def test_comparison_reads_the_cached_baseline(
    key: Any, harmless: Federate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder, rule = Recorder(), DoNoHarm(confidence=0.999999999, looks=2)
    trained: list[int] = []
    receive = Local.receive

    def count(method: Local, client: Any, *given: Any) -> Any:
        trained.append(client.number)
        return receive(method, client, *given)

    with monkeypatch.context() as patch:
        patch.setattr(local_baseline, "baseline_key", key)
        patch.setattr(Local, "receive", count)
        summary = harmless(baseline_dir=tmp_path / key.__name__, do_no_harm=rule, observer=recorder).run()
    assert sorted(trained) == [0, 0, 1, 1, 2, 2]
    assert len([line for line in recorder.warnings if "trained in every run" in line]) == (key is no_key)
    assert harmless(baseline_dir=tmp_path, do_no_harm=rule).run()["clients"] == summary["clients"]
    assert all(len(torch.load(path, weights_only=False)["metrics"]) == 2 for path in tmp_path.glob("*.pt"))


class PermutedProxies(FedeKD):
    """Some clients distil permuted labels into their proxy."""

    def __init__(self, malicious: Sequence[int]) -> None:
        super().__init__(lambda_kd=20.0, gate="none")
        self.malicious = list(malicious)

    def prepare_update(self, client: Any, round_idx: int) -> ClientUpdate:
        if client.number not in self.malicious:
            return super().prepare_update(client, round_idx)
        private, proxy = client.networks["private"], client.networks["proxy"]
        module = ProxyDistillModule(proxy, private, client.spec.task, 1.0, client.spec.optimizer)
        teacher_outputs = tuple(
            logits.roll(1 + client.number, dims=1) for logits in client.predict("private", "train").tensors
        )
        client.train("proxy", module, round_idx, teacher_outputs=teacher_outputs)
        return ClientUpdate.of(client, proxy)


@pytest.mark.slow
@pytest.mark.parametrize("malicious", [[0], [0, 1, 2]])
def test_proxies_of_permuted_labels_do_not_harm_deployed_models_on_digits(
    federate: Federate, malicious: list[int]
) -> None:
    data = FederatedDataModule("digits", num_clients=3, alpha=5.0, batch_size=32)
    adam = {"class_path": "torch.optim.Adam", "init_args": {"lr": 1e-2}}
    model = {"class_path": "fedekd.models.ProxyCNN"}
    client = ClientOptions(local_epochs=2, private_model=model, proxy_model=model, optimizer=adam)
    summary = federate(PermutedProxies(malicious), data=data, client=client, do_no_harm=DoNoHarm(0.9)).run()
    assert max(client_summary["delta"] for client_summary in summary["clients"]) < -0.1
    assert [client_summary["deployed"] for client_summary in summary["clients"]] == ["local"] * 3
    assert summary["deployed"]["delta"] == {"avg": 0, "worst": 0, "p10": 0}
    assert summary["deployed"]["mean"] == pytest.approx(summary["local_mean"])


def test_do_no_harm_compares_one_sample_of_each_group(federate: Federate, npz: Path) -> None:
    arrays = dict(np.load(npz))
    images, labels = (
        np.concatenate([arrays[f"{split}_{kind}"] for split in ("train", "test")]) for kind in ("images", "labels")
    )
    np.savez(npz, images=images, labels=labels[:, 0], patient=np.arange(len(labels)) // 3)
    samples = {}
    for unit in ("group", "sample"):
        data = FederatedDataModule(str(npz), num_clients=2, alpha=5, batch_size=8, group_column="patient")
        run = federate(FedAvg(), data=data, do_no_harm=DoNoHarm(confidence=0.5, unit=unit))
        summary, engine = run.run(), run.engine
        assert isinstance(engine, SequentialEngine)
        samples[unit] = [values["samples"] for values in summary["clients"]]
    held_out = [torch.cat([client.tuning, client.holdout]) for client in data.clients]
    assert samples["sample"] == [len(indices) for indices in held_out]
    assert data.samples.group is not None
    assert samples["group"] == [len(data.samples.group[indices].unique()) for indices in held_out]
    local = [engine._new_client(number) for number in engine.clients]
    for each in local:
        train_local_baseline(each, engine.clients[each.number].supervised_rounds, None)
    run = federate(FedAvg(), data=data, do_no_harm=DoNoHarm(confidence=0.5, metric="recall"))
    auroc = federate(FedAvg(), data=data, do_no_harm=DoNoHarm(confidence=0.5, metric="auroc")).run()["clients"]
    for client, old, values, ranked in zip(engine.clients.values(), local, run.run()["clients"], auroc, strict=True):
        drawn = {split: client.independent_positions(split) for split in ("tuning", "holdout")}
        before, after = (
            torch.cat([each.held_out(split)[0][positions] for split, positions in drawn.items()])
            for each in (old, client)
        )
        targets = torch.cat([client.targets(split)[positions] for split, positions in drawn.items()])
        assert (values["worse"], values["better"]) == (int((after > before).sum()), int((before > after).sum()))
        gains = [float((before - after)[targets == label].mean()) for label in targets.unique()]
        assert values["gain"] == pytest.approx(min(gains))
        scores = [
            torch.cat([each.held_out(split, with_classes=True)[1][positions] for split, positions in drawn.items()])
            for each in (old, client)
        ]
        classes = sorted({*targets.tolist(), *client.targets("train").tolist()})
        assert ranked["gain"] == pytest.approx(auroc_gain(*scores, targets, classes))
        positions = drawn["holdout"]
        groups = data.samples.group[client.splits.holdout]
        assert groups[positions].unique().equal(groups.unique())
        assert len(positions) == len(groups.unique())
