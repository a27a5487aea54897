"""Captured steps on a CUDA device: the bits of eager steps, and those of a Lightning Trainer.

All three launch the same kernels, fused Adam's among them, and cuDNN is held to deterministic algorithms.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fedekd.federation import RoundOptions
from fedekd.methods import FedAvg, FedeKD
from fedekd.modules import SupervisedModule, TrainerFactory, lean_loop
from tests.federation.runs import assert_equal_weights, repeatable, weights
from tests.modules.test_lean_loop import (
    BATCH,
    CAPTURABLE,
    EPOCHS,
    SAMPLES,
    Synchronizing,
    adam,
    assert_equal,
    make,
    train,
)

from .conftest import REHEARSAL, Federate

pytestmark = pytest.mark.gpu


@pytest.fixture
def numerics(accelerator: Any) -> Iterator[None]:
    with TrainerFactory(accelerator=accelerator, threads=1).numerics():
        yield


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The graphs that were replayed, one entry per replay."""
    replayed: list[object] = []
    replay = torch.cuda.CUDAGraph.replay

    def count(graph: Any) -> None:
        replayed.append(graph)
        replay(graph)

    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", count)
    return replayed


@pytest.mark.usefixtures("numerics")
@pytest.mark.filterwarnings("error:.*without a CUDA graph")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("name", CAPTURABLE)
def test_captured_step_equals_eager_and_lightning(
    name: str, precision: str, accelerator: str, replays: list[object]
) -> None:
    results = {}
    for loop, capture in (("lean", True), ("lean", False), ("lightning", False)):
        results[loop, capture] = train(make(name), precision, accelerator=accelerator, loop=loop, capture=capture)
        assert len(replays) == 2 * (EPOCHS * (SAMPLES // BATCH) - 1)
    assert_equal(results["lean", True], results["lean", False])
    assert_equal(results["lean", False], results["lightning", False])


@pytest.mark.usefixtures("numerics")
def test_step_that_synchronizes_is_eager(accelerator: str, replays: list[object]) -> None:
    torch.manual_seed(0)
    module = SupervisedModule(Synchronizing(), optimizer=adam)
    module.carries_optimizer_state = True
    if REHEARSAL:
        with pytest.warns(UserWarning, match="without a CUDA graph"):
            train(module, accelerator=accelerator, loop="lean")
    else:
        train(module, accelerator=accelerator, loop="lean")
    assert not replays


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("method", [FedeKD, FedAvg])
def test_federation_of_captured_steps_equals_lightning(
    federate: Federate, accelerator: Any, method: Any, precision: Any, replays: list[object]
) -> None:
    lightning = TrainerFactory(accelerator=accelerator, precision=precision, threads=1, loop="lightning")
    captured, plain = federate(method(), precision), federate(method(), precision, trainer=lightning)
    summary = captured.run()
    assert replays
    assert repeatable(summary) == repeatable(plain.run())
    assert_equal_weights(weights(captured), weights(plain))


@pytest.mark.skipif(REHEARSAL, reason="no memory to measure")
def test_captures_of_many_phases_reuse_memory(federate: Federate) -> None:
    def reserved_after(rounds: int) -> int:
        federate(None, "bf16-mixed", rounds=RoundOptions(rounds=rounds)).run()
        gc.collect()
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved()

    reserved_after(1)
    assert reserved_after(6) <= reserved_after(2) + 2 * 2**20
    assert len(lean_loop._latest_graph) == 1
