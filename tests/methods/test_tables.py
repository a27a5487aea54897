"""Every method on a table: the four hospitals of UCI Heart Disease."""

from __future__ import annotations

import math
from inspect import isabstract
from typing import Any

import pytest
import torch

from fedekd import methods
from fedekd.data import FederatedDataModule
from fedekd.do_no_harm.rule import DoNoHarm
from fedekd.errors import UserError
from fedekd.federation import Orchestrator, RoundOptions
from fedekd.methods import ClientOptions, FedeKD, Method
from fedekd.modules import TrainerFactory

METHODS = [
    name
    for name in methods.__all__
    if isinstance(kind := getattr(methods, name), type) and issubclass(kind, Method) and not isabstract(kind)
]
CLASSIFICATION_ONLY = {"FedType", "SafeKD", "CAFEDistill", "DepthFL", "ScaleFL"}


def federate(method: Method, **options: Any) -> Orchestrator:
    rule = options.pop("do_no_harm", None)
    model = {"class_path": "fedekd.models.MLP", "init_args": {"hidden": [8, 8, 4]}}
    return Orchestrator(
        method,
        FederatedDataModule("heart_disease", site_column="site", batch_size=128, **options),
        ClientOptions(local_epochs=1, private_model=model, proxy_model=model),
        TrainerFactory(accelerator="cpu", precision="32-true", threads=1, loop="lean"),
        RoundOptions(rounds=1),
        do_no_harm=rule,
    )


@pytest.mark.parametrize("name", METHODS)
def test_method_table_of_four_hospitals_is_scored(name: str) -> None:
    run = federate(getattr(methods, name)())
    summary = run.run()
    assert [client["name"] for client in summary["clients"]] == [
        "cleveland",
        "hungarian",
        "long beach va",
        "switzerland",
    ]
    assert all(0 <= client[key] <= 1 for client in summary["clients"] for key in ("score", "local"))
    # As many as the local baseline, which Delta is paired with.
    engine: Any = run.engine
    assert [client.supervised_epochs for client in engine.clients.values()] == [1] * 4


@pytest.mark.parametrize("name", [name for name in METHODS if name not in CLASSIFICATION_ONLY])
def test_method_table_real_targets_are_scored_in_their_unit(name: str) -> None:
    run = federate(getattr(methods, name)(), target_column="age", task="regression")
    summary = run.run()
    # An untrained network predicts about the mean age; its error is the standard deviation, about 9 years.
    assert all(5 < client[key] < 15 for client in summary["clients"] for key in ("score", "local"))
    assert all(client["classes"] == [] for client in summary["clients"])


def test_do_no_harm_table_real_targets_are_compared_in_their_unit() -> None:
    run = federate(FedeKD(), target_column="age", task="regression", do_no_harm=DoNoHarm(rule="better", clip=100.0))
    summary = run.run()
    assert all(math.isfinite(client["gain"]) for client in summary["clients"])
    client: Any = run.engine.client(0)  # type: ignore[attr-defined]
    targets = client.samples.targets[client.splits.tuning]
    mean_loss = client.held_out("tuning")[0].mean().item()
    assert 25 < mean_loss < 225
    assert torch.isfinite(targets).all()


def test_do_no_harm_table_is_decided_per_hospital() -> None:
    summary = federate(FedeKD(), do_no_harm=DoNoHarm()).run()
    assert {client["deployed"] for client in summary["clients"]} <= {"local", "federated"}


def test_model_of_images_on_a_table_names_the_mlp() -> None:
    data = FederatedDataModule("heart_disease", site_column="site")
    with pytest.raises(
        UserError, match=r"client\.private_model: .*--client\.private_model MLP --client\.proxy_model MLP"
    ):
        Orchestrator(FedeKD(), data)
