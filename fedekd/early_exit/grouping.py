"""Groups of samples whose error rates are bounded separately."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fedekd.early_exit.scoring import ExitOutputs
from fedekd.errors import UserError

TRUE_CLASS = "true_class"
"""Groups are the true classes, which are unknown at deployment: thresholds are shared."""

PREDICTED_CLASS = "predicted_class"
"""Groups are the classes that the exit predicts."""

CLASSES = (TRUE_CLASS, PREDICTED_CLASS)
"""Names of `--groups` that are not a column of the data."""

Names = npt.NDArray[np.str_]


@dataclass(frozen=True)
class Grouping:
    """How samples are grouped.

    Args:
        by: `true_class`, `predicted_class`, or the name of a column of the data.
        names: Names of the groups; of classes in the order of their numbers.
        is_shared: True for one threshold per exit that holds for each group; False for thresholds per group, which need
            the group of a sample at deployment.
        classes: Number of the class of each group. Default: 0, 1, ... for classes; not used for a column.
    """

    by: str
    names: tuple[str, ...]
    is_shared: bool
    classes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.names or len(set(self.names)) < len(self.names):
            raise UserError(f"groups: expected at least 1 group and different names, got {list(self.names)}")
        if self.by == TRUE_CLASS and not self.is_shared:
            raise UserError(
                "groups: expected shared thresholds for true_class, which is unknown at deployment. Set"
                " --shared_thresholds, or use --groups predicted_class"
            )

    def index(self, outputs: ExitOutputs) -> npt.NDArray[np.int64]:
        """Return the number of the group of each sample at each exit, shape (n, E).

        Args:
            outputs: Outputs of n samples; for a column with `groups`.

        Returns:
            Index into `names`; -1 for an unknown group.
        """
        if self.by in CLASSES:
            classes = class_numbers(self.by, outputs)
            numbers = np.full(max(classes.max(initial=-1), *self.classes, len(self.names)) + 1, -1)
            numbers[list(self.classes) or np.arange(len(self.names))] = np.arange(len(self.names))
            return np.asarray(numbers[classes])
        numbers = self.numbers(outputs.groups)
        if len(numbers) != len(outputs):
            numbers = np.full(len(outputs), -1)
        return np.repeat(numbers[:, None], outputs.num_exits, axis=1)

    def numbers(self, values: Any) -> npt.NDArray[np.int64]:
        """Return the number of each named group, shape (n,); -1 if it is unknown or None."""
        known = {name: number for number, name in enumerate(self.names)}
        return np.asarray([known.get(value, -1) for value in ([] if values is None else values)], dtype=np.int64)


def class_numbers(by: str, outputs: ExitOutputs) -> npt.NDArray[np.int64]:
    """Return the true or predicted class of each sample at each exit, shape (n, E)."""
    if by == PREDICTED_CLASS:
        return np.asarray(outputs.logits.argmax(dim=2).numpy())
    return np.repeat(outputs.labels.numpy()[:, None], outputs.num_exits, axis=1)
