"""Negative transfer: what a client loses by taking part, against training alone (FedeKD Section 4.2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat

from fedekd.tasks import Task, require_task


class _Tail(NamedTuple):
    """The end of the clients' Deltas at which harm lies."""

    name: str
    quantile: float
    worst: float  # the quantile of the client that fares worst


_TAILS = {"classification": _Tail("p10", 0.1, 0.0), "regression": _Tail("p90", 0.9, 1.0)}


def negative_transfer(
    method_scores: Tensor | Sequence[float],
    local_scores: Tensor | Sequence[float],
    task: Task = "classification",
) -> dict[str, Tensor]:
    r"""Summarize over K clients $\Delta_k = \mathrm{score}_k^{method} - \mathrm{score}_k^{local}$.

    For classification the scores are accuracies: a negative $\Delta_k$ is harm, the worst client is the
    minimum, and the tail is the 10th percentile, `p10`. For regression they are RMSEs: a positive
    $\Delta_k$ is harm, the worst is the maximum, and the tail is the 90th percentile, `p90`. Percentiles
    interpolate linearly, as `numpy.percentile` does. A client without a score (NaN) makes every summary
    NaN: none is dropped silently.

    Args:
        method_scores: Each client's score under the method, shape (K,).
        local_scores: The same clients' scores after training alone, shape (K,).
        task: Which of the two conventions holds.

    Returns:
        `avg`, `worst` and `p10` or `p90`, scalars, and `client`, the K values of $\Delta_k$; float64, in the
        scores' unit.

    Raises:
        UserError: `task` is unknown.
        ValueError: There are no clients, or not as many scores of one kind as of the other.

    Example:
        >>> delta = negative_transfer([0.75, 0.5], [0.5, 0.75], task="classification")
        >>> {name: delta[name].tolist() for name in ("avg", "worst", "client")}
        {'avg': 0.0, 'worst': -0.25, 'client': [0.25, -0.25]}
    """
    tail = _TAILS[require_task(task)]
    method, local = _as_scores(method_scores, local_scores)
    if method.numel() == 0:
        raise ValueError("negative transfer needs the scores of at least one client")
    client = method - local
    quantiles = torch.tensor([tail.quantile, tail.worst], dtype=client.dtype, device=client.device)
    percentile, worst = torch.quantile(client, quantiles).unbind()
    return {"avg": client.mean(), "worst": worst, tail.name: percentile, "client": client}


class NegativeTransfer(Metric):
    """`negative_transfer` over clients that report one by one, or several at a time.

    Scores are kept in float64, clients in the order of their updates.

    Args:
        task: "classification" (accuracies; `p10`) or "regression" (RMSEs; `p90`).
        kwargs: What every `torchmetrics.Metric` takes.

    Raises:
        UserError: `task` is unknown.

    Example:
        >>> metric = NegativeTransfer(task="regression")
        >>> metric.update([1.5, 1.0], [1.0, 1.0])
        >>> metric.update([0.5], [1.0])
        >>> {name: value.tolist() for name, value in metric.compute().items()}
        {'avg': 0.0, 'worst': 0.5, 'p90': 0.4, 'client': [0.5, 0.0, -0.5]}
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False

    method_scores: list[Tensor]
    local_scores: list[Tensor]

    def __init__(self, task: Task = "classification", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.task = require_task(task)
        self.add_state("method_scores", default=[], dist_reduce_fx="cat")
        self.add_state("local_scores", default=[], dist_reduce_fx="cat")

    def update(self, method_scores: Tensor | Sequence[float], local_scores: Tensor | Sequence[float]) -> None:
        """Add clients.

        Args:
            method_scores: Their scores under the method, shape (K,), or a scalar for one client.
            local_scores: Their scores after training alone, of the same shape.

        Raises:
            ValueError: There are not as many scores of one kind as of the other.
        """
        method, local = _as_scores(method_scores, local_scores)
        self.method_scores.append(method)
        self.local_scores.append(local)

    def compute(self) -> dict[str, Tensor]:
        """Summarize all clients added so far.

        Returns:
            What `negative_transfer` returns; but `client` is a scalar if there is one client only, as
            torchmetrics squeezes every result of a single element.

        Raises:
            ValueError: No clients were added.
        """
        if not self.method_scores:
            return negative_transfer([], [], self.task)
        return negative_transfer(dim_zero_cat(self.method_scores), dim_zero_cat(self.local_scores), self.task)


def _as_scores(
    method_scores: Tensor | Sequence[float], local_scores: Tensor | Sequence[float]
) -> tuple[Tensor, Tensor]:
    method = torch.as_tensor(method_scores, dtype=torch.float64).detach()
    local = torch.as_tensor(local_scores, dtype=torch.float64, device=method.device).detach()
    if method.ndim > 1 or method.shape != local.shape:
        raise ValueError(
            f"one score a client is needed of each kind, but method_scores has shape {tuple(method.shape)} "
            f"and local_scores {tuple(local.shape)}"
        )
    return method.reshape(-1), local.reshape(-1)
