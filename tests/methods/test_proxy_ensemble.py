"""ProxyEnsemble: the prior-adjusted loss, the common head, what travels, and serving."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedekd.data import FederatedDataModule
from fedekd.errors import UserError
from fedekd.federation import BaselineOptions, RoundOptions
from fedekd.methods import Client, ClientOptions, ClientUpdate, Local, ProxyEnsemble, proxy_ensemble
from fedekd.modules.losses import SupervisedLoss
from fedekd.modules.prediction import ModelOutput
from tests.federation.runs import weights

from .conftest import Federate, make_spec


def clients(run: Any) -> list[Client]:
    return [run.engine.client(number) for number in range(run.num_clients)]


def train_counts(client: Client) -> list[int]:
    labels = client.samples.labels[client.splits.train]
    return [int((labels == label).sum()) for label in range(client.spec.num_outputs)]


def literal_prior(counts: list[int], smoothing: float) -> list[float]:
    total = sum(counts) + smoothing * len(counts)
    return [math.log((count + smoothing) / total) for count in counts]


def literal_log_softmax(z: list[float]) -> list[float]:
    total = sum(math.exp(value) for value in z)
    return [math.log(math.exp(value) / total) for value in z]


def test_prior_adjusted_loss_equals_literal_transcription() -> None:
    torch.manual_seed(0)
    logits, labels, counts = torch.randn(7, 4).double(), [0, 2, 2, 3, 0, 1, 2], [9, 0, 5, 3]
    prior = literal_prior(counts, 0.01)
    expected = 0.0
    for z, label in zip(logits.tolist(), labels, strict=True):
        expected -= literal_log_softmax([value + p for value, p in zip(z, prior, strict=True)])[label]
    loss = SupervisedLoss("classification", offset=torch.tensor(prior, dtype=torch.float64))
    value = loss(ModelOutput((logits,)), None, torch.tensor(labels), lambda *_: None)
    assert float(value) == pytest.approx(expected / len(labels), rel=1e-13)


def test_served_ensemble_equals_literal_transcription(federate: Federate) -> None:
    run = federate(ProxyEnsemble(combination="equal"))
    run.run()
    for client in clients(run):
        assert client.serving is not None
        assert client.serving.members == ("private", "proxy", "tuned")
        prior = literal_prior(train_counts(client), 1.0)
        outputs = {role: client.predict(role, "test").output.double().tolist() for role in client.serving.members}
        expected = []
        for index in range(len(client.splits.test)):
            z = {role: outputs[role][index] for role in outputs}
            for role in ("proxy", "tuned"):
                z[role] = [value + p for value, p in zip(z[role], prior, strict=True)]
            parts = [literal_log_softmax(z[role]) for role in z]
            expected.append([sum(values) / 3 for values in zip(*parts, strict=True)])
        served = client.predict(client.served_role, "test").output.double()
        np.testing.assert_allclose(served, expected, rtol=1e-5, atol=1e-5)


class Recording(ProxyEnsemble):
    """Records the updates that the server aggregates."""

    updates: list[ClientUpdate] = []  # noqa: RUF012

    def aggregate(self, updates: Sequence[ClientUpdate], round_idx: int) -> None:
        # A state holds the tensors of the network, which the next message overwrites.
        copies = [{name: tensor.clone() for name, tensor in update.state.items()} for update in updates]
        self.updates += [replace(update, state=state) for update, state in zip(updates, copies, strict=True)]
        super().aggregate(updates, round_idx)


NO_CONTROL = BaselineOptions(control=False)


def test_common_head_is_orthogonal_frozen_and_stays_at_home(federate: Federate) -> None:
    Recording.updates.clear()
    run = federate(Recording(), baseline=NO_CONTROL)
    run.run()
    assert len(Recording.updates) == run.num_clients * run.options.rounds
    heads: list[Any] = [client.networks[role].head for client in clients(run) for role in ("proxy", "tuned")]
    for head in heads:
        torch.testing.assert_close(head.weight @ head.weight.T, 4 * torch.eye(len(head.weight)), atol=1e-5, rtol=0)
        assert not head.bias.any()
        assert torch.equal(head.weight, heads[0].weight)
    names = set(clients(run)[0].networks["proxy"].state_dict())
    assert all(set(update.state) == names - {"head.weight", "head.bias"} for update in Recording.updates)


def test_regression_adds_the_mean_target_and_sends_the_head(federate: Federate) -> None:
    run = federate(ProxyEnsemble(members=["private", "proxy", "tuned"]), "regression")
    run.run()
    assert {"head.weight", "head.bias"} <= set(run.method.server_state)
    for client in clients(run):
        targets = client.samples.targets[client.splits.train].double()
        mean = sum(targets.tolist()) / len(targets)
        outputs = {role: client.predict(role, "test").output.double() for role in ("private", "proxy", "tuned")}
        expected = (outputs["private"] + outputs["proxy"] + mean + outputs["tuned"] + mean) / 3
        torch.testing.assert_close(client.predict("ensemble", "test").output.double(), expected, rtol=1e-5, atol=1e-5)


def test_proxy_is_averaged_by_samples(federate: Federate) -> None:
    Recording.updates.clear()
    run = federate(Recording(), rounds=RoundOptions(rounds=1), baseline=NO_CONTROL)
    run.run()
    total = sum(update.num_samples for update in Recording.updates)
    assert len({update.num_samples for update in Recording.updates}) > 1
    for name, value in run.method.server_state.items():
        expected = sum(update.num_samples * update.state[name].double() for update in Recording.updates) / total
        torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_without_ensemble_and_prior_equals_local_bit_for_bit(federate: Federate, task: str) -> None:
    method = ProxyEnsemble(members=["private"], label_prior=False, lambda_kd=0.0)
    ours, local = federate(method, task), federate(Local(), task)
    summary, expected = ours.run(), local.run()
    assert [client["score"] for client in summary["clients"]] == [client["score"] for client in expected["clients"]]
    assert all(client["delta"] == 0 for client in summary["clients"])
    trained = weights(ours)
    assert trained
    assert all(torch.equal(trained[name], tensor) for name, tensor in weights(local).items())


def test_private_model_of_the_ensemble_is_that_of_local_training(federate: Federate) -> None:
    ours, local = federate(ProxyEnsemble()), federate(Local())
    ours.run()
    local.run()
    assert all(torch.equal(weights(ours)[name], tensor) for name, tensor in weights(local).items())


def with_other_samples(client: Client, split: str) -> Client:
    """Return a client whose images and labels of one split are other ones."""
    targets, inputs = client.samples.targets.clone(), client.samples.inputs.clone()
    indices = getattr(client.splits, split)
    targets[indices] = (targets[indices] + 1) % client.samples.num_classes
    inputs[indices] = 255 - inputs[indices]
    client.samples = replace(client.samples, targets=targets, inputs=inputs)
    return client


@pytest.mark.parametrize(
    ("split", "sees"), [("test", False), ("calibration", False), ("holdout", False), ("tuning", True)]
)
def test_combination_reads_the_tuning_split_only(
    federate: Federate, monkeypatch: pytest.MonkeyPatch, split: str, sees: bool
) -> None:
    monkeypatch.setattr(proxy_ensemble, "_MIN_TUNING", 1)
    run = federate(ProxyEnsemble(ridge=0.1))
    run.run()
    method, changed = run.method, False
    for client in clients(run):
        received = dict(method.broadcast([client.number], 2).to(client.number))
        before = method._combine(client, received, has_tuned=True)
        after = method._combine(with_other_samples(client, split), received, has_tuned=True)
        assert before is not None
        assert after is not None
        assert torch.equal(before.offsets, after.offsets)
        changed |= not torch.equal(before.weights, after.weights)
    assert changed == sees


def test_diverged_member_is_left_out(federate: Federate) -> None:
    run = federate(ProxyEnsemble())
    run.run()
    client = clients(run)[0]
    with torch.no_grad():
        client.networks["tuned"].head.weight.fill_(math.nan)
    serving = run.method._combine(client, dict(run.method.broadcast([0], 2).to(0)), has_tuned=True)
    assert serving is not None
    assert serving.members == ("private", "proxy")
    client.splits = replace(client.splits, tuning=client.splits.tuning[:0])
    assert not len(client.splits.tuning)
    serving = run.method._combine(client, dict(run.method.broadcast([0], 2).to(0)), has_tuned=True)
    assert serving is not None
    assert serving.members == ("private", "proxy")


def test_untrained_proxy_is_left_out() -> None:
    method, spec = ProxyEnsemble(), make_spec()
    method.init_server(spec)
    initial = dict(method.server_state)

    class Stub:
        spec = make_spec()

    assert method.is_untrained(Stub(), initial)  # type: ignore[arg-type]
    name = next(iter(initial))
    assert not method.is_untrained(Stub(), {**initial, name: initial[name] + 1})  # type: ignore[arg-type]


def test_serve_private_distils_the_ensemble_into_one_network(federate: Federate) -> None:
    run, teacher = federate(ProxyEnsemble(serve="private", distillation_epochs=3)), federate(ProxyEnsemble())
    run.run()
    teacher.run()
    for client, ensemble in zip(clients(run), clients(teacher), strict=True):
        assert client.serving is not None
        assert client.serving.members == ("student",)

        def divergence(role: str, target: Client = ensemble, student: Client = client) -> Tensor:
            log_q = target.predict("ensemble", "train").output.double().log_softmax(1)
            log_p = student.predict(role, "train").output.double().log_softmax(1)
            return (log_q.exp() * (log_q - log_p)).sum(1).mean()

        assert divergence("student") < divergence("private")
        assert torch.equal(
            weights(run)[f"{client.number}/head.weight"], weights(teacher)[f"{client.number}/head.weight"]
        )


def test_ensemble_of_networks_with_exits_scores_every_exit(npz: Path, federate: Federate) -> None:
    options = ClientOptions(
        local_epochs=1, exits=2, optimizer={"class_path": "torch.optim.Adam", "init_args": {"lr": 1e-3}}
    )
    data = FederatedDataModule(str(npz), num_clients=3, alpha=5.0, batch_size=8)
    run = federate(ProxyEnsemble(), data=data, client=options, rounds=RoundOptions(rounds=1))
    run.run()
    assert {"exit_1/accuracy", "exit_2/accuracy"} <= run.progress.records[0].logs.keys()
    tradeoff = run.progress.records[0].tradeoff
    assert tradeoff is not None
    assert len(tradeoff.exits) == 2


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        ({"proxy_epochs": 0}, "method.proxy_epochs: expected at least 1, got 0"),
        ({"finetune_epochs": -1}, "method.finetune_epochs: expected at least 0, got -1"),
        ({"members": []}, "method.members: expected at least one network"),
        ({"members": ["proxies"]}, "method.members: expected one of private, proxy"),
        ({"combination": "best"}, "method.combination: expected one of fitted"),
        ({"ridge": 0.0}, "method.ridge: expected a finite number above 0, got 0"),
        ({"serve": "proxy"}, "method.serve: expected one of ensemble"),
        ({"lambda_kd": -1.0}, "method.lambda_kd: expected a finite number of at least 0, got -1"),
        ({"lambda_kd": math.inf}, "method.lambda_kd: expected a finite number of at least 0, got inf"),
        ({"members": ["tuned"], "finetune_epochs": 0}, "method.members: expected no member 'tuned'"),
        ({"distillation_epochs": 0}, "method.distillation_epochs: expected at least 1, got 0"),
    ],
)
def test_invalid_arguments_raise(arguments: dict[str, Any], option: str) -> None:
    with pytest.raises(UserError, match=option):
        ProxyEnsemble(**arguments)


def test_proxy_without_linear_head_is_refused() -> None:
    client = ClientOptions(proxy_model={"class_path": "torch.nn.Flatten"})
    method = ProxyEnsemble()

    class Spec:
        task, seed = "classification", 0

        def build_model(self, role: str, number: str) -> Any:
            return torch.nn.Flatten()

    Spec.client = client  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=r"client\.proxy_model: expected a network whose last layer"):
        method._build_proxy(Spec())  # type: ignore[arg-type]


def test_weights_are_equal_below_ten_tuning_samples(federate: Federate, monkeypatch: pytest.MonkeyPatch) -> None:
    run = federate(ProxyEnsemble(ridge=0.1))
    run.run()
    assert proxy_ensemble._MIN_TUNING == 10
    client = clients(run)[0]
    received = dict(run.method.broadcast([0], 2).to(0))

    def weights_with(least: int) -> list[float]:
        monkeypatch.setattr(proxy_ensemble, "_MIN_TUNING", least)
        serving = run.method._combine(client, received, has_tuned=True)
        assert serving is not None
        return serving.weights.tolist()

    samples = len(client.splits.tuning)
    assert weights_with(samples + 1) == pytest.approx([1 / 3] * 3)
    assert weights_with(samples) != pytest.approx([1 / 3] * 3)


def test_fitted_weights_count_as_training_on_the_tuning_split() -> None:
    assert ProxyEnsemble().training_splits == ("train", "tuning")
    assert ProxyEnsemble(combination="equal").training_splits == ("train",)


def test_options_that_would_serve_the_private_model_only_are_refused(federate: Federate) -> None:
    with pytest.raises(UserError, match=r"method\.finetune_epochs: expected at least 1 for regression"):
        federate(ProxyEnsemble(finetune_epochs=0), "regression").run()
    with pytest.raises(UserError, match=r"method\.members: expected 'private' with client\.exits"):
        federate(ProxyEnsemble(members=["proxy"]), client=ClientOptions(exits=2)).run()
    with pytest.raises(UserError, match=r"select_round: expected last with method\.serve private, got 'best'"):
        federate(ProxyEnsemble(serve="private"), rounds=RoundOptions(select_round="best")).run()


def test_served_student_logs_no_weights_and_the_flops_of_one_network(federate: Federate) -> None:
    run = federate(ProxyEnsemble(serve="private"))
    run.run()
    first, last = run.progress.history[0], run.progress.history[-1]
    assert "client_0/serving/weight_private" in first
    assert not [name for name in last if "serving/weight" in name]
    assert last["serving/flops"] == last["serving/private_flops"]
