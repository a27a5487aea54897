"""Callbacks of phases: new objects for each phase, and clear errors before training."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn

from fedekd.data import TensorBatches
from fedekd.errors import UserError
from fedekd.modules import SupervisedModule, TrainerFactory, trainer_factory
from fedekd.modules.phase_callbacks import build_callbacks

HERE = "tests.modules.test_phase_callbacks"


class Counter(Callback):
    made: ClassVar[list[Counter]] = []

    def __init__(self, scale: float = 1.0) -> None:
        self.scale, self.hooks = scale, list[str]()
        Counter.made.append(self)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.hooks.append("step")
        for parameter in pl_module.network.parameters():
            parameter.grad *= self.scale

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.hooks.append(f"epoch {trainer.current_epoch}")

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        self.hooks.append(f"end {sorted(pl_module.epoch_means)}")


class Stopper(Callback):
    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        trainer.should_stop = True


class EarlyStopper(Callback):
    def on_train_batch_end(self, trainer: Any, pl_module: Any, *arguments: Any) -> None:
        trainer.should_stop = True


class Stateful(Callback):
    def state_dict(self) -> dict[str, Any]:
        return {"count": 0}


class NoCallback:
    pass


class Broken(Callback):
    def __init__(self) -> None:
        raise KeyError("no such key")


def fit(epochs: int = 2, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    images, targets = torch.randint(0, 256, (24, 1, 8, 8), dtype=torch.uint8), torch.arange(24) % 4
    module = SupervisedModule(network, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1.0))
    trainer = TrainerFactory(accelerator="cpu", threads=1, **{"precision": "32-true", **options})
    trainer.fit(module, TensorBatches(images, targets, torch.arange(24), 16), epochs)
    return network


def test_each_phase_has_new_callbacks_that_see_its_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Counter, "made", [])
    spec = [{"class_path": f"{HERE}.Counter", "init_args": {"scale": 0.5}}, f"{HERE}.Counter"]
    halved, plain = fit(callbacks=spec), fit(callbacks=f"{HERE}.Counter")
    expected = ["step", "step", "epoch 0", "step", "step", "epoch 1", "end ['loss', 'loss/supervised']"]
    assert [counter.hooks for counter in Counter.made] == [expected] * 3
    assert len({id(counter) for counter in Counter.made}) == 3
    assert [counter.scale for counter in Counter.made] == [0.5, 1.0, 1.0]
    weights = [network[1].weight for network in (halved, plain, fit())]
    assert torch.equal(weights[1], weights[2])
    assert not torch.equal(weights[0], weights[2])


def test_callback_that_ends_a_phase_early_raises() -> None:
    words = r"trainer\.callbacks: .* keep the {} epochs of 2 batches of a phase, got '[0-9] epochs and {} batches'"
    with pytest.raises(UserError, match=words.format(3, 2)):
        fit(3, callbacks=f"{HERE}.Stopper")
    fit(1, callbacks=f"{HERE}.Stopper")
    with pytest.raises(UserError, match=words.format(1, 1)):
        fit(1, callbacks=f"{HERE}.EarlyStopper")
    fit(2, callbacks={"class_path": "StochasticWeightAveraging", "init_args": {"swa_lrs": 0.1}})


@pytest.mark.parametrize(
    ("callbacks", "words"),
    [
        (f"{HERE}.NoCallback", r"expected a subclass of lightning.pytorch.Callback, got .*NoCallback"),
        (f"{HERE}.Broken", r"expected arguments of .*Broken, got {}, which failed with KeyError: 'no such key'"),
        ({"class_path": f"{HERE}.Counter", "init_args": {"size": 1}}, "unexpected keyword argument 'size'"),
        ([f"{HERE}.Missing"], "expected a class of .*, got 'Missing'"),
        ("no.such.Module", "expected a class that can be imported"),
        ([{"name": "x"}], "expected class_path and optionally init_args"),
        ([3], "expected class_path and optionally init_args, got 3"),
        (
            [f"{HERE}.Stateful", f"{HERE}.Stateful"],
            "expected callbacks that a Trainer accepts, .*more than one stateful",
        ),
        ("ModelCheckpoint", "got ModelCheckpoint. A run saves checkpoints"),
        ({"class_path": "OnExceptionCheckpoint", "init_args": {"dirpath": "."}}, "A run saves checkpoints"),
        ({"class_path": "EarlyStopping", "init_args": {"monitor": "val/loss"}}, "no validation batches"),
        ("Timer", "All phases have the same number of epochs"),
        ("LearningRateMonitor", "A phase has no logger"),
        ("DeviceStatsMonitor", "A phase has no logger"),
        ("TQDMProgressBar", "A run has a progress bar"),
        ("RichModelSummary", "would print a table in every phase"),
        ("SpikeDetection", "ends the run"),
        ("LearningRateFinder", "Set --client.optimizer.lr"),
        ("BatchSizeFinder", "Set --data.batch_size"),
    ],
)
def test_invalid_callback_raises_one_line_before_training(callbacks: Any, words: str) -> None:
    with pytest.raises(UserError, match=rf"^trainer\.callbacks: .*{words}") as error:
        TrainerFactory(accelerator="cpu", threads=1, callbacks=callbacks).resolve()
    assert "\n" not in str(error.value)


def test_callbacks_need_the_loop_of_lightning() -> None:
    with pytest.raises(UserError, match=r"trainer\.loop: expected auto or lightning with --trainer\.callbacks"):
        TrainerFactory(loop="lean", callbacks="LambdaCallback")
    assert not TrainerFactory(accelerator="cuda", callbacks="LambdaCallback").prefers_lean_loop
    assert TrainerFactory(accelerator="cuda").prefers_lean_loop
    assert build_callbacks(None) == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"gradient_clip_val": 0.0}, r"gradient_clip_val: expected a finite number above 0, or null, got 0\.0"),
        ({"gradient_clip_val": float("inf")}, "gradient_clip_val"),
        ({"gradient_clip_algorithm": "max"}, "gradient_clip_algorithm: expected one of norm, value"),
        ({"accumulate_grad_batches": 0}, "accumulate_grad_batches: expected at least 1, got 0"),
    ],
)
def test_invalid_gradient_option_raises(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=rf"trainer\.{words}"):
        TrainerFactory(**options)


@pytest.mark.parametrize("fused", [False, True])
def test_gradients_of_float16_are_unscaled_before_they_are_clipped(
    fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU with the plugin of CUDA: a step of SGD has the length of the clipped gradient."""

    def on_cpu(**arguments: Any) -> Trainer:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        return Trainer(**{**arguments, "precision": None}, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])

    monkeypatch.setattr(trainer_factory, "Trainer", on_cpu)
    monkeypatch.setattr(torch.optim.SGD, "_step_supports_amp_scaling", fused, raising=False)
    torch.manual_seed(0)
    before = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))[1]
    if fused:  # the reason for `TrainerFactory.allows_fused`
        with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
            fit(1, precision="16-mixed", gradient_clip_val=1e-2, accumulate_grad_batches=2)
        return
    after = fit(1, precision="16-mixed", gradient_clip_val=1e-2, accumulate_grad_batches=2)[1]
    steps = [getattr(after, name) - getattr(before, name) for name in ("weight", "bias")]
    length = torch.sqrt(sum(step.square().sum() for step in steps))
    torch.testing.assert_close(length, torch.tensor(1e-2), rtol=1e-3, atol=0)
