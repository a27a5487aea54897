"""Learning rate schedule of a phase, with a state for the next one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, Literal

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from fedekd.errors import UserError, describe_error

Interval = Literal["epoch", "step"]

#: Entries of a group that an optimizer decides again in each phase, and no scheduler changes.
_OF_OPTIMIZER = ("params", "fused", "foreach", "capturable", "differentiable")


class Schedule:
    """Learning rate schedule of one training phase.

    The learning rate of a step is the rate of the scheduler times `factor`. The scheduler itself computes with its own
    rates only, so that a factor that changes from phase to phase does not change the shape of the schedule.

    Args:
        build: Creates the scheduler of an optimizer.
        interval: `epoch` steps the scheduler after each epoch, `step` after each step of the optimizer. Default epoch.
        state: State of an earlier phase, as `state_dict` returns it; None starts a new schedule.

    Attributes:
        scheduler: The scheduler; None until `attach`.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        >>> schedule = Schedule(lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5))
        >>> _ = schedule.attach(optimizer)
        >>> schedule.begin(factor=0.1)
        >>> optimizer.param_groups[0]["lr"]
        0.1
        >>> _ = optimizer.step()
        >>> schedule.step()
        >>> optimizer.param_groups[0]["lr"]
        0.05
    """

    def __init__(
        self,
        build: Callable[[Optimizer], LRScheduler],
        interval: Interval = "epoch",
        state: Mapping[str, Any] | None = None,
    ) -> None:
        self.build, self.interval, self.state = build, interval, state
        self.scheduler: LRScheduler | None = None
        self._factor = 1.0
        self._rates: list[float] = []

    def attach(self, optimizer: Optimizer) -> LRScheduler:
        """Create the scheduler.

        Call it before the optimizer loads a state, whose learning rates the constructor of a scheduler replaces.
        """
        self.scheduler = self.build(optimizer)
        self._rates = [float(group["lr"]) for group in optimizer.param_groups]
        return self.scheduler

    def begin(self, factor: float) -> None:
        """Load the state of the earlier phase, if any, and set the learning rates.

        Args:
            factor: Factor of all learning rates.
        """
        scheduler, self._factor = self._attached, factor
        if self.state is not None:
            scheduler.load_state_dict(copy.deepcopy(self.state["scheduler"]))
            # Some schedules change momentum, too, and keep their limits in the groups.
            for group, values in zip(scheduler.optimizer.param_groups, self.state["groups"], strict=True):
                group.update(copy.deepcopy(values))
            self._rates = [float(values["lr"]) for values in self.state["groups"]]
        self._set_rates(factor)

    def step(self) -> None:
        """Step the scheduler.

        Raises:
            UserError: If the schedule has ended, as that of OneCycleLR after `total_steps`.
        """
        scheduler = self._attached
        self._set_rates(1.0)
        try:
            scheduler.step()
        except Exception as error:  # a user's scheduler may raise anything
            raise UserError(
                f"client.scheduler: expected a schedule for all steps of a client, got {type(scheduler).__name__},"
                f" which fails at step {scheduler.last_epoch}. It reports: {describe_error(error, 160)}"
            ) from error
        self._rates = [float(group["lr"]) for group in scheduler.optimizer.param_groups]
        self._set_rates(self._factor)

    def state_dict(self) -> dict[str, Any] | None:
        """Return the state as plain values and tensors; None if nothing was attached."""
        if self.scheduler is None:
            return None if self.state is None else dict(self.state)
        groups = [
            {name: value for name, value in group.items() if name not in _OF_OPTIMIZER} | {"lr": rate}
            for group, rate in zip(self.scheduler.optimizer.param_groups, self._rates, strict=True)
        ]
        return copy.deepcopy({"scheduler": self.scheduler.state_dict(), "groups": groups})

    @property
    def _attached(self) -> LRScheduler:
        if self.scheduler is None:
            raise ValueError("expected `attach` to be called first")
        return self.scheduler

    def _set_rates(self, factor: float) -> None:
        for group, rate in zip(self._attached.optimizer.param_groups, self._rates, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate * factor)
            else:
                group["lr"] = rate * factor
