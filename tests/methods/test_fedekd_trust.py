"""FedeKD: trust measured on held-out samples, and cross-fitted proxies."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedekd.data import FederatedDataModule
from fedekd.errors import UserError
from fedekd.federation import Orchestrator, RoundOptions
from fedekd.functional import correctness_trust, skill_trust
from fedekd.methods import Client, FedeKD, Local
from fedekd.modules import GatedPrivateModule
from fedekd.modules.losses import GATES
from tests.federation.runs import assert_equal_weights, weights

from .conftest import Federate
from .test_methods import run_weights


def clients_of(run: Orchestrator) -> dict[int, Client]:
    engine: Any = run.engine
    clients: dict[int, Client] = engine.clients
    return clients


@pytest.mark.parametrize("task", ["classification", "regression"])
@pytest.mark.parametrize("cross_fit", [False, True])
def test_fedekd_trust_is_estimated_on_the_tuning_split(federate: Federate, task: str, cross_fit: bool) -> None:
    method = FedeKD(gate="correctness", cross_fit=cross_fit)
    run = federate(method, task)
    run.run()
    for client in clients_of(run).values():
        trust = method._held_out_trust(client)
        roles = ("proxy", "second_proxy") if cross_fit else ("proxy",)
        outputs = torch.cat([client.predict(role, "tuning").output for role in roles])
        targets = client.training_targets[client.splits.tuning].repeat(len(roles))
        mean = client.training_targets[client.splits.train].double().mean().item()
        edges, expected = (
            skill_trust(outputs, targets, mean) if task == "regression" else correctness_trust(outputs, targets)
        )
        assert len(client.splits.tuning)
        assert torch.equal(trust.edges, edges)
        assert torch.equal(trust.weights, expected.float())


def test_fedekd_trust_reads_no_other_split(federate: Federate, monkeypatch: pytest.MonkeyPatch) -> None:
    used: set[str] = set()
    predict, receive = Client.predict, FedeKD.receive
    inside: list[bool] = []

    def recording(client: Client, role: str, split: str, *args: Any, **options: Any) -> Any:
        if inside:
            used.add(split)
        return predict(client, role, split, *args, **options)

    def marked(*args: Any) -> Any:
        inside.append(True)
        try:
            return receive(*args)
        finally:
            inside.pop()

    monkeypatch.setattr(Client, "predict", recording)
    monkeypatch.setattr(FedeKD, "receive", marked)
    federate(FedeKD(gate="correctness")).run()
    assert used == {"train", "tuning"}
    assert FedeKD(gate="correctness").training_splits == ("train", "tuning")
    assert FedeKD().training_splits == ("train",)


def test_fedekd_trust_without_tuning_samples_is_one_half(federate: Federate, npz: Path) -> None:
    data = FederatedDataModule(str(npz), num_clients=3, alpha=5.0, batch_size=8, fractions=(0.8, 0.0, 0.2))
    run = federate(FedeKD(gate="correctness"), data=data, output=npz.parent / "run")
    run.run()
    import pandas as pd

    table = pd.read_csv(npz.parent / "run/metrics.csv")
    columns = [name for name in table.columns if name.endswith("gate/weight_mean")]
    assert columns
    assert (table[columns].iloc[-1] == 0.5).all()


@pytest.mark.parametrize("gate", [gate for gate, rule in GATES.items() if gate != "energy"])
def test_fedekd_every_gate_changes_the_private_models(gate: Any, federate: Federate) -> None:
    ours, published = run_weights(federate, FedeKD(gate=gate)), run_weights(federate, FedeKD())
    assert any(not torch.equal(ours[name], tensor) for name, tensor in published.items())


def test_fedekd_invalid_trust_options_raise_user_error(federate: Federate, npz: Path) -> None:
    with pytest.raises(UserError, match=r"method\.gate: expected one of energy, .* got 'correct'"):
        FedeKD(gate="correct")  # type: ignore[arg-type]
    data = FederatedDataModule(str(npz), num_clients=3, alpha=5.0, batch_size=8, transform="RandomHorizontalFlip")
    with pytest.raises(UserError, match=r"method\.cross_fit: expected false with augmented .*, got True") as error:
        federate(FedeKD(cross_fit=True), data=data).run()
    assert "\n" not in str(error.value)


# Cross-fitting


class Recording(FedeKD):
    """Records on which images each proxy is distilled, at all clients."""

    seen: dict[str, set[bytes]]

    def init_client(self, client: Client) -> None:
        super().init_client(client)
        for role in self._roles:
            client.networks[role].register_forward_pre_hook(
                lambda network, args, role=role: self.record(role, args[0]) if network.training else None
            )

    def record(self, role: str, x: Tensor) -> None:
        self.seen.setdefault(role, set()).update(row.numpy().tobytes() for row in x)


def test_fedekd_cross_fit_teacher_of_a_sample_never_saw_it(federate: Federate, monkeypatch: pytest.MonkeyPatch) -> None:
    method = Recording(cross_fit=True, proxy_epochs=1)
    method.seen = {}
    taught: list[tuple[bytes, str]] = []
    step = GatedPrivateModule.training_step
    run = federate(method, rounds=RoundOptions(rounds=3))

    def recording(module: GatedPrivateModule, batch: Any, batch_idx: int) -> Tensor:
        if module.teacher is not None:
            [client] = [client for client in clients_of(run).values() if client.networks["private"] is module.network]
            x, _, outputs = batch
            with torch.no_grad():
                distances = [
                    (client.networks[role].eval()(x) - outputs).abs().amax(1) for role in ("proxy", "second_proxy")
                ]
            # The two proxies differ: their outputs tell which one the teacher of a row is.
            is_first, is_second = (distance < 1e-5 for distance in distances)
            assert (is_first ^ is_second).all()
            taught.extend(
                (row.numpy().tobytes(), "proxy" if first else "second_proxy")
                for row, first in zip(x, is_first.tolist(), strict=True)
            )
        return step(module, batch, batch_idx)

    monkeypatch.setattr(GatedPrivateModule, "training_step", recording)
    run.run()
    first, second = method.seen["proxy"], method.seen["second_proxy"]
    assert not first & second
    assert {role for _, role in taught} == {"proxy", "second_proxy"}
    assert {image for image, _ in taught} == first | second
    for image, role in taught:
        assert image not in method.seen[role]


def test_fedekd_cross_fit_doubles_the_traffic_and_keeps_two_proxies(federate: Federate) -> None:
    plain, crossed = federate(FedeKD()).run(), (run := federate(FedeKD(cross_fit=True))).run()
    for direction in ("bytes_up", "bytes_down"):
        assert crossed[direction] == 2 * plain[direction]
    first, second = weights(run), weights(run, "second_proxy")
    proxy = weights(run, "proxy")
    assert len(second) == len(proxy)
    assert any(not torch.equal(second[name], tensor) for name, tensor in proxy.items())
    assert all(torch.equal(second[f"0/{name[2:]}"], tensor) for name, tensor in second.items())
    assert first


def stub(size: int, groups: Tensor | None = None, seed: int = 0, number: int = 0) -> Any:
    splits = SimpleNamespace(train=torch.arange(size))
    return SimpleNamespace(
        splits=splits, samples=SimpleNamespace(group=groups), spec=SimpleNamespace(seed=seed), number=number
    )


@pytest.mark.parametrize("size", [2, 3, 25, 100])
def test_fedekd_halves_are_a_fixed_random_partition(size: int) -> None:
    first, second = FedeKD._halves(stub(size)).values()
    assert sorted([*first.tolist(), *second.tolist()]) == list(range(size))
    assert abs(len(first) - len(second)) <= 1
    assert torch.equal(first, FedeKD._halves(stub(size))["proxy"])
    others = [FedeKD._halves(stub(size, seed=1)), FedeKD._halves(stub(size, number=1))]
    assert size < 25 or not any(torch.equal(first, other["proxy"]) for other in others)


def test_fedekd_halves_keep_groups_together() -> None:
    groups = torch.from_numpy(np.random.default_rng(0).integers(0, 12, 60))
    first, second = (set(groups[half].tolist()) for half in FedeKD._halves(stub(60, groups)).values())
    assert first
    assert second
    assert not first & second


@pytest.mark.parametrize("lonely", [stub(1), stub(7, torch.zeros(7, dtype=torch.int64))])
def test_fedekd_halves_of_a_single_sample_or_group_leave_the_second_empty(lonely: Any) -> None:
    halves = FedeKD._halves(lonely)
    assert len(halves["proxy"]) == len(lonely.splits.train)
    assert not len(halves["second_proxy"])


def test_fedekd_cross_fit_with_an_untrained_proxy_equals_local(
    federate: Federate, monkeypatch: pytest.MonkeyPatch
) -> None:
    def all_first(client: Client) -> dict[str, Tensor]:
        return {"proxy": torch.arange(len(client.splits.train)), "second_proxy": torch.arange(0)}

    monkeypatch.setattr(FedeKD, "_halves", staticmethod(all_first))
    assert_equal_weights(run_weights(federate, FedeKD(cross_fit=True)), run_weights(federate, Local()))


def test_fedekd_message_of_one_proxy_is_its_state() -> None:
    from fedekd.methods.fedekd import _message, _states

    state = {"second_proxy.weight": torch.ones(1), "b": torch.zeros(1)}
    assert _states(state, ("proxy",)) == {"proxy": state}
    both = {"proxy": {"a": torch.ones(1)}, "second_proxy": {"a": torch.zeros(1)}}
    assert _states(_message(both), ("proxy", "second_proxy")) == both
