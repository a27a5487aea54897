"""MultiExitModule: loss against a literal transcription, moving average, and use in a plain Trainer."""

from __future__ import annotations

import copy
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fedekd.errors import UserError
from fedekd.models import ExitHead, MultiExitNetwork, PrivateCNN, multi_exit
from fedekd.modules import MovingAverage, MultiExitModule, SupervisedModule

CLASSES = 4


def network(seed: int = 0, exits: int = 3) -> MultiExitNetwork:
    torch.manual_seed(seed)
    return multi_exit(PrivateCNN(1, 8, CLASSES), CLASSES, exits)


def with_batch_norm() -> MultiExitNetwork:
    torch.manual_seed(0)
    first = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    last = nn.Sequential(nn.Flatten(), nn.Linear(144, 8), nn.BatchNorm1d(8))
    return MultiExitNetwork([first, last], [ExitHead(4, CLASSES), nn.Linear(8, CLASSES)])


def batch(n: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 1, 8, 8, generator=generator), torch.randint(0, CLASSES, (n,), generator=generator)


def loader(n: int = 24) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*batch(n)), batch_size=8)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.5)


def trainer(folder: Path, epochs: int = 2, **options: Any) -> Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        enable_model_summary=False,
        default_root_dir=folder,
        **{**quiet, **options},
    )


def softmax(row: Tensor, t: float) -> list[Tensor]:
    powers = [torch.exp(value / t) for value in row]
    return [power / sum(powers) for power in powers]


def kl(p: list[Tensor], q: list[Tensor]) -> Tensor:
    return sum(a * (a / b).log() for a, b in zip(p, q, strict=True))


def literal_dkd(student: Tensor, teacher: Tensor, y: int, alpha: float, beta: float, t: float) -> Tensor:
    """One sample of Zhao et al.'s Eq. 7: b = [p_y, 1 - p_y], and the softmax over the other classes."""
    p_s, p_t = softmax(student, t), softmax(teacher, t)
    others = [c for c in range(len(p_s)) if c != y]
    rest_s, rest_t = sum(p_s[c] for c in others), sum(p_t[c] for c in others)
    of_target = kl([p_t[y], rest_t], [p_s[y], rest_s])
    of_others = kl([p_t[c] / rest_t for c in others], [p_s[c] / rest_s for c in others])
    return t**2 * (alpha * of_target + beta * of_others)


def literal_loss(exits, teacher, y, w, a, b, t, alpha, beta) -> Tensor:
    """Loss in the docstring of MultiExitModule, exit by exit and sample by sample."""
    total = torch.zeros((), dtype=torch.float64)
    deepest = exits[-1].detach()
    for e, (logits, weight) in enumerate(zip(exits, w, strict=True)):
        terms = []
        for row, teacher_outputs, deep, label in zip(logits, teacher, deepest, y.tolist(), strict=True):
            term = -softmax(row, 1.0)[label].log() + a * literal_dkd(row, teacher_outputs, label, alpha, beta, t)
            if e < len(exits) - 1:
                term = term + b * t**2 * kl(softmax(deep, t), softmax(row, t))
            terms.append(term)
        total = total + weight * sum(terms) / len(terms)
    return total


@pytest.mark.parametrize(
    ("a", "b", "t", "alpha", "beta", "weights", "exits"),
    [
        (1.0, 1.0, 4.0, 1.0, 8.0, None, 3),
        (0.5, 2.0, 1.0, 2.0, 0.5, [0.3, 0.3, 0.4], 3),
        (1.0, 0.0, 3.0, 1.0, 1.0, None, 2),
        (0.0, 1.5, 2.0, 1.0, 8.0, [2.0, 0.0, 1.0], 3),
        (1.0, 1.0, 4.0, 0.0, 1.0, None, 1),
        (0.0, 0.0, 4.0, 1.0, 8.0, [0.0, 1.0], 2),
    ],
)
def test_multi_exit_module_step_matches_docstring_in_value_and_gradient(a, b, t, alpha, beta, weights, exits):
    student, teacher = network(0, exits).double(), network(1).double()
    x, y = batch()
    x = 2 * x.double()
    module = MultiExitModule(student, teacher, a, b, t, alpha, beta, warmup_epochs=0, exit_weights=weights)
    loss = module.training_step((x, y), 0)
    loss.backward()
    zero = torch.zeros(1, dtype=torch.float64)
    ours = [zero if parameter.grad is None else parameter.grad.clone() for parameter in student.parameters()]
    student.zero_grad()
    with torch.no_grad():
        teacher_outputs = teacher.eval()(x)[-1]
    w = weights or [1 / exits] * exits
    literal = literal_loss(student(x), teacher_outputs, y, w, a, b, t, alpha, beta)
    literal.backward()
    torch.testing.assert_close(loss, literal, rtol=1e-11, atol=1e-12)
    for mine, parameter in zip(ours, student.parameters(), strict=True):
        expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(mine.expand_as(expected), expected, rtol=1e-8, atol=1e-12)
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_multi_exit_module_deepest_exit_gets_no_gradient_from_shallow_exits():
    student = network().double()
    module = MultiExitModule(student, distillation_weight=0.0, exit_weights=[1.0, 1.0, 0.0], warmup_epochs=0)
    x, y = batch()
    module.training_step((x.double(), y), 0).backward()
    gradient = student.head.weight.grad
    assert gradient is None or gradient.abs().max() == 0
    assert student.heads[0].linear.weight.grad.abs().max() > 0


def test_multi_exit_module_without_terms_equals_supervised_bit_for_bit(tmp_path):
    ours, supervised = network(), network()
    module = MultiExitModule(ours, distillation_weight=0.0, consistency_weight=0.0, optimizer=sgd)
    assert module.teacher is None
    assert module.average is None
    trainer(tmp_path).fit(module, loader())
    trainer(tmp_path).fit(SupervisedModule(supervised, optimizer=sgd), loader())
    assert all(torch.equal(mine, local) for mine, local in zip(ours.parameters(), supervised.parameters(), strict=True))
    different = network()
    module = MultiExitModule(different, distillation_weight=0.0, consistency_weight=1e-3, optimizer=sgd)
    trainer(tmp_path).fit(module, loader())
    assert any(not torch.equal(a, b) for a, b in zip(different.parameters(), supervised.parameters(), strict=True))


class Snapshots(Callback):
    """Records the network after every step and the warm-up factor per epoch."""

    def __init__(self) -> None:
        self.networks: list[dict[str, Tensor]] = []
        self.warmup_factor: list[float] = []

    def on_train_batch_end(self, trainer: Any, module: Any, *rest: Any) -> None:
        self.networks.append({name: value.clone() for name, value in module.network.state_dict().items()})

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        self.warmup_factor.append(module.distillation.warmup_factor)


def test_moving_average_includes_parameters_and_buffers(tmp_path):
    """The first step is copied, as in PyTorch's averages."""
    student, snapshots = with_batch_norm(), Snapshots()
    module = MultiExitModule(student, ema_decay=0.7, optimizer=sgd)
    trainer(tmp_path, callbacks=[snapshots]).fit(module, loader())
    assert len(snapshots.networks) == 6
    expected = snapshots.networks[0]
    for state in snapshots.networks[1:]:
        expected = {name: 0.7 * value + (1 - 0.7) * state[name] for name, value in expected.items()}
    average = module.average.module.state_dict()
    assert average.keys() == expected.keys()
    for name, value in average.items():
        if value.is_floating_point():
            torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)
            assert name.endswith("weight") or not torch.equal(value, student.state_dict()[name]), name
    assert int(module.average.n_averaged) == 6
    assert module.teacher is module.average
    assert not any(parameter.requires_grad for parameter in module.average.parameters())


def test_moving_average_is_not_trained(tmp_path):
    student = with_batch_norm()
    module = MultiExitModule(student, ema_decay=0.9, optimizer=sgd)
    fitted = trainer(tmp_path, epochs=1)
    fitted.fit(module, loader())
    trained = {id(p) for group in fitted.optimizers[0].param_groups for p in group["params"]}
    assert trained == {id(parameter) for parameter in student.parameters()}
    before = copy.deepcopy(module.average.module.state_dict())
    module.train()
    module.training_step(batch(), 0)
    after = module.average.module.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert module.average.training


def test_moving_average_updates_per_optimizer_step(tmp_path):
    module = MultiExitModule(network(), optimizer=sgd)
    trainer(tmp_path, epochs=2, accumulate_grad_batches=3).fit(module, loader())
    assert int(module.average.n_averaged) == 2


def test_multi_exit_module_continues_given_average_and_freezes_other_teachers(tmp_path):
    student = network()
    average = MovingAverage(student, 0.5)
    for _ in range(2):
        trainer(tmp_path, epochs=1).fit(MultiExitModule(student, average, optimizer=sgd), loader())
    assert int(average.n_averaged) == 6
    module = MultiExitModule(network(), network(1), optimizer=sgd)
    assert module.average is None  # another teacher stays frozen
    before = copy.deepcopy(module.teacher.state_dict())
    trainer(tmp_path, epochs=1).fit(module, loader())
    assert all(torch.equal(value, before[name]) for name, value in module.teacher.state_dict().items())
    assert not any("teacher" in name for name in module.state_dict())


@pytest.mark.parametrize(
    ("warmup", "first", "expected"),
    [(4, 0, [0.25, 0.5, 0.75, 1.0, 1.0]), (4, 2, [0.75, 1.0, 1.0, 1.0, 1.0]), (0, 0, [1.0] * 5)],
)
def test_multi_exit_module_warm_up_increases_distillation_weight(warmup, first, expected, tmp_path):
    snapshots = Snapshots()
    module = MultiExitModule(network(), network(1), warmup_epochs=warmup, first_epoch=first)
    trainer(tmp_path, epochs=5, callbacks=[snapshots]).fit(module, loader(8))
    assert snapshots.warmup_factor == expected


def test_multi_exit_module_warmup_factor_scales_only_distillation():
    x, y = batch()
    module = MultiExitModule(network().double(), network(1).double(), warmup_epochs=20)
    losses = []
    for warmup_factor in (0.0, 0.5, 1.0):
        module.distillation.warmup_factor = warmup_factor
        losses.append(module.training_step((x.double(), y), 0).item())
    assert losses[1] - losses[0] == pytest.approx(losses[2] - losses[1], rel=1e-9)
    assert losses[2] > losses[0]


def test_multi_exit_module_logs_metric_of_every_exit(tmp_path):
    module = MultiExitModule(network(), optimizer=sgd)
    fitted = trainer(tmp_path)
    fitted.fit(module, loader(), loader())
    named = {"loss", "loss/supervised", "loss/distilled", "loss/consistency", "val/loss", "val/accuracy"}
    assert named | {f"val/exit_{number}/accuracy" for number in (1, 2, 3)} <= set(fitted.callback_metrics)
    assert "val/exit_4/accuracy" not in fitted.callback_metrics
    logged = {name: float(value) for name, value in fitted.callback_metrics.items()}
    assert logged["loss"] == pytest.approx(sum(logged[f"loss/{n}"] for n in ("supervised", "distilled", "consistency")))
    assert logged["val/exit_3/accuracy"] == logged["val/accuracy"]
    [tested] = fitted.test(module, loader(), verbose=False)
    x, y = batch(24)
    with torch.no_grad():
        exits = module.network.eval()(x)
    for number, logits in enumerate(exits, start=1):
        expected = float((logits.argmax(1) == y).float().mean())
        assert tested[f"test/exit_{number}/accuracy"] == pytest.approx(expected, rel=1e-5)


def test_multi_exit_module_network_without_num_exits_logs_last_exit(tmp_path):
    class Listing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network()

        def forward(self, x: Tensor) -> list[Tensor]:
            return self.inner(x)

    fitted = trainer(tmp_path, epochs=1)
    fitted.fit(MultiExitModule(Listing(), optimizer=sgd), loader(), loader())
    assert "val/accuracy" in fitted.callback_metrics
    assert not any("exit_" in name for name in fitted.callback_metrics)


def test_multi_exit_module_checkpoint_restores_average(tmp_path):
    def made() -> MultiExitModule:
        return MultiExitModule(with_batch_norm(), ema_decay=0.6, warmup_epochs=3, optimizer=sgd)

    whole, half = made(), made()
    trainer(tmp_path, epochs=3).fit(whole, loader())
    stopped = trainer(tmp_path, epochs=1)
    stopped.fit(half, loader())
    stopped.save_checkpoint(tmp_path / "half.ckpt")
    state = torch.load(tmp_path / "half.ckpt", weights_only=False)["state_dict"]
    for name, value in half.average.state_dict().items():
        assert torch.equal(state[f"average.{name}"], value)
    again = made()
    trainer(tmp_path, epochs=3).fit(again, loader(), ckpt_path=tmp_path / "half.ckpt")
    for name, value in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"distillation_weight": -1.0}, "distillation_weight: expected a finite number of at least 0, got -1.0"),
        ({"distillation_weight": math.nan}, "distillation_weight"),
        ({"consistency_weight": -0.1}, "consistency_weight"),
        ({"temperature": 0.0}, "temperature: expected a finite number above 0, got 0.0"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"dkd_alpha": -1.0}, "dkd_alpha"),
        ({"dkd_beta": -1.0}, "dkd_beta"),
        ({"warmup_epochs": -1}, "warmup_epochs: expected at least 0, got -1"),
        ({"ema_decay": 1.0}, "ema_decay: expected a number in"),
        ({"ema_decay": -0.1}, "ema_decay"),
        ({"teacher": "EMA"}, "teacher: expected 'ema' or a network, got 'EMA'"),
    ],
)
def test_multi_exit_module_invalid_argument_raises_one_line_user_error(arguments, words):
    with pytest.raises(UserError, match=words) as error:
        MultiExitModule(network(), **arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("weights", [[0.5, 0.5], [1.0, -1.0, 1.0], [1.0, math.nan, 1.0]])
def test_multi_exit_module_invalid_exit_weights_raise_user_error(weights):
    with pytest.raises(UserError, match="exit_weights"):
        MultiExitModule(network(), exit_weights=weights)


def test_multi_exit_module_resumed_within_an_epoch_continues_the_warm_up():
    """Lightning then calls `on_train_start`, but not `on_train_epoch_start`."""
    module = MultiExitModule(network(), warmup_epochs=20, first_epoch=4)
    module.on_train_start()
    assert module.distillation.warmup_factor == 5 / 20


def test_multi_exit_module_can_be_pickled():
    module = pickle.loads(pickle.dumps(MultiExitModule(network(), ema_decay=0.5)))
    assert module.average is module.teacher
    for _ in range(2):
        module.average.update_parameters(module.network)
