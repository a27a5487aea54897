"""Validation of what an engine yields: results of clients, and their updates.

An engine may run clients of other institutions. Nothing of a result is stored or averaged before it is checked here.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedekd.data import ClientSplits
from fedekd.do_no_harm.rule import FEDERATED, LOCAL, Comparison
from fedekd.early_exit.client_tradeoff import ExitTradeoff
from fedekd.early_exit.cost_curves import BUDGETS
from fedekd.errors import shorten
from fedekd.federation.engines.base import ClientResult, RoundRequest
from fedekd.functional import all_finite, at_least_float32
from fedekd.methods import ClientUpdate, StateDict
from fedekd.metrics import MetricSpec

#: Most names that a client logs per round. FedeKD logs four per exit: 133 for a ViT-H with an exit per layer.
MAX_LOGS = 256

#: Segments of letters, digits and ``_ . -``; each name is a column of metrics.csv and a key of loggers.
_LOG_NAME = re.compile(r"(?=.{1,64}\Z)[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+)*")

#: Allowed values of the fields of a result.
_EXPECTED = {
    "client": "the number of a client",
    "score": "a number",
    "supervised_rounds": "a count",
    "logs": "a dict of numbers by name",
    "tradeoff": "pairs and triples of numbers",
    "comparison": "consistent counts",
    "metrics": "a dict of numbers by name",
    "deployed_metrics": "a dict of numbers by name",
    "update": "a ClientUpdate with a number of samples",
}

#: Largest float32: a score above it is not of a network's outputs, and could overflow in sums.
_LARGEST_SCORE = torch.finfo(torch.float32).max

#: Integers of at least this size are not exact in float64, in which averages are computed.
_EXACT = 2**53

#: A change is out of proportion above this multiple of the usual one. Largest of honest clients on digits (13 methods,
#: Adam and SGD with momentum): 4.5 with 6 clients, 6.8 with 20 of at least 2 samples, 19 with 10 at alpha 0.02.
PROPORTION = 20.0

#: A change of this part of the message's 2-norm is usual, however little the other clients change.
_SMALL_CHANGE = 0.2

#: Largest ratio of training steps that explains a larger change: sizes of splits are the sites' own statements.
_MAX_STEPS_RATIO = 60.0


def is_number(value: Any) -> bool:
    """Return True for a float, or for an int that a float represents exactly."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return isinstance(value, float) or abs(value) < _EXACT


def is_count(value: Any) -> bool:
    """Return True for an int in [0, 2^53)."""
    return isinstance(value, int) and is_number(value) and value >= 0


def is_log_name(name: Any) -> bool:
    """Return True for a name of at most 64 characters, as in `gate/weight_mean`."""
    return isinstance(name, str) and _LOG_NAME.fullmatch(name) is not None


def invalid_field(result: ClientResult) -> str | None:
    """Check the types of a result, and the names and the number of its logs.

    Returns:
        The first invalid field with its value; None if all are valid.
    """
    logs, update = result.logs, result.update
    valid = {
        "client": is_count(result.client),
        "score": is_number(result.score),
        "supervised_rounds": is_count(result.supervised_rounds),
        "logs": isinstance(logs, dict)
        and len(logs) <= MAX_LOGS
        and all(map(is_log_name, logs))
        and all(map(is_number, logs.values())),
        "tradeoff": result.tradeoff is None or _is_tradeoff(result.tradeoff),
        "comparison": result.comparison is None or _is_comparison(result.comparison),
        "metrics": _are_metrics(result.metrics),
        "deployed_metrics": _are_metrics(result.deployed_metrics),
        "update": update is None or (isinstance(update, ClientUpdate) and is_count(update.num_samples)),
    }
    name = next((name for name, is_valid in valid.items() if not is_valid), None)
    if name is None:
        return None
    if name == "logs" and isinstance(logs, dict):
        if len(logs) > MAX_LOGS:
            return f"logs: expected at most {MAX_LOGS} names, got {len(logs):,}"
        log = next(log for log, value in logs.items() if not (is_log_name(log) and is_number(value)))
        if is_log_name(log):
            return f"logs: expected a number as {_short(log)}, got {_short(logs[log])}"
        return f"logs: expected names of letters, digits and _ . - /, got {_short(log)}"
    invalid = getattr(update, "num_samples", update) if name == "update" else getattr(result, name)
    return f"{name}: expected {_EXPECTED[name]}, got {_short(invalid)}"


def with_plain_logs(result: Any) -> Any:
    """Return a result whose logged scalars are floats; any object is accepted.

    NumPy scalars and tensors of one value are converted.
    """
    logs = getattr(result, "logs", None)
    if not (isinstance(result, ClientResult) and isinstance(logs, dict) and any(map(_is_scalar, logs.values()))):
        return result
    return replace(
        result, logs={name: float(value.item()) if _is_scalar(value) else value for name, value in logs.items()}
    )


def _is_scalar(value: Any) -> bool:
    """Return True for a real NumPy scalar or a real tensor without dimensions."""
    if type(value) in (Tensor, nn.Parameter):
        is_plain = value.layout is torch.strided and not (value.is_meta or value.is_quantized)
        return is_plain and value.ndim == 0 and not value.is_complex() and value.dtype != torch.bool
    return isinstance(value, np.floating | np.integer)


def _are_metrics(value: Any) -> bool:
    """Return True for numbers by name."""
    return isinstance(value, dict) and all(map(is_log_name, value)) and all(map(is_number, value.values()))


def _is_tradeoff(value: Any) -> bool:
    """Return True for an `ExitTradeoff` of pairs and triples of numbers."""
    return isinstance(value, ExitTradeoff) and all(
        isinstance(rows, list)
        and len(rows) <= most
        and all(isinstance(row, list | tuple) and len(row) == length and all(map(is_number, row)) for row in rows)
        for rows, length, most in ((value.exits, 2, MAX_LOGS), (value.budgets, 3, len(BUDGETS)))
    )


def _is_comparison(value: Any) -> bool:
    """Return True for a `Comparison` of consistent counts."""
    return (
        isinstance(value, Comparison)
        and isinstance(value.deployed, str)
        and value.deployed in (FEDERATED, LOCAL, *(row.name for row in value.candidates))
        and all(map(_has_counts, (value, *value.candidates)))
        and all(isinstance(row.name, str) and isinstance(row.tested, bool) for row in value.candidates)
        and (value.deciding is None or is_count(value.deciding))
        and is_number(value.level)
    )


def _has_counts(value: Any) -> bool:
    """Return True for consistent counts, a gain and a p-value."""
    return (
        all(map(is_count, (value.samples, value.worse, value.better)))
        and value.worse + value.better <= value.samples
        and all(map(is_number, (value.gain, value.p_value)))
    )


def is_value(metric: MetricSpec, value: Any) -> bool:
    """Return True for NaN, or for a value in the range of a metric."""
    if not is_number(value):
        return False
    lowest, highest = metric.range
    return math.isnan(value) or (lowest <= value <= highest and abs(value) <= _LARGEST_SCORE)


@dataclass(frozen=True)
class ResultValidator:
    """Rejects results that a round cannot give.

    Args:
        metrics: Metric of each value that a client reports, by key; decides the range.
        primary: Metric of the score.
        clients: Splits of each client, in the order of the clients' numbers.
    """

    metrics: Mapping[str, MetricSpec]
    primary: MetricSpec
    clients: Sequence[ClientSplits]

    def check(self, result: ClientResult, request: RoundRequest, answered: Sequence[int] = ()) -> str | None:
        """Check a result against the request of its round.

        Args:
            result: Result from an engine.
            request: The request.
            answered: Clients whose result was accepted before.

        Returns:
            The reason to reject it; None if it is valid.
        """
        if reason := invalid_field(result):
            return f"{self._label(result.client)}: {reason}"
        if result.client not in request.participants or result.client in answered:
            return f"{self._label(result.client)}: expected one result of each participant"
        comparison, update = result.comparison, result.update
        expected = {
            "score": not request.round_idx or is_value(self.primary, result.score),
            "metrics": not request.round_idx or self._fits(result),
            "comparison": (comparison is None) == (request.comparison is None),
            "tradeoff": result.tradeoff is None or not request.collect_updates,
            "update": update is None or (request.collect_updates and update.client == result.client),
        }
        if comparison is not None and request.comparison is not None:
            client = self.clients[result.client]
            held = sum(len(getattr(client, split)) for split in request.comparison.splits)
            rule = request.comparison.rule
            allowed = {*(rule.candidates or (FEDERATED,)), LOCAL}
            has_names = tuple(row.name for row in comparison.candidates) == rule.candidates
            is_within = max([comparison.samples, *(row.samples for row in comparison.candidates)]) <= held
            expected["comparison"] = has_names and is_within and comparison.deployed in allowed
            needs_metrics = bool(rule.candidates) and not comparison.is_local
            expected["deployed_metrics"] = self._has_deployed_metrics(result, needs_metrics)
        name = next((name for name, is_valid in expected.items() if not is_valid), None)
        if name is None:
            return None
        return f"{self._label(result.client)}: unexpected {name} {_short(getattr(result, name))}"

    def _label(self, client: Any) -> str:
        """Return a client in words; its number may be any object."""
        is_client = is_count(client) and client < len(self.clients)
        return self.clients[client].label if is_client else f"client {_short(client)}"

    def metrics_problem(self, metrics: Any) -> str | None:
        """Check all metrics of a client.

        Args:
            metrics: Values by key; any object is accepted.

        Returns:
            Why they are not valid; None if they are.
        """
        if not isinstance(metrics, Mapping) or metrics.keys() != self.metrics.keys():
            return f"expected metrics {', '.join(self.metrics)[:60]}, got {_short(metrics)}"
        for key, value in metrics.items():
            if not is_value(self.metrics[key], value):
                return f"score: expected a value of {key}, got {_short(value)}"
        return None

    def _has_deployed_metrics(self, result: ClientResult, needed: bool) -> bool:
        """Return True for valid metrics of a candidate, or none where none is needed."""
        metrics = result.deployed_metrics
        return self.metrics_problem(metrics) is None if needed else not metrics

    def _fits(self, result: ClientResult) -> bool:
        """Return True for valid metrics with the score among them.

        An engine of a user may leave them out.
        """
        if not result.metrics:
            return True
        value = result.metrics.get(self.primary.name)
        same = value == result.score or (value != value and result.score != result.score)
        return same and self.metrics_problem(result.metrics) is None

    def check_samples(self, update: ClientUpdate) -> str | None:
        """Check the number of training samples by which an update may be weighted.

        Returns:
            The reason to reject the update; None if the number is that of the client's training split.
        """
        held = len(self.clients[update.client].train)
        return None if update.num_samples == held else f"num_samples: expected {held}, got {update.num_samples}"


@dataclass(frozen=True)
class UpdateValidator:
    """Rejects updates of wrong structure, values out of range, or a too large norm.

    Args:
        max_norm: Largest accepted 2-norm of the difference between update and message; None sets no bound.
    """

    max_norm: float | None = None

    def check(self, update: Any, sent: StateDict) -> str | None:
        """Check an update; any object is accepted as input.

        Integers, which count or index, must be exact in float64, and at least 0 unless the message has lower ones.
        A `running_var` must be at least 0.

        Args:
            update: State dict from the client.
            sent: State dict that the client received; keys, shapes and dtypes must be equal.

        Returns:
            The reason to reject it; None if it is valid.
        """
        if reason := structure_problem(update, sent):
            return reason
        for name, tensor in update.items():
            if reason := _range_problem(name, tensor.detach(), sent[name]):
                return f"{_short(name)}: {reason}"
        if self.max_norm is not None:
            norm = Change.of(update, sent).norm
            if not norm <= self.max_norm:
                return f"max_update_norm: expected a 2-norm of at most {self.max_norm:g}, got {norm:.4g}"
        return None


def structure_problem(update: Any, sent: StateDict) -> str | None:
    """Return why an update has another form than the message; None if it has not."""
    if not isinstance(update, Mapping):
        return f"expected tensors by name, got {type(update).__name__}"
    if missing := [name for name in sent if name not in update]:
        return f"key {_short(min(missing))} is missing"
    if unknown := [name for name in update if not (isinstance(name, str) and name in sent)]:
        return f"key {_short(unknown[0])} was not sent to the client"
    for name, tensor in update.items():
        reference = sent[name]
        # Other subclasses of Tensor may compute anything; a fake or uninitialised one has no values.
        if type(tensor) not in (Tensor, nn.Parameter):
            return f"{_short(name)}: expected a tensor, got {type(tensor).__name__}"
        if tensor.is_nested or tensor.layout is not torch.strided or tensor.is_meta or tensor.is_quantized:
            return f"{_short(name)}: expected a dense tensor with values, got {tensor.layout} on {tensor.device.type}"
        if tensor.shape != reference.shape:
            return f"{_short(name)}: expected shape {tuple(reference.shape)}, got {tuple(tensor.shape)}"
        if tensor.dtype != reference.dtype:
            return f"{_short(name)}: expected {reference.dtype}, got {tensor.dtype}"
    return None


def _range_problem(name: str, tensor: Tensor, sent: Tensor) -> str | None:
    """Return why a tensor's values are out of range; None if they are not."""
    if tensor.is_floating_point() or tensor.is_complex():
        tensor = at_least_float32(tensor)
        if not all_finite([tensor]):
            limit = f" of at most {torch.finfo(sent.dtype).max:g} ({sent.dtype})" if sent.dtype == torch.float16 else ""
            return f"expected finite values{limit}, got NaN or infinity"
        if name.rpartition(".")[2] == "running_var" and bool((tensor < 0).any()):
            return f"expected variances of at least 0, got {float(tensor.min()):.4g}"
    elif not torch.equal(tensor.to(sent.device), sent):  # a seed or a hash that is sent may be larger
        values = tensor.to(torch.int64)  # which has the functions that unsigned types have not
        lowest, low, high = min(0, int(sent.to(torch.int64).min())), int(values.min()), int(values.max())
        if low < lowest or high >= _EXACT:
            return f"expected integers of at least {lowest} and below 2^53, got {low if low < lowest else high}"
    return None


@dataclass(frozen=True)
class Change:
    """Difference between an update and the message to its client.

    Attributes:
        norm: 2-norm of the difference, over all real and complex tensors.
        message: The message.
        integers: By name of each other tensor, such as a counter of BatchNorm, True if it differs.
        steps: Training steps of the client in an epoch, at least 1.
    """

    norm: float
    message: StateDict
    integers: Mapping[str, bool]
    steps: int = 1

    @classmethod
    @torch.no_grad()
    def of(cls, update: StateDict, sent: StateDict, steps: int = 1) -> Change:
        """Compute the change of a valid update, with sums in float64."""
        squares, integers = 0.0, {}
        for name, tensor in update.items():
            before, after = sent[name], tensor.detach().to(sent[name].device)
            if tensor.is_floating_point() or tensor.is_complex():
                before = at_least_float32(before)
                squares += _square_norm(after.to(before.dtype) - before)
            else:
                integers[name] = not torch.equal(after, before)
        return cls(math.sqrt(squares), sent, integers, max(steps, 1))

    @property
    def message_norm(self) -> float:
        """2-norm of the message, over its real and complex tensors."""
        tensors = (t for t in self.message.values() if t.is_floating_point() or t.is_complex())
        return math.sqrt(sum(_square_norm(at_least_float32(tensor)) for tensor in tensors))


def _square_norm(tensor: Tensor) -> float:
    dtype = torch.complex128 if tensor.is_complex() else torch.float64
    norm = float(torch.linalg.vector_norm(tensor, dtype=dtype))
    return norm * norm


def out_of_proportion(changes: Sequence[Change]) -> dict[int, str]:
    """Compare the changes of a round with each other.

    A client is compared with the median of the others. A change grows at most in proportion to the training steps, so
    that of another client counts as many times more as that client takes fewer steps. A change of the order of the
    message itself is never out of proportion: the others may have nothing left to learn. Integers that most others
    keep, such as indices, may not change if at least two others hold them. One client has no comparison.

    Args:
        changes: Change of each valid update.

    Returns:
        The reason to reject an update, by position.
    """
    reasons = {}
    holders = Counter(name for change in changes for name in change.integers)
    differing = Counter(name for change in changes for name, differs in change.integers.items() if differs)
    for position, change in enumerate(changes):
        others = [*changes[:position], *changes[position + 1 :]]
        if not others:
            continue
        usual = median(other.norm * min(max(change.steps / other.steps, 1.0), _MAX_STEPS_RATIO) for other in others)
        if change.norm > PROPORTION * usual:
            usual = max(usual, _SMALL_CHANGE * change.message_norm)
        limit = PROPORTION * usual
        if limit and change.norm > limit:  # 0: nothing to compare with, as after messages of zeros
            reasons[position] = (
                f"expected a change of at most {limit:.4g} (2-norm) next to the other updates, got {change.norm:.4g}"
            )
        unusual = [
            name
            for name, differs in change.integers.items()
            if differs and holders[name] > 2 and differing[name] - 1 < (holders[name] - 1) / 2
        ]
        if unusual:
            reasons[position] = f"{_short(min(unusual))}: expected the integers of the message, as in the other updates"
    return reasons


def _short(value: object) -> str:
    """Return a value as text of at most 60 characters."""
    return shorten(repr(value))
