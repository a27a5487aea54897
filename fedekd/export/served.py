"""Model as it is deployed: preprocessing, network and exit policy in one module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fedekd.early_exit import ExitPolicy
from fedekd.errors import require
from fedekd.functional import max_softmax_confidence, score_exit
from fedekd.models import MultiExitNetwork
from fedekd.models.ensemble import StageOutput
from fedekd.tasks import Task

OUTPUTS: dict[Task, tuple[str, ...]] = {
    "classification": ("label", "probabilities", "score", "exit", "logits"),
    "regression": ("value", "exit"),
}
"""Names of the outputs of an exported model, in order."""


Limit = float | tuple[float, ...]


class ServedNetwork(nn.Module):
    """Deployed model of a client: from raw inputs to predictions.

    All exits of the batch are computed and the policy then selects one per sample, so that the outputs are those of
    `ExitPolicy.predict_with_exits` for any batch size. `EarlyExitNetwork` computes nothing after the exit of a sample.

    Args:
        network: Network in evaluation mode, on the CPU.
        preprocessing: Module from raw inputs to inputs of the network.
        task: `classification` or `regression`.
        policy: Exit policy of the network; None takes the last exit.
        proxy: Second network for the score `agreement`. Default None.
        target_shift: Added to the outputs in regression, after `target_scale`. Default 0.
        target_scale: Factor from outputs to the unit of the targets in regression. Default 1.
        margins: Subtracted from threshold and search bound of each exit before the last, shape (E - 1,), see
            `round_off_margins`. Default: 0.

    Raises:
        UserError: If the policy was calibrated for another network.
    """

    def __init__(
        self,
        network: nn.Module,
        preprocessing: nn.Module,
        task: Task,
        policy: ExitPolicy | None = None,
        proxy: nn.Module | None = None,
        target_shift: float = 0.0,
        target_scale: float = 1.0,
        margins: Sequence[float] = (),
    ) -> None:
        super().__init__()
        self.network, self.preprocessing, self.task = network, preprocessing, task
        self.policy = policy if isinstance(network, MultiExitNetwork) else None
        if self.policy is not None:
            assert isinstance(network, MultiExitNetwork)
            self.policy.require(network, proxy)
        uses_proxy = self.policy is not None and self.policy.uses_proxy and any(self.policy.evaluated[:-1])
        self.proxy = proxy if uses_proxy else None
        self.target_shift, self.target_scale = target_shift, target_scale
        self.margins = tuple(margins)
        self.eval().requires_grad_(False)

    @property
    def has_open_exits(self) -> bool:
        """True if an exit before the last one is open."""
        return self.policy is not None and any(self.policy.evaluated[:-1])

    @property
    def early_exits(self) -> list[tuple[Limit, Limit, bool]]:
        """Threshold and search bound of each early exit; True if its head is evaluated.

        A limit is a number, or one per class that the exit predicts.
        """
        if self.policy is None:
            return []
        thresholds, search_bounds = self.policy.limits
        margins = self.margins or (0.0,) * (self.policy.num_exits - 1)
        return [
            (_minus(thresholds[exit_], margin), _minus(search_bounds[exit_], margin), self.policy.evaluated[exit_])
            for exit_, margin in enumerate(margins)
        ]

    def score(self, logits: Tensor, proxy_logits: Tensor | None) -> Tensor:
        """Return the confidence of the policy, float64, shape (B,)."""
        if self.policy is None or (self.policy.uses_proxy and proxy_logits is None):
            return max_softmax_confidence(logits).double()
        return score_exit(self.policy.score, logits, proxy_logits, self.policy.gamma).double()

    def outputs(self, logits: Tensor, score: Tensor, exits: Tensor) -> tuple[Tensor, ...]:
        """Return the outputs named by `OUTPUTS`; exits count from 1."""
        if self.task == "regression":
            return logits[:, 0].double() * self.target_scale + self.target_shift, exits
        return logits.argmax(dim=1), logits.softmax(dim=1), score, exits, logits

    def forward(self, inputs: Tensor) -> tuple[Tensor, ...]:
        """Map raw inputs (B, ...) to the outputs named by `OUTPUTS`.

        Args:
            inputs: Raw inputs, as `InputFormat` describes them.
        """
        x = self.preprocessing(inputs)
        outputs = self.network(x)
        outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
        logits, last = outputs[-1], len(outputs)
        exits = torch.full_like(logits[:, 0], last, dtype=torch.int64)
        if self.task == "regression":
            return self.outputs(logits, logits, exits)
        proxy_logits = None if self.proxy is None else self.proxy(x)
        score = self.score(logits, proxy_logits)
        if self.policy is None:
            return self.outputs(logits, score, exits)
        eligible = torch.ones_like(exits, dtype=torch.bool)
        early = zip(outputs[:-1], self.early_exits, strict=True)
        for number, (exit_logits, (threshold, bound, is_evaluated)) in enumerate(early, start=1):
            if not is_evaluated:
                continue
            exit_score = self.score(exit_logits, proxy_logits)
            here = eligible & (exit_score >= _limit_of(threshold, exit_logits, exit_score))
            eligible = eligible & (exit_score < _limit_of(bound, exit_logits, exit_score))
            logits = torch.where(here[:, None], exit_logits, logits)
            score = torch.where(here, exit_score, score)
            exits = torch.where(here, number, exits)
        return self.outputs(logits, score, exits)


class EarlyExitNetwork(nn.Module):
    """Served network for one sample that computes nothing after its exit.

    The branches are `torch.cond`, which ONNX has as nested `If`.

    Args:
        served: Served classifier with exits and a policy.

    Raises:
        UserError: If it has no policy.
    """

    def __init__(self, served: ServedNetwork) -> None:
        super().__init__()
        require(served.policy is not None, "exit policy", "a policy of the network", None)
        self.served = served.eval()

    def forward(self, inputs: Tensor) -> tuple[Tensor, ...]:
        """Map one raw input (1, ...) to the outputs of `ServedNetwork`."""
        x = self.served.preprocessing(inputs)
        proxy = () if self.served.proxy is None else (self.served.proxy(x),)
        return self._from_stage(0, x, torch.ones(1, dtype=torch.bool, device=x.device), proxy)

    def _from_stage(self, exit_: int, state: Any, eligible: Tensor, proxy: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Run a stage and its exit; go on with the next one if the sample stays."""
        served, network = self.served, self.served.network
        policy = served.policy
        assert policy is not None
        assert isinstance(network, MultiExitNetwork)
        state = network.stages[exit_](state)
        if exit_ == policy.num_exits - 1:
            return self._emit(exit_, network.heads[exit_](state), proxy)
        threshold, bound, is_evaluated = served.early_exits[exit_]
        if not is_evaluated:
            return self._from_stage(exit_ + 1, state, eligible, proxy)
        logits = network.heads[exit_](state)
        score = served.score(logits, *proxy or (None,))
        here = eligible & (score >= _limit_of(threshold, logits, score))
        stays = eligible & (score < _limit_of(bound, logits, score))
        tensors, restore = _flatten(state)

        def emit(logits: Tensor, stays: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
            return self._emit(exit_, logits.clone(), tensors[: len(proxy)])

        def go_on(logits: Tensor, stays: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
            return self._from_stage(exit_ + 1, restore(tensors[len(proxy) :]), stays, tensors[: len(proxy)])

        result: tuple[Tensor, ...] = torch.cond(here.squeeze(0), emit, go_on, (logits, stays, *proxy, *tensors))
        return result

    def _emit(self, exit_: int, logits: Tensor, proxy: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        exits = torch.full((1,), exit_ + 1, dtype=torch.int64, device=logits.device)
        return self.served.outputs(logits, self.served.score(logits, *proxy or (None,)), exits)


def _limit_of(limit: Limit, logits: Tensor, score: Tensor) -> float | Tensor:
    """Return the limit of an exit, or of each sample by the class it predicts."""
    if isinstance(limit, float):
        return limit
    predicted, result = logits.argmax(dim=1), torch.full_like(score, limit[0])
    for number, value in enumerate(limit[1:], start=1):  # ONNX cannot have a tensor of constants within `torch.cond`
        result = torch.where(predicted == number, torch.full_like(score, value), result)
    return result


def _minus(limit: float | Sequence[float], margin: float) -> Limit:
    if isinstance(limit, int | float):
        return limit - margin
    return tuple(value - margin for value in limit)


def _flatten(state: Any) -> tuple[tuple[Tensor, ...], Any]:
    """Return the tensors of a stage's output, and the inverse function."""
    if isinstance(state, StageOutput):
        return (state.hidden, state.others), lambda tensors: StageOutput(*tensors)
    return (state,), lambda tensors: tensors[0]
