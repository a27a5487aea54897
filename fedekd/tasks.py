"""The two prediction tasks: classification and regression."""

from __future__ import annotations

from typing import Literal, get_args

from fedekd.errors import UserError, nearest

Task = Literal["classification", "regression"]
"""Classification: logits of shape (B, C) and integer labels. Regression: outputs (B, 1) and real targets."""

TASKS: tuple[Task, ...] = get_args(Task)


def require_task(task: str) -> Task:
    """Validate `task` and return it.

    Raises:
        UserError: If it is not one of `TASKS`.

    Example:
        >>> require_task("regression")
        'regression'
    """
    for known in TASKS:
        if task == known:
            return known
    raise UserError(f"task: expected one of {', '.join(TASKS)}, got {task!r}. {nearest(task, TASKS)}")
