"""Federations on a CUDA device: repeatable to the last bit, in every precision, and without a leak."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch

from fedekd.data import FederatedDataModule
from fedekd.federation import MultiProcess, RoundOptions
from fedekd.federation.checkpoint import CheckpointStore
from fedekd.methods import ClientOptions, FedeKD, Local
from fedekd.modules import TrainerFactory
from tests.federation.runs import BackwardsEngine, StopAfter, StoppedError, assert_equal_weights, repeatable, weights
from tests.methods.test_methods import METHODS, small_client

from .conftest import Federate

pytestmark = pytest.mark.gpu

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")


@pytest.mark.parametrize("precision", PRECISIONS)
def test_fedekd_lambda_zero_equals_local(federate: Federate, precision: str) -> None:
    local, federated = federate(Local(), precision), federate(FedeKD(lambda_kd=0), precision)
    local.run()
    summary = federated.run()
    assert_equal_weights(weights(local), weights(federated))
    assert summary["delta"]["avg"] == summary["delta"]["worst"] == 0.0


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("gate", ["energy", "shuffled", "correctness"])
def test_resume_after_stop_gives_same_bits(federate: Federate, tmp_path: Path, precision: str, gate: Any) -> None:
    whole = federate(FedeKD(gate=gate), precision)
    expected = whole.run()
    with pytest.raises(StoppedError):
        federate(FedeKD(gate=gate), precision, output=tmp_path, observer=StopAfter(phases=13)).run()
    again = federate(FedeKD(gate=gate), precision, output=tmp_path)
    assert repeatable(again.run()) == repeatable(expected)
    for role in ("private", "proxy"):
        assert_equal_weights(weights(whole, role), weights(again, role))


@pytest.mark.parametrize("name", ["fedekd", "feddyn", "fedtype", "cafedistill", "safekd", "fml", "depthfl"])
def test_method_resume_gives_same_bits(federate: Federate, tmp_path: Path, name: str) -> None:
    """Each keeps other state: on the server, on the client, in the optimizer, in a second network."""
    parts = {"precision": "bf16-mixed", "client": small_client(name)}
    whole = federate(METHODS[name](), **parts)
    expected = whole.run()
    with pytest.raises(StoppedError):
        federate(METHODS[name](), **parts, output=tmp_path, observer=StopAfter(phases=12)).run()
    again = federate(METHODS[name](), **parts, output=tmp_path)
    assert repeatable(again.run()) == repeatable(expected)
    assert_equal_weights(weights(whole), weights(again))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_clients_in_reverse_order_give_same_bits(federate: Federate, precision: str) -> None:
    forwards, backwards = federate(None, precision), federate(None, precision, engine=BackwardsEngine)
    assert repeatable(forwards.run()) == repeatable(backwards.run())
    assert_equal_weights(weights(forwards), weights(backwards))


def test_side_by_side_gives_same_numbers(federate: Federate, tmp_path: Path) -> None:
    one, two = federate(output=tmp_path / "one"), federate(output=tmp_path / "two", engine=MultiProcess(2))
    assert repeatable(one.run()) == repeatable(two.run())
    digests = [CheckpointStore(tmp_path / run / "checkpoints").digests() for run in ("one", "two")]
    assert digests[0] == digests[1]


def test_float64_weights_equal_those_of_cpu(federate: Federate) -> None:
    """A larger difference is another computation: images differ by 1e-7, as a GPU scales them by the reciprocal.

    With Adam a gradient near 0 multiplies that difference; SGD's steps are proportional to the gradient.
    """
    sgd = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.05, "momentum": 0.9}}
    client = ClientOptions(local_epochs=1, private_model={"class_path": "fedekd.models.PrivateCNN"}, optimizer=sgd)
    here = federate(None, "64-true", client=client)
    cpu = federate(client=client, trainer=TrainerFactory(accelerator="cpu", precision="64-true", threads=1))
    here.run()
    cpu.run()
    expected = weights(cpu)
    differences = {name: (tensor.cpu() - expected[name]).abs().max().item() for name, tensor in weights(here).items()}
    assert max(differences.values()) < 1e-6, differences


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", METHODS)
def test_method_runs_one_round(federate: Federate, name: str, precision: str) -> None:
    run = federate(METHODS[name](), precision, client=small_client(name), rounds=RoundOptions(rounds=1))
    summary = run.run()
    assert all(torch.isfinite(tensor).all() for tensor in weights(run).values())
    assert 0.0 <= summary["mean"] <= 1.0
    assert {tensor.device.type for tensor in weights(run).values()} == {run.spec.trainer.torch_device.type}


def test_regression_runs_in_bf16(federate: Federate, npz: Path) -> None:
    data = FederatedDataModule(str(npz), num_clients=3, alpha=5.0, batch_size=8, task="regression")
    run = federate(None, "bf16-mixed", data=data)
    assert run.run()["metric"] == "rmse"
    assert all(torch.isfinite(tensor).all() for tensor in weights(run).values())


def test_run_returns_device_memory(federate: Federate) -> None:
    def allocated_after_run() -> int:
        federate(None, "bf16-mixed").run()
        gc.collect()
        return torch.cuda.memory_allocated()

    allocated_after_run()  # libraries allocate their workspaces in the first run and keep them
    before = torch.cuda.memory_allocated()
    assert allocated_after_run() <= before


def test_rounds_do_not_accumulate_device_memory(federate: Federate) -> None:
    def peak(rounds: int) -> int:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        federate(None, "bf16-mixed", rounds=RoundOptions(rounds=rounds)).run()
        return torch.cuda.max_memory_allocated()

    peak(1)
    assert peak(5) <= 1.05 * peak(2)
