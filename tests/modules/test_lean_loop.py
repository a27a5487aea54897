"""The lean loop gives Lightning's bits, and a captured step those of an eager one."""

from __future__ import annotations

import copy
import gc
import warnings
from collections.abc import Callable, Iterator
from typing import Any
from weakref import ref

import pytest
import torch
from torch import Tensor, nn

from fedekd.data import TensorBatches
from fedekd.errors import UserError
from fedekd.models import MultiExitNetwork, PrivateCNN, ProxyCNN, multi_exit
from fedekd.modules import (
    GatedPrivateModule,
    HeldOutTrust,
    MultiExitModule,
    ObjectiveModule,
    ProxyDistillModule,
    SupervisedModule,
    TrainerFactory,
    lean_loop,
    trainer_factory,
)
from fedekd.modules.mutual import MutualModule
from fedekd.modules.schedule import Schedule

from .recorded_graph import RecordedGraph

EPOCHS, SAMPLES, BATCH = 3, 70, 16  # the last batch of an epoch holds 6


class Normalized(nn.Module):
    """Has BatchNorm and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)
        self.dropout, self.head = nn.Dropout(0.5), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(self.convolution(x)).relu().mean((2, 3))
        return self.head(self.dropout(hidden))


class Synchronizing(Normalized):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1.0 if x.sum().item() else 0.0)


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=1e-2, fused=True)


def unfused(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=1e-2)


def two_exits() -> MultiExitNetwork:
    return multi_exit(PrivateCNN(1, 8, 4), 4, 2)


def held_out_trust() -> HeldOutTrust:
    generator = torch.Generator().manual_seed(2)
    logits, labels = torch.randn(60, 4, generator=generator), torch.randint(0, 4, (60,), generator=generator)
    return HeldOutTrust("classification", 0.1 * logits, labels)


MODULES: dict[str, Callable[[Any], ObjectiveModule]] = {
    "supervised": lambda optimizer: SupervisedModule(Normalized(), optimizer=optimizer),
    "distillation": lambda optimizer: ProxyDistillModule(ProxyCNN(1, 8, 4), PrivateCNN(1, 8, 4), optimizer=optimizer),
    "gated": lambda optimizer: GatedPrivateModule(Normalized(), ProxyCNN(1, 8, 4), optimizer=optimizer),
    "shuffled": lambda optimizer: GatedPrivateModule(
        Normalized(), ProxyCNN(1, 8, 4), optimizer=optimizer, gate="shuffled"
    ),
    "reversed": lambda optimizer: GatedPrivateModule(
        Normalized(), ProxyCNN(1, 8, 4), optimizer=optimizer, gate="reversed"
    ),
    "correctness": lambda optimizer: GatedPrivateModule(
        Normalized(), ProxyCNN(1, 8, 4), optimizer=optimizer, gate="correctness_shuffled", trust=held_out_trust()
    ),
    "multi-exit": lambda optimizer: MultiExitModule(two_exits(), optimizer=optimizer, warmup_epochs=4),
    "mutual": lambda optimizer: MutualModule(Normalized(), ProxyCNN(1, 8, 4), optimizer=optimizer),
}
CAPTURABLE = ("supervised", "distillation", "gated", "shuffled", "reversed", "correctness")


def make(name: str, optimizer: Any = adam) -> ObjectiveModule:
    torch.manual_seed(0)
    module = MODULES[name](optimizer)
    module.carries_optimizer_state = True
    return module


def train(
    module: ObjectiveModule,
    precision: Any = "32-true",
    samples: int = SAMPLES,
    accelerator: Any = "cpu",
    **options: Any,
) -> dict[str, Any]:
    """Train two phases, the second from the optimizer state of the first; returns all that is left of them."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (SAMPLES, 1, 8, 8), dtype=torch.uint8, generator=generator)
    targets = torch.randint(0, 4, (SAMPLES,), generator=generator)
    trainer = TrainerFactory(accelerator=accelerator, precision=precision, threads=1, **options)
    images, targets = images.to(trainer.torch_device), targets.to(trainer.torch_device)
    results: dict[str, Any] = {"means": []}
    for phase in range(2):

        def begin_epoch(epoch: int, phase: int = phase) -> torch.Generator:
            torch.manual_seed(10 * phase + epoch)
            return torch.Generator().manual_seed(10 * phase + epoch)

        indices = torch.arange(samples)
        trainer.fit(module, TensorBatches(images, targets, indices, BATCH, generator=begin_epoch), EPOCHS)
        results["means"].append(module.epoch_means)
    assert module.optimizer_state is not None
    results["optimizer"] = copy.deepcopy(module.optimizer_state)
    results["weights"] = copy.deepcopy(module.state_dict())
    results["generator"] = torch.get_rng_state()
    return results


def assert_equal(ours: Any, theirs: Any) -> None:
    """Equal to the last bit, at any depth."""
    assert type(ours) is type(theirs)
    if isinstance(ours, dict):
        assert list(ours) == list(theirs)
        for key in ours:
            assert_equal(ours[key], theirs[key])
    elif isinstance(ours, list | tuple):
        assert len(ours) == len(theirs)
        for mine, other in zip(ours, theirs, strict=True):
            assert_equal(mine, other)
    elif isinstance(ours, Tensor):
        assert torch.equal(ours, theirs)
    else:
        assert ours == theirs


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "64-true"])
def test_lean_loop_equals_lightning(name: str, precision: str) -> None:
    lightning = train(make(name), precision, loop="lightning")
    assert_equal(train(make(name), precision, loop="lean"), lightning)
    assert lightning["means"][0] != lightning["means"][1]


#: Options that change the gradients; the last group of an epoch of 5 batches has 1 batch of 2, or 2 batches of 3.
GRADIENTS: dict[str, dict[str, Any]] = {
    "norm": {"gradient_clip_val": 0.05},
    "value": {"gradient_clip_val": 1e-3, "gradient_clip_algorithm": "value"},
    "two batches": {"accumulate_grad_batches": 2},
    "three batches, norm": {"accumulate_grad_batches": 3, "gradient_clip_val": 0.05},
    "more batches than there are": {"accumulate_grad_batches": 9},
}


@pytest.mark.parametrize("options", GRADIENTS.values(), ids=GRADIENTS)
@pytest.mark.parametrize(
    ("name", "precision"),
    [
        *((name, "32-true") for name in ("supervised", "gated", "multi-exit", "mutual")),
        *(("supervised", precision) for precision in ("bf16-mixed", "64-true")),
    ],
)
def test_lean_loop_with_clipping_and_accumulation_equals_lightning(
    name: str, precision: str, options: dict[str, Any]
) -> None:
    lightning = train(make(name, unfused), precision, loop="lightning", **options)
    assert_equal(train(make(name, unfused), precision, loop="lean", **options), lightning)
    assert lightning["means"] != train(make(name, unfused), precision, loop="lean")["means"]


@pytest.mark.parametrize("interval", ["epoch", "step"])
@pytest.mark.parametrize("options", [{}, GRADIENTS["two batches"]], ids=["plain", "accumulated"])
def test_lean_loop_with_schedule_equals_lightning(interval: Any, options: dict[str, Any]) -> None:
    def module() -> tuple[ObjectiveModule, Schedule]:
        module = make("supervised")
        module.schedule = Schedule(lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5), interval)
        module.lr_factor = 0.25
        return module, module.schedule

    results, states = [], []
    for loop in ("lightning", "lean"):
        trained, schedule = module()
        results.append(train(trained, loop=loop, **options))
        states.append(schedule.state_dict())
    assert_equal(results[1], results[0])
    assert_equal(states[1], states[0])
    steps = -(-5 // options.get("accumulate_grad_batches", 1)) if interval == "step" else 1
    assert states[0] is not None
    assert states[0]["scheduler"]["last_epoch"] == EPOCHS * steps  # of one phase: nothing is carried here


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(("algorithm", "value"), [("norm", 1e-3), ("value", 1e-4)])
def test_steps_of_sgd_are_those_of_clipped_mean_gradients(algorithm: Any, value: float, accumulate: int) -> None:
    """A literal loop in float64."""
    torch.manual_seed(0)
    images = torch.randint(0, 256, (40, 1, 8, 8), dtype=torch.uint8)
    targets = torch.randint(0, 4, (40,))
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 4)).double()
    literal = copy.deepcopy(network)
    weight, bias = literal[1].weight, literal[1].bias
    batches = list(TensorBatches(images, targets, torch.arange(40), 16))
    for start in range(0, len(batches), accumulate):
        total = [torch.zeros_like(weight), torch.zeros_like(bias)]
        for x, y in batches[start : start + accumulate]:
            loss = nn.functional.cross_entropy(x.double().flatten(1) @ weight.T + bias, y) / accumulate
            total = [sum_ + part for sum_, part in zip(total, torch.autograd.grad(loss, (weight, bias)), strict=True)]
        norm = torch.sqrt(sum(part.square().sum() for part in total))
        assert norm > value
        for parameter, part in zip((weight, bias), total, strict=True):
            clipped = part * value / (norm + 1e-6) if algorithm == "norm" else part.clamp(-value, value)
            parameter.data -= 0.5 * clipped
    module = SupervisedModule(network, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.5))
    options = {"gradient_clip_val": value, "gradient_clip_algorithm": algorithm, "accumulate_grad_batches": accumulate}
    trainer = TrainerFactory(accelerator="cpu", precision="64-true", threads=1, **options)
    trainer.fit(module, TensorBatches(images, targets, torch.arange(40), 16), 1)
    torch.testing.assert_close(network[1].weight, weight, rtol=0, atol=1e-14)
    torch.testing.assert_close(network[1].bias, bias, rtol=0, atol=1e-14)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[RecordedGraph]:
    """The graphs that were made, of a device that has them."""
    monkeypatch.setattr(lean_loop, "supports_graphs", lambda device: True)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", RecordedGraph)
    monkeypatch.setattr(lean_loop, "_latest_graph", {})
    monkeypatch.setattr(RecordedGraph, "made", [])
    return RecordedGraph.made


@pytest.mark.parametrize("name", CAPTURABLE)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_captured_step_equals_eager(name: str, precision: str, graphs: list[RecordedGraph]) -> None:
    eager = train(make(name), precision, loop="lean", capture=False)
    assert not graphs
    assert_equal(train(make(name), precision, loop="lean"), eager)
    assert [graph.replays for graph in graphs] == [EPOCHS * (SAMPLES // BATCH) - 1] * 2
    assert [graph.pools for graph in graphs] == [None, graphs[0].pool()]


def test_captured_step_with_sgd_equals_eager(graphs: list[RecordedGraph]) -> None:
    def sgd(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=1e-2, momentum=0.9)

    eager = train(make("gated", sgd), loop="lean", capture=False)
    assert_equal(train(make("gated", sgd), loop="lean"), eager)
    assert len(graphs) == 2


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_captured_step_with_clipping_equals_eager(algorithm: Any, graphs: list[RecordedGraph]) -> None:
    clipping = {"gradient_clip_val": 1e-3, "gradient_clip_algorithm": algorithm}
    eager = train(make("gated"), loop="lean", capture=False, **clipping)
    assert_equal(train(make("gated"), loop="lean", **clipping), eager)
    assert len(graphs) == 2


def test_step_with_schedule_or_accumulation_is_eager(graphs: list[RecordedGraph]) -> None:
    module = make("supervised")
    module.schedule = Schedule(lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5))
    train(module, loop="lean")
    train(make("supervised"), loop="lean", accumulate_grad_batches=2)
    assert not graphs


@pytest.mark.parametrize("case", ["multi-exit", "mutual", "optimizer", "short", "full batches only"])
def test_step_is_eager_where_it_cannot_be_captured(case: str, graphs: list[RecordedGraph]) -> None:
    optimizer = torch.optim.Adagrad if case == "optimizer" else adam
    module = make(case if case in MODULES else "supervised", optimizer)
    train(module, samples={"short": 2 * BATCH, "full batches only": BATCH - 1}.get(case, SAMPLES), loop="lean")
    assert not graphs


def test_step_that_synchronizes_is_eager(graphs: list[RecordedGraph]) -> None:
    def module() -> ObjectiveModule:
        torch.manual_seed(0)
        module = SupervisedModule(Synchronizing(), optimizer=adam)
        module.carries_optimizer_state = True
        return module

    eager = train(module(), loop="lean", capture=False)
    with pytest.warns(UserWarning, match="without a CUDA graph.*operation not permitted when stream is capturing$"):
        captured = train(module(), loop="lean")
    assert_equal(captured, eager)
    assert all(not graph.replays for graph in graphs)


def test_synchronizations_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[Any] = []
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def step() -> list[str]:
        with lean_loop.synchronizations(torch.device("cuda")) as found:
            warnings.warn("called a synchronizing CUDA operation (Triggered internally)", stacklevel=1)
            warnings.warn("Synchronization debug mode is a prototype feature", stacklevel=1)
            warnings.warn("another", stacklevel=1)
        return found

    with pytest.warns(UserWarning, match="another") as caught:
        found = step()
    assert len(found) == len(caught) == 1
    assert modes == ["warn", 0]


def test_capturable_optimizer_keeps_its_steps_on_the_device() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.Adam([parameter])
    parameter.grad = torch.ones(2)
    optimizer.step()
    assert lean_loop.make_capturable(optimizer)
    assert optimizer.param_groups[0]["capturable"]
    assert not lean_loop.make_capturable(torch.optim.Adagrad([parameter]))
    assert lean_loop.make_capturable(torch.optim.SGD([parameter], lr=1.0))


def test_module_with_another_hook_is_trained_by_lightning() -> None:
    class Hooked(SupervisedModule):
        batches = 0

        def on_train_batch_end(self, *args: Any) -> None:
            self.batches += 1

    module = Hooked(Normalized(), optimizer=adam)
    module.carries_optimizer_state = True
    train(module, loop="lean")
    assert module.batches == 2 * EPOCHS * -(-SAMPLES // BATCH)


@pytest.mark.parametrize(("loop", "expected"), [("auto", "lean"), ("lean", "lean"), ("lightning", "lightning")])
def test_loop_of_a_cpu(loop: Any, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[str] = []
    fit, build = lean_loop.LeanLoop.fit, TrainerFactory.build
    monkeypatch.setattr(lean_loop.LeanLoop, "fit", lambda *args: (used.append("lean"), fit(*args)))
    monkeypatch.setattr(TrainerFactory, "build", lambda *args: (used.append("lightning"), build(*args))[1])
    train(make("supervised"), loop=loop)
    assert used == [expected] * 2


@pytest.fixture
def no_collector() -> Iterator[None]:
    """Disable the collector of reference cycles."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("name", MODULES)
def test_lean_loop_leaves_no_reference_cycle(name: str, no_collector: None) -> None:
    module = make(name)
    train(module)
    left = ref(module)
    del module
    assert left() is None


def test_collect_trainers_frees_those_of_lightning(no_collector: None) -> None:
    train(make("supervised"), loop="lightning")
    assert trainer_factory._TRAINERS
    trainer_factory.collect_trainers()
    assert not trainer_factory._TRAINERS


def test_unknown_loop_is_a_mistake() -> None:
    with pytest.raises(UserError, match=r"trainer\.loop"):
        TrainerFactory(loop="fast")  # type: ignore[arg-type]
