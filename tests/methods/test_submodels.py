"""DepthFL and ScaleFL in the orchestrator: parts of the server's model, and their averages."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedekd.data import FederatedDataModule
from fedekd.errors import UserError
from fedekd.federation import MultiProcess, Orchestrator, RoundOptions, SilentObserver
from fedekd.functional import average_state_dicts
from fedekd.methods import (
    CAFEDistill,
    Client,
    ClientOptions,
    DepthFL,
    Ditto,
    FedAvg,
    FedDyn,
    FedPer,
    FedProx,
    FedRep,
    Local,
    Method,
    ScaleFL,
)
from fedekd.models import MultiExitNetwork, multi_exit
from tests.federation.runs import assert_equal_weights, weights

from .conftest import Federate, client_of, make_spec, one_round

DEPTHS = [1, 2, 3]


def cnn(width: float = 1.0) -> dict[str, Any]:
    return {"class_path": "fedekd.models.PrivateCNN", "init_args": {"width": width}}


def options(**values: Any) -> ClientOptions:
    adam = {"class_path": "torch.optim.Adam", "init_args": {"lr": 1e-3}}
    return replace(ClientOptions(local_epochs=1, private_model=cnn(0.25), optimizer=adam, exits=3), **values)


def copied(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in state.items()}


def started(run: Orchestrator) -> Orchestrator:
    run.method.init_server(run.spec)
    return run


def depth_of(name: str) -> int:
    """From `stages.1.0.weight` and `heads.1.norm.bias`: 2."""
    return int(name.split(".")[1]) + 1


@pytest.mark.slow
@pytest.mark.parametrize("depths", [None, 2])
@pytest.mark.parametrize("average", ["uniform", "samples"])
def test_depthfl_equal_depths_without_distillation_equals_fedavg(
    depths: int | None, average: Any, federate: Federate
) -> None:
    client = options(depths=depths)
    ours, fedavg = (federate(m(weights=average), client=client) for m in (lambda **a: DepthFL(0.0, **a), FedAvg))
    assert ours.run()["clients"] == fedavg.run()["clients"]
    assert ours.progress.bytes_up == fedavg.progress.bytes_up
    assert_equal_weights(weights(ours), weights(fedavg))


class Watched(DepthFL):
    """Records which tensors each client receives."""

    def __init__(self) -> None:
        super().__init__()
        self.received: dict[int, set[str]] = {}

    def receive(self, client: Client, received: Mapping[str, Tensor], round_idx: int) -> dict[str, float]:
        self.received.setdefault(client.number, set()).update(received)
        return super().receive(client, received, round_idx)


def normed(in_channels: int, image_size: Any, num_classes: int) -> MultiExitNetwork:
    """Three stages with one BatchNorm each."""
    stages = [
        nn.Sequential(nn.Conv2d(width, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()) for width in (in_channels, 4, 4)
    ]
    stages[-1].extend([nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes)])
    return multi_exit(nn.Sequential(*stages), num_classes, split=stages)


def test_depthfl_counters_of_a_part_are_compared_among_its_holders(federate: Federate, npz: Path) -> None:
    data = FederatedDataModule(str(npz), num_clients=6, alpha=10.0, batch_size=8)
    client = options(private_model={"class_path": f"{__name__}.normed"}, depths=DEPTHS * 2)
    warnings: list[str] = []
    observer = SilentObserver()
    observer.warn = warnings.append  # type: ignore[method-assign]
    run = federate(DepthFL(), data=data, client=client, observer=observer, rounds=RoundOptions(rounds=1))
    run.run()
    assert [text for text in warnings if not text.startswith("scores of")] == []
    assert [row["comm/updates"] for row in run.progress.history] == [6]


def test_depthfl_clients_exchange_only_their_stages(federate: Federate) -> None:
    method = Watched()
    run = federate(method, client=options(depths=DEPTHS))
    summary = run.run()
    whole = run.spec.build_model("private", "server").state_dict()
    size = {
        depth: sum(t.numel() * t.element_size() for name, t in whole.items() if depth_of(name) <= depth)
        for depth in DEPTHS
    }
    assert size[1] < size[2] < size[3]
    rows = run.progress.history
    assert [row["comm/bytes_up"] for row in rows] == [sum(size.values())] * 2
    assert [row["comm/bytes_down"] for row in rows] == [2 * sum(size.values()), sum(size.values())]
    assert summary["bytes_up"] == 2 * sum(size.values())
    for number, depth in enumerate(DEPTHS):
        client = client_of(run, number)
        assert client.networks["private"].num_exits == len(client.evaluate()[0]) == depth
        assert method.received[number] == {name for name in whole if depth_of(name) <= depth}
        held = client.networks["private"].state_dict()
        assert_equal_weights(held, {name: run.method.server_state["model"][name] for name in held})
    assert {name for name in rows[-1] if name.startswith("client_1/exit")} == {
        *("client_1/exit_1/accuracy", "client_1/exit_2/accuracy"),
    }
    assert [line["exit"] for line in summary["exits"]] == DEPTHS


def test_depthfl_aggregate_averages_stage_over_its_holders(federate: Federate) -> None:
    run = started(federate(DepthFL(weights="samples"), client=options(depths=DEPTHS)))
    updates = one_round(run, [0, 1, 2], 0)
    assert len({update.num_samples for update in updates}) > 1
    for name, tensor in run.method.server_state["model"].items():
        holders = [update for update in updates if name in update.state]
        assert [update.client for update in holders] == [n for n in range(3) if depth_of(name) <= DEPTHS[n]]
        shares = [update.num_samples for update in holders]
        wanted = sum(share * update.state[name].double() for share, update in zip(shares, holders, strict=True)) / sum(
            shares
        )
        torch.testing.assert_close(tensor.double(), wanted, rtol=1e-7, atol=1e-9)
    deepest = {name: t for name, t in updates[2].state.items() if depth_of(name) == 3}
    assert_equal_weights(deepest, {name: run.method.server_state["model"][name] for name in deepest})


def test_depthfl_aggregate_keeps_stages_without_holder(federate: Federate) -> None:
    run = started(federate(DepthFL(), client=options(depths=DEPTHS)))
    before = copied(run.method.server_state["model"])
    one_round(run, [0, 1], 0)
    moved = {name for name, t in run.method.server_state["model"].items() if not torch.equal(t, before[name])}
    assert {depth_of(name) for name in moved} == {1, 2}


def test_local_baseline_has_depth_of_each_client(federate: Federate) -> None:
    ours, local = (federate(method, client=options(depths=DEPTHS)) for method in (DepthFL(), Local()))
    ours.run()
    scores = [client["score"] for client in local.run()["clients"]]
    assert [ours.progress.local[number][-1] for number in range(3)] == scores
    assert [client_of(local, number).networks["private"].num_exits for number in range(3)] == DEPTHS


def widths(*values: float) -> list[dict[str, Any]]:
    return [cnn(width) for width in values]


@pytest.mark.parametrize("depths", [None, [3, 2, 1]])
def test_scalefl_narrow_client_holds_leading_channels(depths: list[int] | None, federate: Federate) -> None:
    client = options(private_model=widths(0.5, 0.25, 0.125), depths=depths)
    run = started(federate(ScaleFL(warm_up=0.0), client=client))
    whole = copied(run.method.server_state["model"])
    broadcast = run.method.broadcast([0, 1, 2], 0)
    for number, channels in enumerate((32, 16, 8)):
        sent = broadcast.to(number)
        assert sent["stages.0.0.weight"].shape == (channels, 1, 3, 3)
        for name, tensor in sent.items():
            assert torch.equal(tensor, whole[name][tuple(slice(size) for size in tensor.shape)]), name
    updates = one_round(run, [0, 1, 2], 0)
    after = run.method.server_state["model"]["heads.0.linear.weight"]
    sent_weights = [update.state["heads.0.linear.weight"] for update in updates]
    assert [tensor.shape[1] for tensor in sent_weights] == [32, 16, 8]
    for column in range(32):
        states = [{"w": tensor[:, column]} for tensor in sent_weights if tensor.shape[1] > column]
        torch.testing.assert_close(after[:, column], average_state_dicts(states)["w"], rtol=0, atol=1e-7)
    sizes = [sum(t.numel() * t.element_size() for t in broadcast.to(number).values()) for number in range(3)]
    run = federate(ScaleFL(warm_up=0.0), client=client)
    assert run.run()["bytes_up"] == 2 * sum(sizes)


@pytest.mark.parametrize(
    "models",
    [
        widths(0.25, 0.5, 0.25),
        [{"class_path": "fedekd.models.ProxyCNN"}, *widths(1.0, 1.0)],
        [cnn(), {"class_path": "torchvision.models.resnet18"}, cnn()],
    ],
    ids=["wider", "another class", "other layers"],
)
def test_scalefl_model_outside_first_model_raises_user_error(models: Any, federate: Federate) -> None:
    run = federate(ScaleFL(), client=options(private_model=models, exits=2))
    with pytest.raises(
        UserError, match=r"^client\.private_models: expected submodels .* client 1 .* widest model first$"
    ):
        run.run()
    assert not run.progress.local


@pytest.mark.parametrize("method", [DepthFL, ScaleFL])
def test_submodel_method_invalid_specification_raises_user_error(method: Callable[[], Method]) -> None:
    with pytest.raises(UserError, match=rf"task: expected classification for method {method.__name__}"):
        method().init_server(make_spec(task="regression", num_outputs=1, client=options()))
    with pytest.raises(UserError, match=rf"client\.exits: expected at least 2 for method {method.__name__}"):
        method().init_server(make_spec())


@pytest.mark.parametrize("method", [FedAvg, FedPer, FedRep, FedProx, FedDyn, Ditto, CAFEDistill])
def test_method_that_averages_models_different_depths_raise_user_error(method: Callable[[], Method]) -> None:
    with pytest.raises(UserError, match=rf"client\.depths: expected one value .* method {method.__name__} averages"):
        method().init_server(make_spec(client=options(depths=DEPTHS), num_clients=3))


def test_cafedistill_depths_raise_user_error() -> None:
    with pytest.raises(UserError, match=r"client\.depths: expected null for method CAFEDistill"):
        CAFEDistill().init_server(make_spec(client=options(depths=2)))


@pytest.mark.parametrize("method", [FedAvg, DepthFL])
def test_depths_beyond_number_of_clients_are_ignored(method: Callable[[], Method], federate: Federate) -> None:
    """Three clients and four depths: round-robin assignment never uses the fourth."""
    run = federate(method(), client=options(depths=[1, 1, 1, 3]), rounds=RoundOptions(rounds=1))
    assert len(run.run()["clients"]) == 3


def test_depths_invalid_for_network_raise_user_error_before_training(federate: Federate) -> None:
    with pytest.raises(UserError, match=r"client\.depths \[1, 2, 4\]: depth: expected 1 to 3, got 4"):
        federate(DepthFL(), client=options(depths=[1, 2, 4]))
    with pytest.raises(UserError, match=r"client\.depths: expected null without exits, got 2. Set --client\.exits"):
        federate(FedAvg(), client=options(depths=2, exits=None))


@pytest.mark.slow
def test_scalefl_multiprocess_equals_sequential(federate: Federate) -> None:
    client = options(private_model=widths(0.5, 0.25, 0.125), depths=[3, 2, 1])
    one, two = (federate(ScaleFL(warm_up=0.0), client=client, engine=engine) for engine in (None, MultiProcess(1)))
    ours, theirs = one.run(), two.run()
    for name in ("clients", "exits", "budgets", "bytes_up", "bytes_down"):
        assert ours[name] == theirs[name]
    assert_equal_weights(one.method.server_state["model"], two.method.server_state["model"])
