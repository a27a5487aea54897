"""Trust in a teacher, as a module that a gate evaluates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

from torch import Tensor, nn

from fedekd import functional as F
from fedekd.errors import require_choice
from fedekd.tasks import TASKS, Task


class HeldOutTrust(nn.Module):
    """Weights of a teacher's outputs, estimated on held-out samples.

    For classification the estimated probability that the teacher's prediction is right, by predicted class and
    confidence (`fedekd.functional.correctness_trust`); for regression the teacher's error relative to that of the mean
    predictor, by its output (`fedekd.functional.skill_trust`).

    Args:
        task: `classification` or `regression`.
        outputs: The teacher's outputs for samples that trained neither model, shape (n, C), or (n, 1) for regression;
            n may be 0, which gives weights of 1/2.
        targets: Class indices, or real targets in the unit of the outputs, shape (n,).
        mean: Mean of the training targets, in regression. Default 0, that of standardised targets.

    Raises:
        UserError: If the task is unknown.
        ValueError: If the shapes do not match.

    Example:
        >>> import torch
        >>> logits, labels = torch.tensor([[3.0, 0.0], [0.0, 3.0]]), torch.tensor([0, 0])
        >>> trust = HeldOutTrust("classification", logits, labels)  # class 0 was right, class 1 was not
        >>> trust(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        tensor([0.5500, 0.4500])
    """

    edges: Tensor
    weights: Tensor

    def __init__(self, task: Task, outputs: Tensor, targets: Tensor, mean: float = 0.0) -> None:
        super().__init__()
        require_choice("task", task, TASKS)
        if task == "regression":
            edges, weights = F.skill_trust(outputs, targets, mean)
        else:
            edges, weights = F.correctness_trust(outputs, targets)
        self.register_buffer("edges", edges, persistent=False)
        self.register_buffer("weights", weights.to(edges.dtype), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move or cast the module, not to half precision, which would merge edges."""
        edges, weights = self.edges, self.weights
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.edges.dtype.itemsize < 4:
            self.edges, self.weights = edges.to(self.edges.device), weights.to(self.weights.device)
        return self

    def forward(self, output: Tensor) -> Tensor:
        """Return the weights of a teacher's outputs (B, C), shape (B,)."""
        return F.look_up_trust(output, self.edges, self.weights)
