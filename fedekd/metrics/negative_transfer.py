"""Delta: the gain of each client over its local baseline (FedeKD Section 4.2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat

from fedekd.metrics.registry import MetricSpec, primary_metric
from fedekd.tasks import Task, require_task


def negative_transfer(
    method_scores: Tensor | Sequence[float],
    local_scores: Tensor | Sequence[float],
    task: Task = "classification",
    metric: MetricSpec | None = None,
) -> dict[str, Tensor]:
    r"""Summarize Delta, the gain over the local baseline, over K clients.

    $$\Delta_k = \mathrm{score}_k^{method} - \mathrm{score}_k^{local}$$

    The direction of the metric decides which sign is harm. Classification (accuracy, larger is
    better): the worst client has the smallest Delta and the tail is the 10th percentile, `p10`. Regression (RMSE,
    smaller is better): the worst client has the largest Delta and the tail is the 90th percentile, `p90`.
    Percentiles interpolate linearly, as `numpy.percentile`. A missing score (NaN) makes every summary NaN.

    Args:
        method_scores: Score of each client under the method, shape (K,), K at least 1.
        local_scores: Score of the same clients' local baselines, shape (K,).
        task: `classification` or `regression`.
        metric: Metric of the scores, which decides the direction. Default: the task's primary metric.

    Returns:
        `avg`, `worst` and `p10` or `p90`, scalars, and `client`, the K values of Delta; float64, in the unit of the
        scores.

    Raises:
        UserError: If `task` is unknown.
        ValueError: If there are no clients, or the numbers of scores differ.

    Reference:
        FedeKD (arXiv 2605.05553), Section 4.2.

    Example:
        >>> delta = negative_transfer([0.75, 0.5], [0.5, 0.75], task="classification")
        >>> {name: delta[name].tolist() for name in ("avg", "worst", "client")}
        {'avg': 0.0, 'worst': -0.25, 'client': [0.25, -0.25]}
    """
    metric = primary_metric(task) if metric is None else metric
    method, local = _as_scores(method_scores, local_scores)
    if method.numel() == 0:
        raise ValueError("negative_transfer: expected the scores of at least one client, got none")
    client = method - local
    worst_quantile = 0.0 if metric.higher_is_better else 1.0
    quantiles = torch.tensor([metric.tail_percent / 100, worst_quantile], dtype=client.dtype, device=client.device)
    tail, worst = torch.quantile(client, quantiles).unbind()
    return {"avg": client.mean(), "worst": worst, metric.tail: tail, "client": client}


class NegativeTransfer(Metric):
    """`negative_transfer` as a torchmetrics Metric, updated client by client.

    Scores are kept in float64, clients in the order of their updates.

    Args:
        task: `classification` (accuracy, `p10`) or `regression` (RMSE, `p90`).
        kwargs: Arguments of `torchmetrics.Metric`.

    Raises:
        UserError: If `task` is unknown.

    Example:
        >>> metric = NegativeTransfer(task="regression")
        >>> metric.update([1.5, 1.0], [1.0, 1.0])
        >>> metric.update([0.5], [1.0])
        >>> {name: value.tolist() for name, value in metric.compute().items()}
        {'avg': 0.0, 'worst': 0.5, 'p90': 0.4}
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
            local_scores: The scores of their local baselines, of the same shape.

        Raises:
            ValueError: If the shapes differ or have more than one dimension.
        """
        method, local = _as_scores(method_scores, local_scores)
        self.method_scores.append(method)
        self.local_scores.append(local)

    def compute(self) -> dict[str, Tensor]:
        """Summarize all clients added so far.

        Returns:
            The scalars of `negative_transfer`, which a LightningModule can log.

        Raises:
            ValueError: If no clients were added.
        """
        if not self.method_scores:
            return negative_transfer([], [], self.task)  # raises
        summary = negative_transfer(dim_zero_cat(self.method_scores), dim_zero_cat(self.local_scores), self.task)
        return {name: value for name, value in summary.items() if name != "client"}


def _as_scores(
    method_scores: Tensor | Sequence[float], local_scores: Tensor | Sequence[float]
) -> tuple[Tensor, Tensor]:
    method = torch.as_tensor(method_scores, dtype=torch.float64).detach()
    local = torch.as_tensor(local_scores, dtype=torch.float64, device=method.device).detach()
    if method.ndim > 1 or method.shape != local.shape:
        raise ValueError(
            "expected one score of each kind per client, got method_scores of shape "
            f"{tuple(method.shape)} and local_scores of shape {tuple(local.shape)}"
        )
    return method.reshape(-1), local.reshape(-1)
