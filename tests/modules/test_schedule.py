"""Schedules: carried from phase to phase, they equal one phase of all epochs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.swa_utils import SWALR

from fedekd.errors import UserError
from fedekd.federation.checkpoint import pack, unpack
from fedekd.modules.schedule import Schedule


def warmup(optimizer: torch.optim.Optimizer) -> lr_scheduler.LRScheduler:
    parts = [lr_scheduler.LinearLR(optimizer, 0.1, total_iters=3), lr_scheduler.CosineAnnealingLR(optimizer, 6)]
    return lr_scheduler.SequentialLR(optimizer, parts, [3])


def chained(optimizer: torch.optim.Optimizer) -> lr_scheduler.LRScheduler:
    return lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(optimizer, 0.5, 4), lr_scheduler.ExponentialLR(optimizer, 0.9)], optimizer
    )


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], lr_scheduler.LRScheduler]] = {
    "StepLR": lambda optimizer: lr_scheduler.StepLR(optimizer, 2),
    "MultiStepLR": lambda optimizer: lr_scheduler.MultiStepLR(optimizer, [1, 3, 4, 4]),
    "ConstantLR": lambda optimizer: lr_scheduler.ConstantLR(optimizer, 0.5, 4),
    "LinearLR": lambda optimizer: lr_scheduler.LinearLR(optimizer, 0.1, total_iters=5),
    "ExponentialLR": lambda optimizer: lr_scheduler.ExponentialLR(optimizer, 0.7),
    "PolynomialLR": lambda optimizer: lr_scheduler.PolynomialLR(optimizer, 7, 2.0),
    "CosineAnnealingLR": lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 5, eta_min=0.01),
    "CosineAnnealingWarmRestarts": lambda optimizer: lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 3, 2),
    "CyclicLR": lambda optimizer: lr_scheduler.CyclicLR(optimizer, 0.1, 0.5, 2, 3),
    "OneCycleLR": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 0.5, 8),
    "LambdaLR": lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)),
    "MultiplicativeLR": lambda optimizer: lr_scheduler.MultiplicativeLR(optimizer, lambda step: 0.9),
    "SWALR": lambda optimizer: SWALR(optimizer, 0.05, 4),
    "SequentialLR": warmup,
    "ChainedScheduler": chained,
}
STEPS = 8


def new_optimizer(rate: float | torch.Tensor = 0.3) -> torch.optim.Optimizer:
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.ones(2)
    return torch.optim.Adam([parameter], lr=rate, fused=False, capturable=False)


def settings(optimizer: torch.optim.Optimizer) -> list[tuple[Any, ...]]:
    return [(float(group["lr"]), tuple(group["betas"])) for group in optimizer.param_groups]


def rates(name: str, factors: list[float], packed: bool = True) -> list[Any]:
    """Rate and momentum of each step, over phases of equal length with these factors and new optimizers."""
    found: list[Any] = []
    state = None
    for factor in factors:
        optimizer = new_optimizer()
        schedule = Schedule(SCHEDULERS[name], "step", state)
        schedule.attach(optimizer)
        schedule.begin(factor)
        for _ in range(STEPS // len(factors)):
            found += settings(optimizer)
            optimizer.step()
            schedule.step()
        state = schedule.state_dict()
        state = unpack(pack(state)) if packed else state
    return found


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedule_carried_over_phases_equals_torch(name: str) -> None:
    optimizer = new_optimizer()
    scheduler = SCHEDULERS[name](optimizer)
    expected: list[Any] = []
    for _ in range(STEPS):
        expected += settings(optimizer)
        optimizer.step()
        scheduler.step()
    assert len(set(expected)) > 1
    for phases in (1, 2, 4, 8):
        assert rates(name, [1.0] * phases) == expected
        assert rates(name, [1.0] * phases, packed=False) == expected


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedule_factor_multiplies_the_rates_of_the_scheduler(name: str) -> None:
    plain = rates(name, [1.0] * 4)
    factors = [0.5**phase for phase in range(4)]
    expected = [(rate * factors[step // 2], betas) for step, (rate, betas) in enumerate(plain)]
    assert rates(name, factors) == expected


def test_schedule_of_tensor_rates_keeps_the_tensor() -> None:
    rate = torch.tensor(0.25, dtype=torch.float64)
    optimizer = new_optimizer(rate)
    schedule = Schedule(SCHEDULERS["ExponentialLR"])
    schedule.attach(optimizer)
    schedule.begin(0.5)
    optimizer.step()
    schedule.step()
    assert optimizer.param_groups[0]["lr"] is rate
    torch.testing.assert_close(rate, torch.tensor(0.25 * 0.7 * 0.5, dtype=torch.float64))


def test_schedule_state_is_a_copy() -> None:
    schedule = Schedule(SCHEDULERS["SequentialLR"])
    optimizer = new_optimizer()
    schedule.attach(optimizer)
    schedule.begin(1.0)
    state = schedule.state_dict()
    before = pack(state)
    optimizer.step()
    schedule.step()
    assert pack(state) == before
    assert pack(schedule.state_dict()) != before


def test_schedule_that_ends_raises_user_error() -> None:
    schedule = Schedule(lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 0.5, 1))
    optimizer = new_optimizer()
    schedule.attach(optimizer)
    schedule.begin(1.0)
    optimizer.step()
    schedule.step()
    with pytest.raises(UserError, match=r"client\.scheduler: .*OneCycleLR, which fails at step 2\. .*total steps is 1"):
        schedule.step()
