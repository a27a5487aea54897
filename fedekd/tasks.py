"""The two kinds of prediction a federation can learn."""

from __future__ import annotations

from typing import Literal, get_args

from fedekd.errors import UserError, nearest

Task = Literal["classification", "regression"]
"""Classification: logits of shape (B, C) and integer labels. Regression: outputs (B, 1) and real targets."""

TASKS: tuple[Task, ...] = get_args(Task)


def require_task(task: str) -> Task:
    """`task` itself, once it is known to be one.

    Raises:
        UserError: It is not one of `TASKS`.

    Example:
        >>> require_task("regression")
        'regression'
    """
    for known in TASKS:
        if task == known:
            return known
    raise UserError(f"task is '{task}': {nearest(task, TASKS)}")
