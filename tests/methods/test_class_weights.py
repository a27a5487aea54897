from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight
from torch import nn

from fedekd import methods
from fedekd.errors import UserError
from fedekd.federation import RoundOptions
from fedekd.methods import ClientOptions, FedAvg, Local, Method
from fedekd.modules import ModelOutput, ObjectiveModule, SupervisedLoss, TrainerFactory
from tests.federation.runs import weights

from .conftest import Federate, client_of, make_spec

CLASSES = {
    name: each
    for name, each in vars(methods).items()
    if isinstance(each, type) and issubclass(each, Method) and not inspect.isabstract(each)
}


def options(class_weights: str | None = "balanced", exits: int | None = None) -> ClientOptions:
    return ClientOptions(
        local_epochs=1,
        private_model={"class_path": "fedekd.models.ProxyCNN"},
        optimizer={"class_path": "torch.optim.Adam", "init_args": {"lr": 1e-3}},
        class_weights=class_weights,
        exits=exits,
    )


def test_class_weights_equal_scikit_learn_and_are_zero_for_absent_classes(federate: Federate) -> None:
    client = client_of(federate(Local(), client=options()))
    labels = client.samples.targets[client.splits.train].numpy()
    expected = compute_class_weight("balanced", classes=np.unique(labels), y=labels)
    assert client.class_weights[np.unique(labels)].numpy() == pytest.approx(expected)
    absent = int(labels[0])
    client.splits = replace(client.splits, train=client.splits.train[torch.from_numpy(labels != absent)])
    assert client.class_weights[absent] == 0.0
    others = labels[labels != absent]
    expected = compute_class_weight("balanced", classes=np.unique(others), y=others)
    assert client.class_weights[np.unique(others)].numpy() == pytest.approx(expected)
    assert client_of(federate(Local(), client=options(None))).class_weights is None


def test_label_prior_counts_samples_with_their_class_weights(federate: Federate) -> None:
    client = client_of(federate(Local(), client=options()))
    present = torch.bincount(client.targets("train"), minlength=client.spec.num_outputs) > 0
    assert present.sum() > 1
    # Balanced weights: every class of the split has the same total, whatever its number of samples.
    assert client.log_label_prior(1e-9)[present].exp().tolist() == pytest.approx(
        [1 / float(present.sum())] * int(present.sum())
    )
    assert client.log_label_prior(1.0).double().exp().tolist() == pytest.approx(client.label_prior.tolist())
    plain = client_of(federate(Local(), client=options(None)))
    counts = torch.bincount(plain.targets("train"), minlength=plain.spec.num_outputs).double()
    assert plain.label_prior.tolist() == pytest.approx(((counts + 1) / (counts + 1).sum()).tolist())


def test_supervised_loss_with_class_weights_equals_weighted_mean() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(12, 3, requires_grad=True), torch.randint(3, (12,))
    loss = SupervisedLoss("classification")
    loss.class_weights = torch.tensor([0.5, 2.0, 0.0])
    per_sample = -logits.log_softmax(1)[torch.arange(12), labels]
    factors = loss.class_weights[labels]
    slow = (factors * per_sample).sum() / factors.sum()
    value = loss(ModelOutput((logits,)), None, labels, lambda *_: None)
    torch_value = torch.nn.CrossEntropyLoss(weight=loss.class_weights)(logits, labels)
    assert value.item() == torch_value.item() == pytest.approx(slow.item(), rel=1e-6)
    gradients = [torch.autograd.grad(each, logits, retain_graph=True)[0] for each in (value, slow)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("name", CLASSES)
def test_class_weights_reach_every_supervised_loss(
    name: str, federate: Federate, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = []
    inner = SupervisedLoss.__call__

    def spy(self: SupervisedLoss, *arguments: Any) -> Any:
        used.append(self.class_weights is not None)
        return inner(self, *arguments)

    monkeypatch.setattr(SupervisedLoss, "__call__", spy)
    method = CLASSES[name]()
    client = options(exits=None if method.exits is None else 2)
    federate(method, client=client, rounds=RoundOptions(rounds=1)).run()
    assert used
    assert all(used)


def test_class_weights_apply_to_the_local_baseline(federate: Federate) -> None:
    plain, local, federated = (
        federate(method, client=options(value))
        for method, value in ((Local(), None), (Local(), "balanced"), (FedAvg(), "balanced"))
    )
    for run in (plain, local, federated):
        run.run()
    assert not all(torch.equal(a, b) for a, b in zip(weights(plain).values(), weights(local).values(), strict=True))
    assert federated.progress.local == {
        number: [row[f"client_{number}/accuracy"] for row in local.progress.history] for number in range(3)
    }


def test_class_weights_give_equal_networks_in_both_loops(federate: Federate) -> None:
    trained = []
    for loop in ("lean", "lightning"):
        trainer = TrainerFactory(accelerator="cpu", precision="32-true", threads=1, loop=loop)  # type: ignore[arg-type]
        run = federate(Local(), client=options(), trainer=trainer)
        run.run()
        trained.append(weights(run))
    assert trained[0].keys() == trained[1].keys()
    assert all(torch.equal(trained[0][name], trained[1][name]) for name in trained[0])


def test_class_weights_invalid_value_or_regression_raises_user_error() -> None:
    with pytest.raises(UserError, match=r"client\.class_weights: expected balanced or null, got 'inverse'"):
        options("inverse")
    with pytest.raises(UserError, match=r"client\.class_weights: expected null for regression, got 'balanced'"):
        make_spec(task="regression", num_outputs=1, client=options())


class _Nested:
    """Term with supervised losses in a list, a mapping and another term that refers to this one."""

    name = "nested"

    def __init__(self) -> None:
        self.losses = [SupervisedLoss("classification"), {"other": SupervisedLoss("classification")}]
        self.inner = nn.ModuleList([nn.Identity()])
        self.inner[0].loss, self.inner[0].outer = SupervisedLoss("classification"), self  # type: ignore[assignment]

    def __call__(self, *arguments: Any) -> torch.Tensor:
        return torch.zeros(())


def test_set_class_weights_reaches_losses_at_any_depth() -> None:
    term, weights = _Nested(), torch.ones(3)
    module = ObjectiveModule(nn.Linear(1, 1), [term])
    module.set_class_weights(weights)
    found: list[Any] = [term.losses[0], term.losses[1]["other"], term.inner[0].loss]  # type: ignore[index]
    assert all(loss.class_weights is weights for loss in found)
    module.set_class_weights(None)
    assert all(loss.class_weights is None for loss in found)
